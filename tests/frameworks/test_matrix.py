"""Eight frameworks, one list of policies, the same results. What differs is in `EXCEPTIONS`, with its reason.

`.ci/run` runs this on the newest versions, and again on the lowest that the metadata promises (Starlette 1.7, FastAPI
0.137.2).
"""

import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from sigil_policy.testing import FrozenClock, connect, drive, frozen
from sigil_policy.testing.rules import broken_rules
from tests.frameworks.services import PASSWORD, SERVICES, django_urls, token
from tests.served import served

pytestmark = pytest.mark.anyio

EXCEPTIONS: dict[tuple[str, str], tuple[Any, str]] = {
    ("blacksheep", "405"): ((404, "REQ_404", None), "it has a 404 for what another method would find"),
    ("django", "ws"): (None, "it serves no WebSockets; Channels is an application of its own"),
    ("fastmcp", "ws"): (None, "it serves no WebSockets"),
}
"""(framework, row): what is so there, and why."""

CALLERS = count(1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"  # as most of these frameworks


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return {}


@pytest.fixture(params=SERVICES)
async def app(request: pytest.FixtureRequest, services: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    name = str(request.param)
    made = services.get(name)
    if made is None:
        made = services[name] = SERVICES[name]()
        if name == "django":
            services["urls"] = django_urls()
    if name == "blacksheep":
        await made.app.start()  # the lifespan does it
    if name == "django":
        from django.conf import settings
        from django.urls import clear_url_caches

        monkeypatch.setattr(settings, "ROOT_URLCONF", services["urls"])
        clear_url_caches()
    return made


@pytest.fixture
def framework(request: pytest.FixtureRequest, app: Any) -> str:
    return str(request.node.callspec.params["app"])


@pytest.fixture(autouse=True)
def _forget_djangos_urls() -> Iterator[None]:
    yield
    from django.urls import clear_url_caches

    clear_url_caches()


async def ask(app: Any, target: str, headers: dict[str, str] | None = None) -> Any:
    method, _, path = target.partition(" ")
    sent = await drive(served(app), method, path, headers={"host": "localhost", **(headers or {})}, raise_errors=False)
    assert broken_rules(sent.messages) == []
    return sent


def someone(*scopes: str) -> dict[str, str]:
    """A caller whom no limit knows yet."""
    return token(*scopes, subject=f"caller-{next(CALLERS)}")


async def test_id(app: Any) -> None:
    first, second = await ask(app, "GET /"), await ask(app, "GET /")
    assert (first.status, first.json()) == (200, {"hello": "world"})
    assert len({len(first.header("x-request-id")), len(second.header("x-request-id")), 36}) == 1
    assert first.header("x-request-id") != second.header("x-request-id")


async def test_auth(app: Any) -> None:
    sent = await ask(app, "GET /items/5")
    assert (sent.status, sent.json()["error_code"]) == (401, "AUTH_001")
    assert sent.header_lines("www-authenticate")[0].startswith("Bearer")
    forged = token("items:read")["authorization"][:-43] + "A" * 43
    assert (await ask(app, "GET /items/5", {"authorization": forged})).status == 401
    sent = await ask(app, "GET /items/5", someone("items:read"))
    assert (sent.status, sent.json()) == (200, {"number": 5})


async def test_scopes_by_route(app: Any) -> None:
    sent = await ask(app, "GET /items/5", someone("other"))
    assert (sent.status, sent.json()["error_code"]) == (403, "AUTH_004")
    assert (await ask(app, "GET /limited/5", someone("other"))).status == 200


async def test_limits_by_route(app: Any) -> None:
    with frozen(FrozenClock(time.time())):  # no minute ends in between
        caller = someone("items:read")
        assert [(await ask(app, f"GET /limited/{number}", caller)).status for number in range(3)] == [200, 200, 429]
        sent = await ask(app, "GET /limited/5", caller)
        assert (sent.json()["error_code"], 1 <= int(sent.header("retry-after")) <= 60) == ("RATE_001", True)
        assert (await ask(app, "GET /items/5", caller)).status == 200
        assert (await ask(app, "GET /limited/5", someone())).status == 200


@pytest.mark.parametrize(
    ("row", "target", "status", "code"),
    [
        ("404", "GET /nowhere", 404, "REQ_404"),
        ("405", "DELETE /items/5", 405, "REQ_405"),
        ("413", "GET /status/413", 413, "REQ_413"),
        ("422", "GET /status/422", 422, "REQ_422"),
        ("500", "GET /boom", 500, "SRV_500"),
    ],
)
async def test_errors_are_problems(app: Any, framework: str, row: str, target: str, status: int, code: str) -> None:
    allow = "GET" if row == "405" else None
    if (framework, row) in EXCEPTIONS:
        status, code, allow = EXCEPTIONS[framework, row][0]
    sent = await ask(app, target, someone("items:read"))
    body = sent.json()
    assert (sent.status, body["status"], body["error_code"]) == (status, status, code)
    assert sent.header("content-type") == "application/problem+json"
    assert sent.header("content-length") == str(len(sent.body))
    assert body["request_id"] == sent.header("x-request-id")
    assert PASSWORD.encode() not in sent.body
    assert allow is None or allow in sent.header("allow")


async def test_etag_and_304(app: Any) -> None:
    sent = await ask(app, "GET /")
    tag = sent.header("etag")
    again = await ask(app, "GET /", {"if-none-match": tag})
    assert (again.status, again.body, again.header("etag"), again.header("content-length")) == (304, b"", tag, None)
    assert (await ask(app, "GET /", {"if-none-match": '"other"'})).status == 200


async def test_a_stream_is_untouched(app: Any) -> None:
    sent = await ask(app, "GET /stream")
    parts = [message["body"] for message in sent.messages[1:] if message.get("body")]
    assert (sent.status, parts, sent.header("etag")) == (200, [b"one ", b"two ", b"three"], None)


async def test_a_websocket_is_refused(app: Any) -> None:
    """Whether or not there is one behind it: who may not come in is not told."""
    for headers, status in (({}, 401), (token("other"), 403)):
        sent = await drive(app, path="/ws", kind="websocket", headers=headers)
        assert (sent.status, sent.json()["status"]) == (status, status)
        assert [message["type"] for message in sent.messages] == [
            "websocket.http.response.start", "websocket.http.response.body",
        ]  # fmt: skip
        sent = await drive(app, path="/ws", kind="websocket", headers=headers, scope={"extensions": {}})
        assert [message["type"] for message in sent.messages] == ["websocket.close"]
        assert 4000 <= sent.messages[0]["code"] < 5000 or sent.messages[0]["code"] == 1008


async def test_a_websocket_is_accepted(app: Any, framework: str) -> None:
    if (framework, "ws") in EXCEPTIONS:
        return
    async with connect(app, "/ws", headers={"host": "localhost", **token("chat")}) as socket:
        await socket.send({"type": "websocket.connect"})
        if framework == "quart":
            await socket.send_text("hello")  # its socket is accepted by the first message that is sent
        accepted = await socket.receive("websocket.accept")
        assert b"x-request-id" in [name for name, _ in accepted["headers"]]
        if framework != "quart":
            await socket.send_text("hello")
        assert await socket.receive_text() == "hello"


def test_every_exception_has_a_reason_and_a_framework() -> None:
    assert {framework for framework, _ in EXCEPTIONS} <= set(SERVICES)
    assert all(len(reason) > 10 for _, reason in EXCEPTIONS.values())
