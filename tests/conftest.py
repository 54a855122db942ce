"""The suite runs on asyncio and trio; property tests draw more examples in CI."""

import os

import pytest
from hypothesis import HealthCheck, settings

_QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)

# One fault must not hide another: where two sides disagree in several ways, all of them are shown.
settings.register_profile(
    "ci", max_examples=2_000, deadline=None, suppress_health_check=_QUIET, print_blob=True, derandomize=False
)
settings.register_profile("local", max_examples=300, deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "local")


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
