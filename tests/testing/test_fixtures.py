"""The clock, the mint, the faults, the assertion, and the plugin that brings them to pytest."""

import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import fastapi
import httpx2
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from sigil_policy import (
    ApiKeyAuth,
    ApiKeyAuthMiddleware,
    AuthFailureLimit,
    BearerAuth,
    BearerAuthMiddleware,
    ConcurrencyLimit,
    Issuer,
    Key,
    MemoryApiKeyStore,
    MemoryRevocations,
    PolicyStack,
    Problems,
    RateLimit,
    Revocation,
    Scopes,
    ScopesMiddleware,
    memory_limits,
    policy,
)
from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import get_exchange
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.slots import MemorySlots
from sigil_policy.testing import Faulty, FrozenClock, Mint, assert_problem, drive, frozen

pytestmark = pytest.mark.anyio


async def whoami(request: Any) -> Any:
    principal = get_exchange(request).principal
    return JSONResponse({"subject": principal and principal.subject, "tier": principal and principal.tier})


ROUTES = [Route("/whoami", whoami)]


# --- the clock -------------------------------------------------------------------------------------------------------


def test_stacks_and_stores_that_were_given_no_clock_follow() -> None:
    mint = Mint()
    policies = [
        Problems(), BearerAuth(issuers=[mint.issuer]),
        RateLimit(tiers={"free": "1/minute"}),
    ]  # fmt: skip
    client = TestClient(Starlette(routes=ROUTES, middleware=[Middleware(PolicyStack, policies=policies)]))
    with frozen() as clock:
        headers = mint.auth_headers(tier="free", lifetime=120)
        assert client.get("/whoami", headers=headers).json()["subject"] == "user_123"
        assert_problem(client.get("/whoami", headers=headers), "RATE_001", timestamp="2023-11-14T22:13:20Z")
        clock.advance(61)
        assert client.get("/whoami", headers=headers).status_code == 200
        clock.advance(70)
        assert_problem(client.get("/whoami", headers=headers), "AUTH_002")
        assert mint.key_store._clock.time() == clock.time()
    assert SYSTEM_CLOCK.time is time.time and SYSTEM_CLOCK.monotonic is time.monotonic


def test_frozen_clocks_are_nested_and_end_also_when_a_test_fails() -> None:
    with frozen(FrozenClock(1.0)) as outer:
        with pytest.raises(ZeroDivisionError), frozen(FrozenClock(2.0)):  # noqa: PT012  a test that fails
            assert SYSTEM_CLOCK.time() == 2.0
            raise ZeroDivisionError
        assert SYSTEM_CLOCK.time() == 1.0
        seen: list[float] = []
        thread = threading.Thread(target=lambda: seen.append(SYSTEM_CLOCK.time()))
        thread.start()
        thread.join()
        assert seen == [1.0], "every thread sees it"
        outer.advance(5)
        assert SYSTEM_CLOCK.time() == 6.0
    assert abs(SYSTEM_CLOCK.time() - time.time()) < 3_600


async def test_a_stack_with_a_clock_of_its_own_keeps_it() -> None:
    own = FrozenClock(5_000.0)
    stack = PolicyStack(lambda *_: None, policies=[RateLimit()], clock=own)
    with frozen():
        assert stack.clock.time() == 5_000.0


# --- the mint --------------------------------------------------------------------------------------------------------


def app_of(*policies: Any) -> Starlette:
    return Starlette(routes=ROUTES, middleware=[Middleware(PolicyStack, policies=[Problems(), *policies])])


