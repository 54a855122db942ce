"""Every policy of ours passes the checks that any author can run, and a policy that breaks a promise does not."""

import inspect
from collections.abc import Awaitable
from typing import Any

import anyio
import pytest
from pydantic import SecretStr

import sigil_policy
from sigil_policy import (
    AccessLog,
    AllowedOrigins,
    ApiKeyAuth,
    AuthFailureLimit,
    BearerAuth,
    BodyLimit,
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
    Timeout,
    Versioning,
    WebSocketTicketAuth,
    WebSocketTickets,
    memory_limits,
)
from sigil_policy.core.exchange import _CURRENT
from sigil_policy.stores.tickets import MemoryTickets
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
    "AllowedOrigins": (AllowedOrigins(origins=["https://app.example.com"], unsafe_methods=True), {}),
    "AllowedOrigins, required": (AllowedOrigins(origins=["https://app.example.com"], required=True), {}),
    "BodyLimit": (BodyLimit(), {}),
    "BodyLimit, nothing": (BodyLimit(limit=0), {}),
    "Timeout": (Timeout(), {}),
    "Timeout, whole": (Timeout(seconds=20, whole=True), {}),
    "WebSocketTicketAuth": (WebSocketTicketAuth(store=MemoryTickets()), {}),
    "WebSocketTicketAuth, remote": (WebSocketTicketAuth(store=Faulty(MemoryTickets())), {}),
    "WebSocketTickets": (WebSocketTickets(store=MemoryTickets()), {**AUTH, **TOKEN}),
    "WebSocketTickets, everywhere": (WebSocketTickets(store=MemoryTickets(), path="/"), {**AUTH, **TOKEN}),
    "ProtectedResourceMetadata": (ProtectedResourceMetadata(documents=[RESOURCE]), {}),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "options"), POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("check", policy_checks(), ids=str)
async def test_our_policies(check: PolicyCheck, policy: Policy, options: dict[str, Any]) -> None:
    await check(policy, **options)


def test_none_of_our_policies_is_left_out() -> None:
    public = [getattr(sigil_policy, name) for name in sigil_policy.__all__]
    ours = {one for one in public if inspect.isclass(one) and issubclass(one, Policy)} - {Policy}
    assert {type(policy) for policy, _ in POLICIES.values()} == ours


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


class AsksSocketsForBodies(Policy):
    """Takes every exchange for a request."""

    async def on_request(self, ex: Exchange) -> None:
        if ex.kind == "websocket":
            await ex.body(1_000)


class Silences(Policy):
    """Ends errors of some kind."""

    kind: Any

    def around(self, ex: Exchange) -> Any:
        from contextlib import asynccontextmanager, suppress

        @asynccontextmanager
        async def silent() -> Any:
            with suppress(self.kind):
                yield

        return silent()


class Forgives(Policy):
    """Makes a success of every refusal."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.status = 200


class Addresses(Policy):
    """Trusts that every client has an address."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"x-client", ex.client.encode()))  # type: ignore[union-attr]  # the fault


class OneAtATime(Policy):
    """Has one place for what belongs to each exchange."""

    place: Any

    def on_request(self, ex: Exchange) -> None:
        self.place["ex"] = ex

    def on_response(self, ex: Exchange, head: Head) -> None:
        if self.place["ex"] is not ex:
            head.status = 500


class FinishesTwice(Policy):
    """Counts as finished what it has finished itself."""

    def on_response(self, ex: Exchange, head: Head) -> None:
        type(self).on_finish(self, ex)

    def on_finish(self, ex: Exchange) -> None:
        pass


BROKEN: dict[str, tuple[Policy, str, str]] = {
    "shows a secret": (ShowsSecrets(), "it_is_a_value_and_shows_no_secret", "a secret is in the repr"),
    "capitals": (TwoStarts(), "a_request_gets_one_valid_answer", "X-Capital' is not lower-case"),
    "another length": (LongBody(), "a_request_gets_one_valid_answer", "content-length is 99"),
    "splits the response": (Splits(), "a_request_gets_one_valid_answer", "x-echo' has CR, LF or NUL"),
    "finishes twice": (FinishesTwice(), "a_request_gets_one_valid_answer", "on_finish of the policy was called once"),
    "reads every body": (Reads(), "nothing_is_received_that_nobody_needs", "receive was called for a GET"),
    "swallows the body": (
        Swallows(), "the_request_body_reaches_the_application", r"the application has heard \[b'two', b'', 'http.disc",
    ),
    "holds a stream": (Slow(), "an_event_stream_is_not_held_back", "came within 0.3 s; sent so far"),
    "tells the error": (
        Tells(), "an_error_of_the_application_comes_out_and_shows_nothing", "raised is shown to the client",
    ),
    "replaces the error": (
        Replaces(), "an_error_of_the_application_comes_out_and_shows_nothing", r"RuntimeError\('mine'\) came out, not",
    ),
    "keeps a note elsewhere": (Keeps(), "twice_in_one_stack_each_has_its_own_notes", "a note is kept under the policy"),
    "trusts a header": (Parses(), "nothing_from_outside_makes_it_raise", r"makes it raise: UnicodeDecodeError\('asc"),
    "trusts the path": (Paths(), "nothing_from_outside_makes_it_raise", r"makes it raise: UnicodeEncodeError\('utf-8'"),
    "hoards": (Hoards(seen=[]), "it_leaves_nothing_behind", "21 of 21 exchanges that are over are still held"),
    "asyncio alone": (AsyncioOnly(), "every_event_loop_will_do", "trio.run received unrecognized yield message"),
    "stops a cancellation": (Shields(), "a_cancellation_passes", r"passes: RuntimeError\('not now'\) came out"),
    "another head": (HeadBody(), "a_head_has_what_the_get_has", "content-length is that of the GET"),
    "takes sockets for requests": (
        AsksSocketsForBodies(), "a_websocket_is_accepted_or_refused", "a WebSocket has no request body",
    ),
    "ends errors": (
        Silences(kind=Exception), "an_error_after_the_start_is_raised_on", "the response was complete.* came out",
    ),
    "ends the end of a connection": (
        Silences(kind=OSError), "a_client_that_leaves_is_heard_of", "the OSError of send comes out, not None",
    ),
    "ends a cancellation": (
        Silences(kind=BaseException), "a_cancellation_passes", "the application returned without a response",
    ),
    "forgives": (Forgives(), "what_is_refused_inside_of_it_leaves_in_order", "a refusal stays one: 200"),
    "trusts the server": (Addresses(), "a_scope_with_little_in_it_will_do", "'NoneType' .* has no attribute 'encode'"),
    "one place": (OneAtATime(place={}), "many_exchanges_at_once_stay_apart", "each is answered: .*500"),
}  # fmt: skip


@pytest.mark.parametrize(("policy", "name", "words"), BROKEN.values(), ids=BROKEN)
async def test_a_policy_that_breaks_a_promise_is_told_which(
    policy: Policy, name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sigil_policy.testing.policies.PATIENCE", 0.3)
    (check,) = [check for check in policy_checks() if check.name == name]
    with pytest.raises(AssertionError, match=words):
        await check(policy, secrets=["words-of-the-secret"])


def test_for_every_check_there_is_a_policy_that_fails_it() -> None:
    """But for what the stack does whatever a policy does: a policy sees no lifespan and no message."""
    of_the_stack = {
        "a_lifespan_passes", "another_kind_of_scope_passes", "what_the_application_sends_is_not_written_to",
    }  # fmt: skip
    assert {name for _, name, _ in BROKEN.values()} == {check.name for check in policy_checks()} - of_the_stack


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
