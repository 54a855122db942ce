"""Every policy of ours passes the checks that any author can run, and a policy that breaks a promise does not."""

from collections.abc import Awaitable
from typing import Any

import anyio
import pytest
from pydantic import SecretStr

from sigil_policy import (
    AccessLog,
    ApiKeyAuth,
    AuthFailureLimit,
    BearerAuth,
    CacheControl,
    ConcurrencyLimit,
    Conditional,
    Deprecation,
    Exchange,
    Head,
    McpEndpoint,
    McpTools,
    MemoryRevocations,
    Policy,
    Problem,
    Problems,
    ProtectedResource,
    ProtectedResourceMetadata,
    RateLimit,
    Reply,
    RequestID,
    Revocation,
    Scopes,
    Tier,
    Versioning,
    memory_limits,
)
from sigil_policy.core.exchange import _CURRENT
from sigil_policy.testing import Faulty, Mint, check_policy, policy_checks
from sigil_policy.testing.policies import PolicyCheck

pytestmark = pytest.mark.anyio

MINT = Mint()
TOKEN = {"headers": list(MINT.auth_headers(scopes=["a:read"], tier="pro").items())}
KEY = {"headers": list(MINT.auth_headers(kind="key").items())}
AUTH = {"outside": [BearerAuth(issuers=[MINT.issuer])]}
BUDGET = Tier(requests="9999/minute", tokens="9999/minute")
WIDE = {"free": Tier(requests="100000/minute")}
RESOURCE = ProtectedResource(resource="https://api.example.com/v7", authorization_servers=["https://auth.example.com"])


class Quiet:
    """A log that nobody reads."""

    def info(self, event: str, **fields: Any) -> None:
        pass


POLICIES: dict[str, tuple[Policy, dict[str, Any]]] = {
    "RequestID": (RequestID(), {}),
    "AccessLog": (AccessLog(logger=Quiet()), {}),
    "Problems": (Problems(), {}),
    "Versioning": (Versioning(routes={"/**": Deprecation(deprecated="2026-01-01")}), {}),
    "BearerAuth": (BearerAuth(issuers=[MINT.issuer]), TOKEN),
    "BearerAuth, nobody": (BearerAuth(issuers=[MINT.issuer], required=True), {}),
    "ApiKeyAuth": (ApiKeyAuth(store=MINT.key_store, pepper=MINT.pepper), KEY),
    "ApiKeyAuth, remote": (ApiKeyAuth(store=Faulty(MINT.key_store), pepper=MINT.pepper), KEY),
    "Revocation": (Revocation(store=MemoryRevocations()), {**AUTH, **TOKEN}),
    "AuthFailureLimit": (AuthFailureLimit(), {}),
    "Scopes": (Scopes(routes={"/**": "a:read"}), {**AUTH, **TOKEN}),
    "Scopes, nobody": (Scopes(), AUTH),
    "RateLimit": (RateLimit(tiers=WIDE), {}),
    "RateLimit, refusing": (RateLimit(tiers={"free": Tier(requests="1/minute")}), {}),
    "RateLimit, tokens": (RateLimit(tiers={"free": BUDGET}, tokens={"/**": 1}), {}),
    "RateLimit, remote": (RateLimit(tiers=WIDE, store=Faulty(memory_limits("fixed"))), {}),
    "ConcurrencyLimit": (ConcurrencyLimit(limits=100), {}),
    "CacheControl": (CacheControl(routes={"/**": "public, max-age=60"}), {}),
    "Conditional": (Conditional(), {}),
    "McpEndpoint": (McpEndpoint(), {}),
    "McpTools": (McpTools(tools={"search": "a:read"}), {**AUTH, **TOKEN}),
    "ProtectedResourceMetadata": (ProtectedResourceMetadata(documents=[RESOURCE]), {}),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "options"), POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("check", policy_checks(), ids=str)
async def test_our_policies(check: PolicyCheck, policy: Policy, options: dict[str, Any]) -> None:
    await check(policy, **options)


# --- policies that break a promise -----------------------------------------------------------------------------------


class ShowsSecrets(Policy):
    secret: str = "words-of-the-secret"


class TwoStarts(Policy):
    """Writes into the application's message."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"X-Capital", b"1"))


class LongBody(Policy):
    """Says another length than the body has."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.replace(b"content-length", b"99")


class Splits(Policy):
    """Repeats what came from outside in a header."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"x-echo", ex.query + b"\r\nx-evil: 1"))


class Reads(Policy):
    """Reads every body, whether there is one or not."""

    async def on_request(self, ex: Exchange) -> None:
        if ex.kind == "http":
            await ex.body(1_000_000)


class Swallows(Policy):
    """Takes the client's messages for itself."""

    async def on_request(self, ex: Exchange) -> None:
        if ex.method == "POST":
            await ex._receive()


class Slow(Policy):
    """Holds the stream until it has two parts."""

    def on_chunk(self, ex: Exchange, chunk: bytes) -> Awaitable[None] | None:
        return anyio.sleep(30) if chunk.startswith(b"data: 1") else None