def test_what_is_minted_is_accepted_and_nothing_else() -> None:
    mint, other = Mint(), Mint()
    client = TestClient(
        app_of(BearerAuth(issuers=[mint.issuer]), ApiKeyAuth(store=mint.key_store, pepper=mint.pepper), Scopes())
    )
    expected = {"subject": "ann", "tier": "pro"}
    for kind in ("token", "key"):
        headers = mint.auth_headers("ann", scopes=["a:read"], tier="pro", kind=kind)  # type: ignore[arg-type]
        assert client.get("/whoami", headers=headers).json() == expected
    assert_problem(client.get("/whoami", headers=other.auth_headers()), "AUTH_002")
    assert_problem(client.get("/whoami", headers=other.auth_headers(kind="key")), "AUTH_005")
    assert_problem(client.get("/whoami"), "AUTH_001")
    for claims in ({"lifetime": -60}, {"aud": "others"}, {"iss": "https://evil.example"}, {"sub": None}):
        assert_problem(client.get("/whoami", headers=mint.auth_headers(**claims)), "AUTH_002")  # type: ignore[arg-type]
    assert_problem(client.get("/whoami", headers=mint.auth_headers(kind="key", lifetime=-1)), "AUTH_005")
    assert "Mint(" in repr(mint) and mint.pepper.get_secret_value() not in repr(mint)


async def test_a_token_says_what_it_was_told() -> None:
    mint = Mint(url="https://a.test", audience="b")
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(get_exchange(scope).principal)
        await PlainTextResponse("ok")(scope, receive, send)

    strict = BearerAuth(issuers=[Issuer(url=mint.url, audience="b", keys=mint.issuer.keys, strict=True)])
    headers = mint.auth_headers("ann", scopes="x y", tier="pro", org="acme", jti="7")
    assert (await drive(PolicyStack(app, policies=[strict]), headers=headers)).status == 200
    principal = seen[0]
    assert (principal.subject, principal.scopes, principal.tier) == ("ann", {"x", "y"}, "pro")
    assert (principal.claims["org"], principal.claims["jti"], principal.issuer) == ("acme", "7", "https://a.test")


OTHERS = Issuer(
    url="https://elsewhere.example", audience="x", keys=[Key(algorithm="HS256", secret=SecretStr("s" * 40))]
)


@pytest.mark.parametrize("make", [Starlette, fastapi.FastAPI], ids=["starlette", "fastapi"])
def test_an_application_that_names_other_issuers_takes_them_for_a_while(make: Any) -> None:
    policies = [
        Problems(), BearerAuth(issuers=[OTHERS], realm="mine"),
        ApiKeyAuth(store=MemoryApiKeyStore(), pepper=SecretStr("p" * 40)), Scopes(),
    ]  # fmt: skip
    app, mint = make(routes=ROUTES), Mint()
    app.add_middleware(PolicyStack, policies=policies)
    before = list(app.user_middleware)
    assert_problem(TestClient(app).get("/whoami", headers=mint.auth_headers()), "AUTH_002")
    with mint.accepted_by(app) as same:
        assert same is app
        client = TestClient(app)
        for kind in ("token", "key"):
            headers = mint.auth_headers(kind=kind)  # type: ignore[arg-type]
            assert client.get("/whoami", headers=headers).json()["subject"] == "user_123"
        assert 'realm="mine"' in client.get("/whoami").headers["www-authenticate"], "all else stays"
    assert app.user_middleware == before
    assert_problem(TestClient(app).get("/whoami", headers=mint.auth_headers()), "AUTH_002")


async def test_so_does_a_stack_and_who_has_neither_says_so() -> None:
    mint = Mint()
    app = Starlette(routes=ROUTES)
    stack = PolicyStack(app, policies=[BearerAuth(issuers=[OTHERS], required=True)], clock=FrozenClock())
    with mint.accepted_by(stack) as accepting:
        assert accepting is not stack and accepting.clock is stack.clock
        assert (await drive(accepting, path="/whoami")).status == 401
    stack = PolicyStack(app, policies=[BearerAuth(issuers=[OTHERS], required=True)])
    with mint.accepted_by(stack) as accepting:
        assert (await drive(accepting, path="/whoami", headers=mint.auth_headers())).status == 200
    for nobody in (PolicyStack(app), app, object()):
        with pytest.raises(LookupError, match="no BearerAuth and no ApiKeyAuth"), mint.accepted_by(nobody):
            pass


