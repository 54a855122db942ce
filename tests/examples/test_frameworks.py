"""One list of policies around Litestar, Quart, Django, Falcon and BlackSheep: the same answers from all of them."""

import importlib
import time
from itertools import count

import jwt
import pytest

from sigil_policy.testing import drive
from sigil_policy.testing.rules import broken_rules
from tests.served import served

SECRET = "0123456789abcdef0123456789abcdef"
FRAMEWORKS = ["litestar", "quart", "django", "falcon", "blacksheep"]
CALLERS = count(1)

# These frameworks run on asyncio.
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
def _secret():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", SECRET)
        yield importlib.import_module("examples.one_stack")


@pytest.fixture(params=FRAMEWORKS)
async def app(request):
    module = importlib.import_module(f"examples.{request.param}_app")
    if request.param == "blacksheep":
        await module.app.app.start()  # the lifespan does it
    return module.app


def token(*scopes, subject="ada"):
    claims = {
        "iss": "https://auth.example.com", "aud": "reports", "sub": subject, "scope": " ".join(scopes),
        "exp": int(time.time()) + 600,
    }  # fmt: skip
    return {"authorization": f"Bearer {jwt.encode(claims, SECRET, 'HS256')}"}


async def ask(app, method, path, headers=None):
    sent = await drive(served(app), method, path, headers={"host": "localhost", **(headers or {})})
    assert broken_rules(sent.messages) == []
    return sent


def someone(*scopes):
    """A caller whom no limit knows yet."""
    return token(*scopes, subject=f"caller-{next(CALLERS)}")


async def test_every_response_has_an_id(app):
    sent = await ask(app, "GET", "/")
    assert (sent.status, sent.json()) == (200, {"hello": "world"})
    assert len(sent.header("x-request-id")) == 36


async def test_a_route_with_a_scope_is_closed_to_nobody_and_to_others(app):
    sent = await ask(app, "GET", "/reports/5")
    assert (sent.status, sent.json()["error_code"]) == (401, "AUTH_001")
    assert sent.header_lines("www-authenticate")[0].startswith("Bearer")
    sent = await ask(app, "GET", "/reports/5", someone("other"))
    assert (sent.status, sent.json()["error_code"]) == (403, "AUTH_004")
    sent = await ask(app, "GET", "/reports/5", someone("reports:read"))
    assert (sent.status, sent.json()) == (200, {"share": 20.0})


async def test_the_impatient_are_refused_with_when_to_come_back(app):
    caller = someone("reports:read")
    for _ in range(41):  # more than two windows hold
        sent = await ask(app, "GET", "/reports/5", caller)
        if sent.status == 429:
            break
    assert (sent.status, sent.json()["error_code"]) == (429, "RATE_001")
    assert 1 <= int(sent.header("retry-after")) <= 60


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "REQ_404"),
        ("DELETE", "/reports/5", 405, "REQ_405"),
        ("GET", "/reports/0", 500, "SRV_500"),
    ],
)
async def test_what_the_framework_answers_itself_is_a_problem(app, method, path, status, code, request):
    if request.node.callspec.params["app"] == "blacksheep" and status == 405:
        status, code = 404, "REQ_404"  # BlackSheep says 404 for both
    sent = await ask(app, method, path, someone("reports:read"))
    assert (sent.status, sent.json()["error_code"], sent.json()["status"]) == (status, code, status)
    assert sent.header("content-type") == "application/problem+json"
    assert sent.header("content-length") == str(len(sent.body))
    assert sent.json()["request_id"] == sent.header("x-request-id")
    assert (status != 405) == (sent.header("allow") is None)
    assert sent.header("cache-control") == "no-store"


async def test_head_says_the_same_without_a_body(app):
    sent = await ask(app, "HEAD", "/nowhere", someone("reports:read"))
    assert (sent.status, sent.body) == (404, b"")
    assert sent.header("content-type") == "application/problem+json"


async def test_who_has_it_already_gets_304(app):
    tag = (await ask(app, "GET", "/")).header("etag")
    sent = await ask(app, "GET", "/", {"if-none-match": tag})
    assert (sent.status, sent.body, sent.header("etag")) == (304, b"", tag)


async def test_a_stream_is_not_touched(app):
    sent = await ask(app, "GET", "/stream")
    parts = [message["body"] for message in sent.messages[1:] if message.get("body")]
    assert (sent.status, parts) == (200, [b"one ", b"two ", b"three"])
    assert sent.header("etag") is None


async def test_nothing_of_the_exception_reaches_the_client(app):
    sent = await ask(app, "GET", "/reports/0", someone("reports:read"))
    assert b"division" not in sent.body
    assert b"Traceback" not in sent.body
