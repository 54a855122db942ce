"""A WebSocket ends with the credential that opened it: expired or revoked, with a close code that says so."""

from typing import Any

import pytest
from pydantic import SecretStr

from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.policies.revocation import Revocation
from sigil_policy.policies.scopes import Scopes
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.revocations import MemoryRevocations
from sigil_policy.testing import FrozenClock, Sent, drive
from tests.identity.material import NOW, good_claims, make_issuer, token

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")
ENDED = {"type": "websocket.close", "code": 4401, "reason": "the credential has ended"}


class Steps:
    """An application that does one step after each message that it hears; `heard` counts them."""

    def __init__(self, *steps: Any) -> None:
        self.steps = steps
        self.heard = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        for step in self.steps:
            if (await receive())["type"] == "websocket.disconnect":
                return
            self.heard += 1
            waited = step()
            if waited is not None:
                await waited
        await receive()


async def connect(app: Steps, *policies: Policy, clock: FrozenClock, headers: Any) -> Sent:
    talk = [{"type": "websocket.connect"}, *[{"type": "websocket.receive", "text": "hi"}] * len(app.steps)]
    incoming = [*talk, {"type": "websocket.disconnect", "code": 1000}]
    stack = PolicyStack(app, [*policies, Scopes()], clock=clock)
    return await drive(stack, kind="websocket", headers=headers, incoming=incoming)


def bearer(**claims: Any) -> dict[str, bytes]:
    return {"authorization": b"Bearer " + token(good_claims(jti="t1", **claims))}


async def test_a_connection_ends_with_its_token() -> None:
    """WS-08."""
    clock = FrozenClock(NOW)
    app = Steps(lambda: clock.advance(50), lambda: clock.advance(9), lambda: clock.advance(1), lambda: None)
    policy = BearerAuth(issuers=[make_issuer(leeway=0)])
    sent = await connect(app, policy, clock=clock, headers=bearer(exp=int(NOW) + 60))
    assert app.heard == 3
    assert sent.messages[-1] == ENDED


async def test_the_leeway_of_a_token_goes_for_its_connection_too() -> None:
    clock = FrozenClock(NOW)
    app = Steps(lambda: clock.advance(65), lambda: clock.advance(5), lambda: None)
    policy = BearerAuth(issuers=[make_issuer(leeway=10)])
    sent = await connect(app, policy, clock=clock, headers=bearer(exp=int(NOW) + 60))
    assert app.heard == 2
    assert sent.messages[-1] == ENDED


async def test_a_clock_that_is_set_forward_ends_connections_within_a_minute() -> None:
    """What counts is the time of day, whatever was waited for."""

    class Wall(FrozenClock):
        ahead = 0.0

        def time(self) -> float:
            return super().time() + self.ahead

    clock = Wall(NOW)

    def jump() -> None:
        clock.ahead = 7_200.0

    app = Steps(jump, lambda: clock.advance(60), lambda: None)
    policy = BearerAuth(issuers=[make_issuer(leeway=0)])
    sent = await connect(app, policy, clock=clock, headers=bearer(exp=int(NOW) + 3_600))
    assert app.heard == 2
    assert sent.messages[-1] == ENDED


async def test_a_connection_ends_with_its_key() -> None:
    plain, record = new_key(pepper=PEPPER, subject="job", expires=NOW + 60)
    clock = FrozenClock(NOW)
    app = Steps(lambda: clock.advance(59), lambda: clock.advance(1), lambda: None)
    policy = ApiKeyAuth(store=MemoryApiKeyStore([record]), pepper=PEPPER)
    sent = await connect(app, policy, clock=clock, headers={"x-api-key": plain.get_secret_value()})
    assert app.heard == 2
    assert sent.messages[-1] == ENDED


class Ledger:
    """A store of keys that can forget one, and fail."""

    def __init__(self, record: Any) -> None:
        self.record = record
        self.fails = False
        self.asked = 0

    async def find(self, name: str) -> Any:
        self.asked += 1
        if self.fails:
            raise StoreUnavailableError("away", 1.0)
        return self.record