def test_middlewares_of_their_own_and_policies_by_place_take_them_too() -> None:
    """The habit of one `add_middleware` for each policy, which fuse."""
    mint, app = Mint(), Starlette(routes=ROUTES)
    app.add_middleware(ScopesMiddleware)
    app.add_middleware(ApiKeyAuthMiddleware, store=MemoryApiKeyStore(), pepper=SecretStr("p" * 40))
    app.add_middleware(BearerAuthMiddleware, issuers=[OTHERS])
    app.add_middleware(PolicyStack, [Problems()])
    placed = Starlette(routes=ROUTES, middleware=[Middleware(PolicyStack, [BearerAuth(issuers=[OTHERS])])])
    for given, kinds in ((app, ("token", "key")), (placed, ("token",))):
        before = list(given.user_middleware)
        with mint.accepted_by(given):
            client = TestClient(given)
            for kind in kinds:
                answer = client.get("/whoami", headers=mint.auth_headers(kind=kind))  # type: ignore[arg-type]
                assert (answer.status_code, answer.json()["subject"]) == (200, "user_123")
            stack: Any = given.middleware_stack
            stack = stack.app  # inside of what answers errors
            assert isinstance(stack, PolicyStack) and not isinstance(stack.app, PolicyStack), "they have fused"
        assert given.user_middleware == before
        assert TestClient(given).get("/whoami", headers=mint.auth_headers()).status_code == 401, "as it was before"
    with mint.accepted_by(app):
        assert_problem(TestClient(app).get("/whoami"), "AUTH_001")


def test_all_options_of_a_stack_stay() -> None:
    """Without the tags, what is allowed in a test would be refused in production, or worse."""
    mint, app = Mint(), fastapi.FastAPI()

    @app.get("/inside", tags=["internal"])
    def inside() -> None: ...

    class Mine(PolicyStack):
        pass

    options: Any = {"tags": {"internal": policy(scopes="inside")}, "strict_routes": True, "finish_timeout": 2.5}
    policies = [Problems(), BearerAuth(issuers=[OTHERS]), Scopes()]
    stack = PolicyStack(app, policies, clock=FrozenClock(), **options)
    with mint.accepted_by(stack) as accepting:
        assert type(accepting) is PolicyStack
        assert (accepting.tags, accepting.strict_routes, accepting.finish_timeout) == tuple(options.values())
    app.add_middleware(Mine, policies=policies, **options)
    with mint.accepted_by(app):
        client = TestClient(app)
        assert_problem(client.get("/inside", headers=mint.auth_headers(scopes=["other"])), "AUTH_004")
        assert client.get("/inside", headers=mint.auth_headers(scopes=["inside"])).status_code == 200
        found: Any = app.middleware_stack
        while not isinstance(found, PolicyStack):
            found = found.app
        assert isinstance(found, Mine) and found.strict_routes and found.finish_timeout == 2.5


def test_the_clock_reaches_everything_in_this_process() -> None:
    """Keys that end, failures that are forgotten, revocations that end, uses that are noted, slots and windows."""
    mint, revocations = Mint(), MemoryRevocations()
    client = TestClient(
        app_of(
            AuthFailureLimit(addresses="2/minute", credentials=None, everywhere=None),
            BearerAuth(issuers=[mint.issuer]),
            ApiKeyAuth(store=mint.key_store, pepper=mint.pepper),
            Revocation(store=revocations),
            RateLimit(tiers={"free": "3/hour"}),
        )
    )
    with frozen() as clock:
        key = mint.auth_headers("job", kind="key", lifetime=600)
        assert client.get("/whoami", headers=key).status_code == 200
        clock.advance(599)
        assert client.get("/whoami", headers=key).status_code == 200
        clock.advance(2)
        assert_problem(client.get("/whoami", headers=key), "AUTH_005")
        clock.advance(120)
        wrong = mint.auth_headers(aud="others")
        statuses = [client.get("/whoami", headers=wrong).status_code for _ in range(4)]
        assert statuses == [401, 401, 429, 429]
        clock.advance(61)
        assert client.get("/whoami", headers=wrong).status_code == 401
        clock.advance(120)
        token = mint.auth_headers("ann", lifetime=7_200)
        assert client.get("/whoami", headers=token).status_code == 200
        anyio.run(partial(revocations.revoke, subject="ann", until=clock.time() + 30))
        assert client.get("/whoami", headers=token).status_code == 401
        clock.advance(29)
        assert client.get("/whoami", headers=token).status_code == 401
        clock.advance(120)
        assert client.get("/whoami", headers=token).status_code == 200
        assert client.get("/whoami", headers=token).status_code == 200
        assert_problem(client.get("/whoami", headers=token), "RATE_001")
        clock.advance(3_600)
        assert client.get("/whoami", headers=token).status_code == 200
        clock.advance(3_600)
        assert_problem(client.get("/whoami", headers=token), "AUTH_002")