class Tells(Policy):
    """Answers with what the application raised."""

    def on_error(self, ex: Exchange, error: Exception) -> Reply:
        return Reply(status=500, headers=[(b"content-type", b"text/plain")], body=str(error).encode(), reraise=True)


class Replaces(Policy):
    """Raises something else."""

    def on_error(self, ex: Exchange, error: Exception) -> Problem | None:
        raise RuntimeError("mine")


class Keeps(Policy):
    """Keeps its note under another policy."""

    def on_request(self, ex: Exchange) -> None:
        ex.keep(object(), 1)


class Parses(Policy):
    """Trusts what it reads."""

    def on_request(self, ex: Exchange) -> None:
        ex.headers.get(b"cookie", b"").decode("ascii")


class Paths(Policy):
    """Trusts the path."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        ex.path.encode("utf-8")


class Hoards(Policy):
    """Never forgets an exchange."""

    seen: Any

    def on_finish(self, ex: Exchange) -> None:
        self.seen.append(ex)


class AsyncioOnly(Policy):
    async def on_request(self, ex: Exchange) -> None:
        import asyncio

        await asyncio.sleep(0)


class Shields(Policy):
    """Lets no cancellation through."""

    def around(self, ex: Exchange) -> Any:
        from contextlib import asynccontextmanager

        @asynccontextmanager
        async def never() -> Any:
            try:
                yield
            except BaseException as error:
                if isinstance(error, anyio.get_cancelled_exc_class()):
                    raise RuntimeError("not now") from None
                raise

        return never()


class HeadBody(Policy):
    """Answers a HEAD with content."""

    def on_request(self, ex: Exchange) -> Reply | None:
        return None

    def on_response(self, ex: Exchange, head: Head) -> None:
        if ex.method == "HEAD":
            head.replace(b"content-length", b"7")


BROKEN: dict[str, tuple[Policy, str]] = {
    "shows a secret": (ShowsSecrets(), "it_is_a_value_and_shows_no_secret"),
    "capitals": (TwoStarts(), "a_request_gets_one_valid_answer"),
    "another length": (LongBody(), "a_request_gets_one_valid_answer"),
    "splits the response": (Splits(), "a_request_gets_one_valid_answer"),
    "reads every body": (Reads(), "nothing_is_received_that_nobody_needs"),
    "swallows the body": (Swallows(), "the_request_body_reaches_the_application"),
    "holds a stream": (Slow(), "an_event_stream_is_not_held_back"),
    "tells the error": (Tells(), "an_error_of_the_application_comes_out_and_shows_nothing"),
    "replaces the error": (Replaces(), "an_error_of_the_application_comes_out_and_shows_nothing"),
    "keeps a note elsewhere": (Keeps(), "twice_in_one_stack_each_has_its_own_notes"),
    "trusts a header": (Parses(), "nothing_from_outside_makes_it_raise"),
    "trusts the path": (Paths(), "nothing_from_outside_makes_it_raise"),
    "hoards": (Hoards(seen=[]), "it_leaves_nothing_behind"),
    "asyncio alone": (AsyncioOnly(), "every_event_loop_will_do"),
    "stops a cancellation": (Shields(), "a_cancellation_passes"),
    "another head": (HeadBody(), "a_head_has_what_the_get_has"),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "name"), BROKEN.values(), ids=BROKEN)
async def test_a_policy_that_breaks_a_promise(policy: Policy, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sigil_policy.testing.policies.PATIENCE", 0.3)
    (check,) = [check for check in policy_checks() if check.name == name]
    with pytest.raises((AssertionError, Exception)):
        await check(policy, secrets=["words-of-the-secret"])


async def test_all_checks_in_one_call() -> None:
    await check_policy(RequestID())
    with pytest.raises(AssertionError) as failed:
        await check_policy(TwoStarts())
    assert failed.value.__notes__ == ["check_policy: a_request_gets_one_valid_answer"]


async def test_a_policy_that_needs_a_fact_says_what_to_give() -> None:
    with pytest.raises(ValueError, match="Scopes needs a Principal: give outside="):
        await check_policy(Scopes())
    not_one: Any = RequestID
    with pytest.raises(TypeError, match="a policy is checked"):
        await check_policy(not_one)


async def test_secrets_are_found_in_fields_without_being_named() -> None:
    class Leaks(Policy):
        secret: SecretStr = SecretStr("words-of-the-field")

        def __repr__(self) -> str:
            return f"Leaks({self.secret.get_secret_value()})"

    check = policy_checks()[0]
    with pytest.raises(AssertionError, match="in the repr"):
        await check(Leaks())


async def test_the_policy_is_as_it_was_afterwards() -> None:
    before = RateLimit.on_finish
    policy = RateLimit(tiers=WIDE)
    await check_policy(policy)
    assert RateLimit.on_finish is before
    assert _CURRENT.get() is None