async def test_a_connection_ends_soon_after_its_key_was_taken_back() -> None:
    plain, record = new_key(pepper=PEPPER, subject="job")
    store = Ledger(record)
    clock = FrozenClock(NOW)

    def forget() -> None:
        store.record = None

    app = Steps(forget, lambda: clock.advance(29), lambda: clock.advance(1), lambda: None)
    policy = ApiKeyAuth(store=store, pepper=PEPPER)
    sent = await connect(app, policy, clock=clock, headers={"x-api-key": plain.get_secret_value()})
    assert app.heard == 3
    assert sent.messages[-1] == ENDED
    # At the handshake, when it was accepted, and half a minute later.
    assert store.asked == 3


async def test_a_store_of_keys_may_be_away_for_a_moment_and_not_for_long() -> None:
    plain, record = new_key(pepper=PEPPER, subject="job")
    store = Ledger(record)
    clock = FrozenClock(NOW)

    def fails(now: bool) -> Any:
        def step() -> None:
            store.fails = now
            clock.advance(30)

        return step

    app = Steps(fails(True), fails(True), fails(False), *[fails(True)] * 5)
    policy = ApiKeyAuth(store=store, pepper=PEPPER)
    sent = await connect(app, policy, clock=clock, headers={"x-api-key": plain.get_secret_value()})
    assert app.heard == 6
    assert (sent.messages[-1]["type"], sent.messages[-1]["code"]) == ("websocket.close", 1013)


async def test_a_connection_ends_when_its_token_is_revoked() -> None:
    clock = FrozenClock(NOW)
    revoked = MemoryRevocations(clock=clock)
    app = Steps(lambda: revoked.revoke(jti="t1"), lambda: clock.advance(5), lambda: None)
    policies = BearerAuth(issuers=[make_issuer()]), Revocation(store=revoked)
    sent = await connect(app, *policies, clock=clock, headers=bearer())
    assert app.heard == 2
    assert sent.messages[-1] == ENDED


class Away:
    """Revocations on another machine that has gone."""

    remote = True

    def __init__(self) -> None:
        self.read_at = 0.0

    def revoked(self, **token: Any) -> bool:
        return False

    def age(self, now: float) -> float:
        return now - self.read_at

    def resting(self, now: float) -> bool:
        return True

    async def refresh(self, now: float) -> None:
        raise StoreUnavailableError("away", 3.0)


@pytest.mark.parametrize(("loss", "heard", "code"), [("closed", 2, 1013), ("open", 3, None)])
async def test_while_nothing_can_be_known_it_is_as_for_requests(loss: Any, heard: int, code: int | None) -> None:
    clock = FrozenClock(NOW)
    store = Away()
    store.read_at = clock.monotonic()
    app = Steps(lambda: clock.advance(29), lambda: clock.advance(5), lambda: None)
    policies = BearerAuth(issuers=[make_issuer()]), Revocation(store=store, on_store_loss=loss)
    sent = await connect(app, *policies, clock=clock, headers=bearer())
    assert app.heard == heard
    assert sent.messages[-1].get("code") == code


async def test_who_is_nobody_has_no_credential_that_could_end() -> None:
    clock = FrozenClock(NOW)
    app = Steps(lambda: clock.advance(1e9), lambda: None)
    _, record = new_key(pepper=PEPPER, subject="job")
    policies = BearerAuth(issuers=[make_issuer()]), ApiKeyAuth(store=MemoryApiKeyStore([record]), pepper=PEPPER)
    incoming = [{"type": "websocket.connect"}, *[{"type": "websocket.receive", "text": "hi"}] * 2]
    incoming.append({"type": "websocket.disconnect", "code": 1000})
    stack = PolicyStack(app, policies, clock=clock)
    sent = await drive(stack, kind="websocket", incoming=incoming)
    assert app.heard == 2
    assert len(sent.messages) == 1