# --- faults ----------------------------------------------------------------------------------------------------------


async def ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def test_a_store_of_limits_that_fails_on_command() -> None:
    store = Faulty(memory_limits("fixed"))
    closed = PolicyStack(ok, policies=[RateLimit(store=store, tiers={"free": "100/minute"})])
    opened = PolicyStack(ok, policies=[RateLimit(store=store, on_store_loss="open")])
    assert (await drive(closed)).status == 200
    store.away(retry_after=7)
    assert (await drive(closed)).status == 503
    assert (await drive(opened)).status == 200
    store.back()
    assert (await drive(closed)).status == 200
    assert set(store.calls) == {"admit"}
    await store.aclose()
    assert store.closed


async def test_every_fault() -> None:
    store = Faulty(MemorySlots())
    store.away(3.0)
    with pytest.raises(StoreUnavailableError) as away:
        await store.take((), 1.0, 0.0)
    assert (away.value.retry_after, away.value.unsent) == (3.0, True)
    store.raises(ValueError("nonsense"))
    with pytest.raises(ValueError, match="nonsense"):
        await store.take((), 1.0, 0.0)
    store.answers("nonsense")
    assert await store.take((), 1.0, 0.0) == "nonsense"
    store.hangs()
    with anyio.move_on_after(0.05) as limit:
        await store.take((), 1.0, 0.0)
    assert limit.cancelled_caught
    store.slow(0.02)
    began = time.monotonic()
    await store.take((), 1.0, 0.0)
    assert time.monotonic() - began >= 0.02
    assert store.hold((), 1.0).open, "what never waits is not delayed"
    assert store.calls == ["take"] * 5
    assert "Faulty(MemorySlots" in repr(store)


async def test_keys_slots_and_revocations_that_fail() -> None:
    mint = Mint()
    keys, slots, revocations = Faulty(mint.key_store), Faulty(MemorySlots()), Faulty(MemoryRevocations())
    headers = mint.auth_headers(kind="key")
    with_keys = PolicyStack(ok, policies=[ApiKeyAuth(store=keys, pepper=mint.pepper, deadline=0.05)])
    for command in (keys.away, lambda: keys.raises(RuntimeError()), lambda: keys.answers("x"), keys.hangs):
        command()
        assert (await drive(with_keys, headers=headers)).status == 503
    keys.back()
    patient = PolicyStack(ok, policies=[ApiKeyAuth(store=keys, pepper=mint.pepper, deadline=60)])
    assert (await drive(patient, headers=headers)).status == 200
    slots.away()
    assert (await drive(PolicyStack(ok, policies=[ConcurrencyLimit(limits=5, store=slots)]))).status == 503
    policies = [ApiKeyAuth(store=mint.key_store, pepper=mint.pepper), Revocation(store=revocations, stale_for=1.0)]
    stack = PolicyStack(ok, policies=policies, clock=FrozenClock())
    revocations.away()
    assert (await drive(stack, headers=headers)).status == 503
    revocations.back()
    assert (await drive(stack, headers=headers)).status == 200


# --- the assertion ---------------------------------------------------------------------------------------------------


async def test_a_problem_of_any_kind_of_response() -> None:
    app = PolicyStack(ok, policies=[Problems(), BearerAuth(issuers=[Mint().issuer], required=True)])
    answer = TestClient(app).get("/")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client:
        for found in (answer, await client.get("/")):
            assert assert_problem(found, "AUTH_001", status=401)["title"] == "AuthenticationRequiredError"
    assert assert_problem(await drive(app), "AUTH_001", instance="/")
    with pytest.raises(TypeError, match="a response of TestClient"):
        assert_problem({"status": 401}, "AUTH_001")


