"""The suite runs on asyncio and trio, and is watched for secrets; the property of the pass is drawn two thousand times
in CI."""

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

from tests import canaries

_QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)

settings.register_profile("suite", max_examples=75, deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.load_profile("suite")

FUSION_EXAMPLES = 2_000 if os.environ.get("CI") == "true" else 300
"""On asyncio; trio has a quarter of them."""


def pytest_configure(config: pytest.Config) -> None:
    canaries.pytest_configure(config)


def pytest_collection_finish() -> None:
    """Modules and twelve thousand tests stay: no collection during a test has to look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
