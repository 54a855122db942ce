"""A test is made again only where something stood still, and not for ever."""

from typing import Any

import pytest

from tests.stores.redis import steady as steadiness
from tests.stores.redis.conftest import LimitsServer
from tests.stores.redis.steady import ATTEMPTS, STOOD_STILL, Witness, steady

pytestmark = pytest.mark.anyio


class Seen(Witness):
    """Saw what the test says."""

    seen = 0.0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.worst = self.seen


async def attempts(monkeypatch: pytest.MonkeyPatch, fails: int, worst: float, **options: Any) -> int:
    """After how many attempts a test passes that fails so often; raises what it fails with if it does not."""
    monkeypatch.setattr(steadiness, "Witness", Seen)
    monkeypatch.setattr(Seen, "seen", worst)
    made = 0

    @steady(**options)
    async def test() -> None:
        nonlocal made
        made += 1
        assert made > fails, f"attempt {made}"

    await test()
    return made


async def test_what_fails_on_a_machine_that_is_well_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await attempts(monkeypatch, 0, 1.0) == 1
    with pytest.raises(AssertionError, match="attempt 1"):
        await attempts(monkeypatch, 1, STOOD_STILL)


async def test_what_fails_while_something_stood_still_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await attempts(monkeypatch, 2, 2 * STOOD_STILL) == 3
    assert await attempts(monkeypatch, 2, 0.0, others=True) == 3


async def test_what_fails_each_time_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=f"attempt {ATTEMPTS}"):
        await attempts(monkeypatch, 99, 1.0)


def test_a_witness_sees_a_server_that_stands_still(limits_server: LimitsServer) -> None:
    with Witness(limits_server.path) as witness:
        limits_server.client.client_pause(200, all=True)
        limits_server.client.ping()
    assert witness.worst > STOOD_STILL