@pytest.mark.parametrize("language", ["de", "fr"])
def test_a_problem_that_was_translated_and_compressed_on_its_way(language: str) -> None:
    messages = {"de": {"AUTH_001": "Anmeldung n\u00f6tig"}}
    app = PolicyStack(ok, policies=[Problems(messages=messages), BearerAuth(issuers=[Mint().issuer], required=True)])
    client = TestClient(GZipMiddleware(app, minimum_size=10))
    answer = client.get("/", headers={"accept-language": language})
    assert answer.headers["content-encoding"] == "gzip"
    title = "Anmeldung n\u00f6tig" if language == "de" else "AuthenticationRequiredError"
    assert assert_problem(answer, "AUTH_001")["title"] == title


def response(**changes: Any) -> Any:
    body = {
        "type": "https://e.example/auth-001", "title": "AuthenticationRequiredError", "status": 401, "instance": "/",
        "error_code": "AUTH_001", "timestamp": "2026-01-01T00:00:00Z", "retry_after": 5,
    }  # fmt: skip
    headers = {"content-type": "application/problem+json", "cache-control": "no-store", "retry-after": "5"}
    members = {key: value for key, value in {**body, **changes.get("body", {})}.items() if value is not None}
    made = {key: value for key, value in {**headers, **changes.get("headers", {})}.items() if value is not None}
    if "content" in changes:
        return httpx2.Response(401, headers=made, content=changes["content"])
    return httpx2.Response(changes.get("status", 401), headers=made, json=members)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"status": 403}, "the status is 403, not 401"),
        ({"headers": {"content-type": "application/json"}}, "the media type is 'application/json'"),
        ({"headers": {"cache-control": None}}, "a cache may keep"),
        ({"headers": {"retry-after": "9"}}, "Retry-After is 9"),
        ({"body": {"error_code": "AUTH_002"}}, "error_code is 'AUTH_002', not 'AUTH_001'"),
        ({"body": {"status": 403}}, "the body says status 403, and the response 401"),
        ({"body": {"title": "Other"}}, "registered as 'AuthenticationRequiredError'"),
        ({"body": {"instance": None}}, "'instance' is missing"),
        ({"body": {"detail": ["a"]}}, "detail is a string"),
        ({"body": {"trace_id": None}}, "the member 'trace_id' is missing"),
        ({"content": b"<html>"}, "no JSON object"),
        ({"content": b"[]"}, "no JSON object"),
    ],
)
def test_what_is_wrong_is_said(changes: Any, words: str) -> None:
    assert_problem(response(), "AUTH_001", retry_after=5)
    members = {"trace_id": "x"} if "trace_id" in words else {}
    with pytest.raises(AssertionError, match=r"expected the problem AUTH_001") as failed:
        assert_problem(response(**changes), "AUTH_001", **members)
    assert words in str(failed.value)


# --- the plugin ------------------------------------------------------------------------------------------------------

USE = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

import pytest
from sigil_policy import ApiKeyAuth, BearerAuth, PolicyStack, Problems, RateLimit, Scopes, memory_limits
from sigil_policy.testing import drive


def test_everything(
    sigil_clock, sigil_issuer, sigil_key_store, sigil_pepper, mint_token, mint_key, auth_headers, sigil_faulty,
    assert_problem,
):
    store = sigil_faulty(memory_limits("fixed"))
    policies = [
        Problems(), BearerAuth(issuers=[sigil_issuer]), ApiKeyAuth(store=sigil_key_store, pepper=sigil_pepper),
        Scopes(routes={"/": "a:read"}),
        RateLimit(tiers={"free": "2/minute"}, store=store),
    ]
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("ok"))])
    client = TestClient(PolicyStack(app, policies=policies))
    headers = auth_headers(scopes=["a:read"], tier="free")
    assert client.get("/", headers=headers).status_code == 200
    assert client.get("/", headers={"x-api-key": mint_key(scopes=["a:read"])}).status_code == 200
    assert_problem(client.get("/", headers={"authorization": f"Bearer {mint_token()}"}), "AUTH_004", status=403)
    client.get("/", headers=headers)
    assert_problem(client.get("/", headers=headers), "RATE_001")
    sigil_clock.advance(60)
    assert client.get("/", headers=headers).status_code == 200
    store.away()
    assert client.get("/", headers=headers).status_code == 503


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_in_an_event_loop(anyio_backend, sigil_clock, sigil_issuer, auth_headers, assert_problem):
    app = PolicyStack(PlainTextResponse("ok"), policies=[Problems(), BearerAuth(issuers=[sigil_issuer])])
    headers = auth_headers(lifetime=60)
    assert (await drive(app, headers=headers)).status == 200
    sigil_clock.advance(120)
    assert_problem(await drive(app, headers=headers), "AUTH_002")


def test_the_clock_goes_on_afterwards():
    import time
    from sigil_policy.core.clock import SYSTEM_CLOCK

    assert abs(SYSTEM_CLOCK.time() - time.time()) < 60
"""

LIGHT = """
import sys

def test_nothing_was_loaded():
    loaded = {name for name in sys.modules if name.startswith("sigil_policy")}
    assert loaded == {"sigil_policy", "sigil_policy.testing", "sigil_policy.testing.plugin"}, loaded
    assert not {"starlette", "pydantic", "jwt", "structlog", "limits", "httpx2", "fastapi"} & set(sys.modules)
"""


def run_pytest(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    # Alone with this plugin: those of other packages that are installed here load what they like.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "sigil_policy.testing.plugin", *options]
    command += ["-o", "filterwarnings=error", "-p", "no:cacheprovider", "-p", "anyio", "test_it.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(("text", "passed"), [(USE, "4 passed"), (LIGHT, "1 passed")], ids=["used", "not used"])
def test_the_plugin_in_somebody_elses_run(tmp_path: Path, text: str, passed: str) -> None:
    done = run_pytest(tmp_path, text)
    assert done.returncode == 0 and passed in done.stdout, done.stdout + done.stderr


def test_it_is_registered_and_can_be_left_out() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"sigil_policy": "sigil_policy.testing.plugin"}


def test_names_load_on_first_use_and_are_all_there() -> None:
    import sigil_policy.testing as kit

    assert all(getattr(kit, name) is not None for name in kit.__all__)
    assert set(kit.__all__) <= set(dir(kit))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kit.nothing


OPTIMIZED = """
import anyio
from sigil_policy import Policy
from sigil_policy.stores.memory import FixedWindows
from sigil_policy.stores.replays import MemoryReplays
from sigil_policy.testing import assert_problem, check_limit_store, check_policy, check_store, connect, drive, validated


class Forgets(MemoryReplays):
    def claim(self, name, seconds, now):
        return True


class Generous(FixedWindows):
    def admit(self, key, plan, cost, estimate, now):
        return super().admit(key, plan, 0, estimate, now)


class Capitals(Policy):
    def on_response(self, ex, head):
        head.headers.append((b"X-A", b"1"))


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"1"), (b"a", b"2")]})


async def talks():
    async with connect(app, kind="http") as exchange:
        await exchange.receive("http.response.body")


async def main():
    if __debug__:
        raise SystemExit("not optimized")
    sent = await drive(app)
    for ask in (
        lambda: check_store(Forgets), lambda: check_limit_store(Generous, algorithm="fixed"),
        lambda: check_policy(Capitals()), lambda: drive(validated(app)), talks,
    ):
        try:
            await ask()
        except AssertionError as error:
            print(type(error).__name__, str(error)[:60])
    for ask in (lambda: sent.header("a"), lambda: assert_problem(sent, "AUTH_001")):
        try:
            ask()
        except AssertionError:
            print("told")


anyio.run(main)
"""


def test_what_is_run_with_optimization_still_tests() -> None:
    """`python -O` leaves every `assert` out: suites that consist of them would pass whatever they are given."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-O", "-B", "-c", OPTIMIZED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7, done.stdout
