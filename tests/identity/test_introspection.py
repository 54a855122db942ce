"""Token introspection (RFC 7662): asked within bounds, read strictly, remembered for a while."""

import base64
import json
import logging
import socket
import time
from hashlib import sha256
from urllib.parse import parse_qs, unquote_plus

import anyio
import anyio.lowlevel
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from sigil_policy.identity.introspection import (
    ActiveToken,
    Introspection,
    IntrospectionUnavailableError,
    Introspector,
)
from sigil_policy.identity.tokens import TokenError
from sigil_policy.testing import FrozenClock
from tests.identity.endpoint import ENDPOINT, Endpoint
from tests.identity.material import AUDIENCE, NOW, SECRET, URL, good_claims, token

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(NOW)


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


async def ask(known: Introspector, presented: bytes, clock) -> ActiveToken:
    return await known.obtain(presented, sha256(presented).digest(), clock)


async def verdict(known: Introspector, presented: bytes, clock) -> str | int:
    """ "good", the reason of the refusal, or after how many seconds it is worth another try."""
    try:
        await ask(known, presented, clock)
    except TokenError as error:
        return error.reason
    except IntrospectionUnavailableError as error:
        return error.retry_after
    return "good"


def answering(**members) -> httpx2.Response:
    claims = {"active": True, **good_claims(**members)}
    return httpx2.Response(200, json={name: value for name, value in claims.items() if value is not None})


# --- how it is asked -------------------------------------------------------------------------------------------------


async def test_the_token_is_posted_as_a_form(endpoint, clock):
    """RFC 7662 section 2.1."""
    known = endpoint.introspection().introspector
    presented = endpoint.issue("a+b/c~d==")
    await ask(known, presented, clock)
    request = endpoint.requests[0]
    assert (request.method, str(request.url)) == ("POST", ENDPOINT)
    assert request.headers["content-type"] == "application/x-www-form-urlencoded"
    assert request.headers["accept"] == "application/json"
    assert parse_qs(request.content.decode()) == {"token": ["a+b/c~d=="], "token_type_hint": ["access_token"]}


@pytest.mark.parametrize("name", ["api", "a:b", "a b+c", "ä%3A", "https://api.example/x?y=1&z"])
@pytest.mark.parametrize("secret", ["s", "p:q", "100% &=+", "grün ☂"])
async def test_id_and_secret_arrive_as_they_are(endpoint, clock, name, secret):
    """RFC 6749 section 2.3.1: form-encoded, then joined by a colon, then base64."""
    presented = endpoint.issue()
    basic = endpoint.introspection(client_id=name, client_secret=SecretStr(secret))
    await ask(basic.introspector, presented, clock)
    scheme, _, encoded = endpoint.requests[0].headers["authorization"].partition(" ")
    pair = base64.b64decode(encoded, validate=True).decode("ascii")
    assert scheme == "Basic"
    assert [unquote_plus(part) for part in pair.split(":")] == [name, secret]
    assert b"client_secret" not in endpoint.requests[0].content

    post = endpoint.introspection(client_id=name, client_secret=SecretStr(secret), auth_method="client_secret_post")
    await ask(post.introspector, presented, clock)
    form = parse_qs(endpoint.requests[1].content.decode())
    assert (form["client_id"], form["client_secret"]) == ([name], [secret])
    assert "authorization" not in endpoint.requests[1].headers


async def test_a_bearer_token_in_their_place(endpoint, clock):
    known = endpoint.introspection(access_token=SecretStr("mF_9.B5f-4.1JqM")).introspector
    await ask(known, endpoint.issue(), clock)
    assert endpoint.requests[0].headers["authorization"] == "Bearer mF_9.B5f-4.1JqM"
    assert b"client" not in endpoint.requests[0].content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"client_id": None}, "client_id", id="no id"),
        pytest.param({"client_secret": None}, "client_id", id="no secret"),
        pytest.param({"client_id": None, "client_secret": None}, "access_token", id="neither"),
        pytest.param({"access_token": SecretStr("canary-t"), "client_id": "a"}, "place", id="a token and an id"),
        pytest.param(
            {"access_token": SecretStr("canary-t"), "client_id": "a", "client_secret": SecretStr(SECRET)},
            "place",
            id="both",
        ),
        pytest.param({"access_token": SecretStr("canary-t\r\nx: y")}, "6750", id="a header in the token"),
        pytest.param({"client_secret": SecretStr("")}, "client_secret", id="an empty secret"),
        pytest.param({"auth_method": "private_key_jwt"}, "client_secret_basic", id="another method"),
        pytest.param({"url": "http://auth.example.com/"}, "https", id="http"),
        pytest.param({"url": "http://127.0.0.1/"}, "allow_insecure_loopback", id="loopback, not allowed"),
        pytest.param({"url": "http://10.0.0.1/", "allow_insecure_loopback": True}, "https", id="not loopback"),
        pytest.param({"url": "https://user:canary-t@a/"}, "neither", id="a password in the url"),
        pytest.param({"url": "introspect"}, "URL", id="a path"),
        pytest.param({"issuer": ""}, "issuer", id="no issuer"),
        pytest.param({"issuer": "a b"}, "iss", id="no issuer's name"),
        pytest.param({"audience": []}, "empty", id="no audience"),
        pytest.param({"cache_seconds": -1}, "cache_seconds", id="negative"),
        pytest.param({"cache_seconds": float("nan")}, "cache_seconds", id="NaN"),
        pytest.param({"max_concurrent": 1}, "max_concurrent", id="one call for two kinds"),
        pytest.param({"transport": "socks5://proxy"}, "AsyncBaseTransport", id="no transport"),
        pytest.param({"keys": []}, "keys", id="unknown option"),
    ],
)
def test_a_wrong_configuration_fails_at_construction(endpoint, options, message):
    with pytest.raises(ValidationError, match=message) as caught:
        endpoint.introspection(**options)
    assert SECRET not in str(caught.value)
    assert "canary-t" not in str(caught.value)


def test_an_audience_has_to_be_named():
    with pytest.raises(ValidationError, match="audience"):
        Introspection(url=ENDPOINT, issuer=URL, client_id="a", client_secret=SecretStr(SECRET))


@pytest.mark.parametrize(
    ("presented", "taken"),
    [
        pytest.param(token(), False, id="a JWT"),
        pytest.param(b"a.b.", False, id="an unsigned one"),
        pytest.param(b"opaque", True, id="one part"),
        pytest.param(b"ory_at_x.y", True, id="two parts"),
        pytest.param(b"a.b.c.d.e", True, id="encrypted: five parts"),
        pytest.param(b"..", True, id="empty parts"),
        pytest.param(b"a.b.c=", True, id="no base64url"),
        pytest.param(b"a~.b.c", True, id="another alphabet"),
    ],
)
def test_what_looks_like_a_jwt_is_not_sent(endpoint, presented, taken):
    assert endpoint.introspection().takes(presented) is taken
    assert endpoint.introspection(introspect_jwts=True).takes(presented)


# --- what an answer means --------------------------------------------------------------------------------------------


async def test_an_answer_becomes_a_principal(endpoint, clock):
    presented = endpoint.issue(client_id="web", tier=None, aud=["other", AUDIENCE])
    introspection = endpoint.introspection(client_tiers={"web": "pro"})
    found = await ask(introspection.introspector, presented, clock)
    principal = found.principal(introspection, "api")
    assert (principal.subject, principal.kind, principal.issuer, principal.realm) == ("user_123", "bearer", URL, "api")
    assert principal.scopes == {"agents:read", "agents:write"}
    assert (principal.tier, principal.expires) == ("pro", NOW + 3600)
    assert principal.claims["aud"] == ("other", AUDIENCE)
    with pytest.raises(TypeError):
        principal.claims["sub"] = "root"
    assert found.principal(introspection, "api") is principal
    assert found.principal(introspection, "other").realm == "other"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        pytest.param({}, "good", id="all of them"),
        pytest.param({"iss": None, "iat": None, "scope": None, "tier": None}, "good", id="what may be missing"),
        pytest.param({"iss": f"{URL}/"}, "iss", id="iss: nearly"),
        pytest.param({"iss": [URL]}, "iss", id="iss: an array"),
        pytest.param({"aud": None}, "aud", id="aud: missing"),
        pytest.param({"aud": "other"}, "aud", id="aud: another"),
        pytest.param({"aud": {AUDIENCE: 1}}, "aud", id="aud: an object"),
        pytest.param({"aud": [AUDIENCE, 7]}, "aud", id="aud: with a number"),
        pytest.param({"exp": None}, "exp", id="exp: missing"),
        pytest.param({"exp": int(NOW)}, "expired", id="exp: now"),
        pytest.param({"exp": str(int(NOW) + 60)}, "exp", id="exp: a string"),
        pytest.param({"exp": 1e300}, "exp", id="exp: beyond the year 9999"),
        pytest.param({"nbf": int(NOW) + 1}, "early", id="nbf"),
        pytest.param({"nbf": True}, "nbf", id="nbf: a bool"),
        pytest.param({"iat": int(NOW) + 1}, "early", id="iat"),
        pytest.param({"scope": ["agents:read"]}, "scope", id="scope: an array"),
        pytest.param({"sub": 7}, "sub", id="sub: a number"),
        pytest.param({"sub": "", "client_id": "web"}, "sub", id="sub: empty is not missing"),
        pytest.param({"sub": None, "client_id": "web"}, "good", id="sub: the client for itself"),
        pytest.param({"sub": None, "username": "ann"}, "sub", id="sub: never the username"),
        pytest.param({"sub": None, "client_id": "a\nb"}, "sub", id="sub: a control"),
        pytest.param({"token_type": "bearer"}, "good", id="token_type: without case"),
        pytest.param({"token_type": "refresh_token"}, "token_type", id="token_type: another"),
        pytest.param({"token_type": ["Bearer"]}, "token_type", id="token_type: an array"),
        pytest.param({"token_type": "DPoP"}, "cnf", id="token_type: DPoP without a key"),
        pytest.param({"token_type": "DPoP", "cnf": {"jkt": 7}}, "cnf", id="token_type: DPoP, no key"),
        pytest.param({"token_type": "DPoP", "cnf": {"jkt": "0ZcOCORZNYy"}}, "good", id="token_type: DPoP"),
        pytest.param({"jti": "a", "x": {"deep": [1, {"er": None}]}}, "good", id="unknown members"),
    ],
)
async def test_a_member_that_is_there_must_be_right(endpoint, clock, members, expected):
    """RFC 7662 section 2.2."""
    endpoint.answer = answering(**members)
    assert await verdict(endpoint.introspection().introspector, b"t", clock) == expected


@pytest.mark.parametrize("active", [{}, {"active": False}, {"active": "true"}, {"active": 1}, {"active": None}])
def test_nothing_is_read_of_what_is_not_active(endpoint, active):
    with pytest.raises(ValueError, match="inactive"):
        endpoint.introspection().read({**good_claims(), **active})


async def test_what_a_client_does_for_itself_is_done_by_the_client(endpoint, clock):
    endpoint.answer = answering(sub=None, client_id="nightly-job", username="ann")
    found = await ask(endpoint.introspection().introspector, b"t", clock)
    assert found.reading.subject == "nightly-job"


async def test_a_token_without_end_is_taken_by_option_only(endpoint, clock):
    endpoint.answer = answering(exp=None)
    introspection = endpoint.introspection(accept_tokens_without_end=True)
    found = await ask(introspection.introspector, b"t", clock)
    assert found.principal(introspection, "api").expires is None
    bounded = endpoint.introspection(accept_tokens_without_end=True, max_lifetime=600)
    assert await verdict(bounded.introspector, b"t", clock) == "lifetime"
    endpoint.answer = answering(exp="never")
    assert await verdict(introspection.introspector, b"u", clock) == "exp", "there, it must be right"


async def test_without_an_audience_answers_may_name_none(endpoint, clock):
    endpoint.answer = answering(aud=None)
    assert await verdict(endpoint.introspection(audience=None).introspector, b"t", clock) == "good"
    endpoint.answer = answering()
    assert await verdict(endpoint.introspection(audience=None).introspector, b"t", clock) == "aud"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        pytest.param(httpx2.Response(200, json={}), "without saying", id="no active"),
        pytest.param(httpx2.Response(200, json={"active": "true"}), "without saying", id="active: a string"),
        pytest.param(httpx2.Response(200, json={"active": 1}), "without saying", id="active: a number"),
        pytest.param(httpx2.Response(200, json=[True]), "no JSON object", id="an array"),
        pytest.param(httpx2.Response(200, content=b"", headers=JSON), "no JSON object", id="nothing"),
        pytest.param(
            httpx2.Response(200, content=b'{"active":false,"active":true}', headers=JSON),
            "no JSON object",
            id="a duplicate member",
        ),
        pytest.param(httpx2.Response(200, content=b'{"active":' * 3_000, headers=JSON), "more than", id="too long"),
        pytest.param(httpx2.Response(200, content=b'{"a":' * 3_000, headers=JSON), "no JSON object", id="nesting"),
        pytest.param(httpx2.Response(200, html="<p>canary</p>"), "not application/json", id="HTML"),
        pytest.param(
            httpx2.Response(200, content=b"e30.e30.", headers={"content-type": "application/token-introspection+jwt"}),
            "not application/json",
            id="RFC 9701",
        ),
        pytest.param(
            httpx2.Response(200, content=b'{"active":true}', headers={"content-type": "application/jsonp"}),
            "not application/json",
            id="another type that begins so",
        ),
        pytest.param(
            httpx2.Response(200, content=b"", headers={**JSON, "content-encoding": "gzip"}), "compressed", id="a bomb"
        ),
        pytest.param(httpx2.Response(204), "answers 204", id="204"),
        pytest.param(httpx2.Response(400), "answers 400", id="400"),
        pytest.param(httpx2.Response(403), "refuses this service", id="403"),
        pytest.param(httpx2.Response(500), "answers 500", id="500"),
        pytest.param(httpx2.Response(302, headers={"location": "https://evil.example/"}), "answers 302", id="302"),
        pytest.param(httpx2.Response(307, headers={"location": ENDPOINT}), "answers 307", id="307 on the same host"),
    ],
)
async def test_an_answer_that_is_none_is_no_refusal_and_concerns_its_token(endpoint, clock, caplog, answer, complaint):
    known = endpoint.introspection().introspector
    endpoint.failing["odd"] = answer
    for _ in range(10):
        assert await verdict(known, b"odd", clock) == 5
    assert endpoint.hits == ["odd"], "asked once per `retry`"
    assert complaint in caplog.text
    assert "canary" not in caplog.text
    assert await verdict(known, endpoint.issue(), clock) == "good", "nobody else has to wait"
    clock.advance(5)
    del endpoint.failing["odd"]
    assert await verdict(known, endpoint.issue("odd"), clock) == "good"


members = st.dictionaries(
    st.sampled_from(["active", "iss", "aud", "exp", "nbf", "iat", "sub", "scope", "client_id", "token_type", "cnf"]),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text()
        | st.sampled_from([URL, AUDIENCE, "Bearer", "DPoP", int(NOW) + 60]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    ),
)


@given(
    st.one_of(
        st.binary(max_size=200),
        members.map(lambda found: json.dumps(found).encode()),
        members.map(lambda found: json.dumps({"active": True, **good_claims(), **found}).encode()),
    )
)
def test_whatever_is_answered_there_is_a_verdict(body):
    """And "good" only where everything that is there is right."""
    endpoint = Endpoint()
    endpoint.answer = httpx2.Response(200, content=body, headers=JSON)
    found = anyio.run(verdict, endpoint.introspection().introspector, b"t", FrozenClock(NOW))
    if found == "good":
        claims = json.loads(body)
        assert claims["active"] is True
        assert claims.get("iss", URL) == URL
        assert AUDIENCE in claims["aud"]
        assert claims["exp"] > NOW


# --- what is remembered ----------------------------------------------------------------------------------------------


async def test_an_active_token_is_asked_about_once_per_cache_seconds(endpoint, clock):
    known = endpoint.introspection(cache_seconds=30).introspector
    presented = endpoint.issue()
    for _ in range(100):
        await ask(known, presented, clock)
    clock.advance(29.9)
    await ask(known, presented, clock)
    assert len(endpoint.hits) == 1
    endpoint.revoke(presented)
    clock.advance(0.1)
    assert await verdict(known, presented, clock) == "inactive"
    assert len(known._active) == 0


async def test_the_time_counts_from_the_question(endpoint, clock):
    """A revocation that happens while the answer is on its way is not missed for longer."""
    known = endpoint.introspection(cache_seconds=10).introspector
    presented = endpoint.issue()
    endpoint.hold = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, known, presented, clock)
        await anyio.wait_all_tasks_blocked()
        clock.advance(2)
        endpoint.hold.set()
    clock.advance(7.9)
    await ask(known, presented, clock)
    assert len(endpoint.hits) == 1
    clock.advance(0.1)
    await ask(known, presented, clock)
    assert len(endpoint.hits) == 2


async def test_no_answer_outlives_its_token(endpoint, clock):
    known = endpoint.introspection(cache_seconds=3_600, stale_if_error=3_600).introspector
    presented = endpoint.issue(exp=int(NOW) + 10)
    await ask(known, presented, clock)
    clock.advance(9.9)
    await ask(known, presented, clock)
    assert len(endpoint.hits) == 1
    clock.advance(0.1)
    endpoint.down = True
    assert await verdict(known, presented, clock) == 5, "nor where the endpoint fails"
    endpoint.down = False
    clock.advance(5)
    assert await verdict(known, presented, clock) == "expired"


async def test_a_clock_that_is_set_back_gives_no_token_more_time(endpoint, clock):
    known = endpoint.introspection(cache_seconds=30).introspector
    presented = endpoint.issue(iat=None)
    await ask(known, presented, clock)
    endpoint.revoke(presented)
    for _ in range(3):
        clock.jump(-3_600)
        clock.advance(10)
    assert await verdict(known, presented, clock) == "inactive"


async def test_a_clock_that_is_set_back_makes_no_token_valid_too_early(endpoint, clock):
    known = endpoint.introspection().introspector
    presented = endpoint.issue(nbf=int(NOW) - 5)
    await ask(known, presented, clock)
    clock.jump(-60)
    assert await verdict(known, presented, clock) == "early"


async def test_with_nothing_remembered_each_request_asks(endpoint, clock):
    known = endpoint.introspection(cache_seconds=0, refused_seconds=0).introspector
    presented = endpoint.issue()
    for _ in range(3):
        await ask(known, presented, clock)
        assert await verdict(known, b"wrong", clock) == "inactive"
    assert len(endpoint.hits) == 6
    endpoint.revoke(presented)
    assert await verdict(known, presented, clock) == "inactive"


async def test_a_refusal_is_remembered_for_a_short_time(endpoint, clock):
    known = endpoint.introspection(refused_seconds=10).introspector
    for _ in range(100):
        assert await verdict(known, b"late", clock) == "inactive"
    assert len(endpoint.hits) == 1
    clock.advance(10)
    assert await verdict(known, endpoint.issue("late"), clock) == "good"


async def test_refusals_push_out_no_good_answer_and_are_bounded(endpoint, clock):
    known = endpoint.introspection(cache_size=100, burst=100_000, rate=10_000).introspector
    good = [endpoint.issue(f"good-{number}") for number in range(50)]
    for presented in good:
        await ask(known, presented, clock)
    for number in range(300):
        assert await verdict(known, b"invented-%d" % number, clock) == "inactive"
    asked = len(endpoint.hits)
    for presented in good:
        await ask(known, presented, clock)
    assert len(endpoint.hits) == asked
    assert len(known._others) <= 100


async def test_good_answers_are_bounded_and_those_in_use_stay(endpoint, clock):
    known = endpoint.introspection(cache_size=20, burst=100_000, rate=10_000).introspector
    used = endpoint.issue("used")
    await ask(known, used, clock)
    for number in range(200):
        await ask(known, endpoint.issue(f"t-{number}"), clock)
        await ask(known, used, clock)
    assert len(known._active) <= 20
    assert endpoint.hits.count("used") == 1


async def test_no_token_is_kept(endpoint, clock):
    known = endpoint.introspection().introspector
    await ask(known, endpoint.issue("canary-token"), clock)
    await verdict(known, b"canary-wrong", clock)
    shown = repr([known._active._young, known._others._young, known])
    assert "canary" not in shown


# --- ahead of time ---------------------------------------------------------------------------------------------------


async def test_a_token_in_use_is_asked_about_ahead_of_time(endpoint, clock):
    known = endpoint.introspection(cache_seconds=10).introspector
    presented = endpoint.issue()
    digest = sha256(presented).digest()
    await ask(known, presented, clock)
    clock.advance(7.9)
    assert not known.is_due(digest, clock)
    clock.advance(0.1)
    assert known.is_due(digest, clock)
    await known.refresh(presented, digest, clock)
    await known.refresh(presented, digest, clock)
    assert len(endpoint.hits) == 2
    clock.advance(7)
    assert known.recall(digest, clock) is not None
    clock.advance(3)
    assert not known.is_due(digest, clock), "nobody has used it: whoever comes next asks"


async def test_a_refresh_that_fails_leaves_the_answer_its_time(endpoint, clock):
    known = endpoint.introspection(cache_seconds=10).introspector
    presented = endpoint.issue()
    digest = sha256(presented).digest()
    await ask(known, presented, clock)
    clock.advance(8)
    endpoint.down = True
    await known.refresh(presented, digest, clock)
    assert not known.is_due(digest, clock), "not asked again at once"
    assert await verdict(known, presented, clock) == "good"
    clock.advance(2)
    assert await verdict(known, presented, clock) == 3


async def test_a_refresh_that_learns_of_a_revocation_ends_the_token_at_once(endpoint, clock):
    known = endpoint.introspection(cache_seconds=10).introspector
    presented = endpoint.issue()
    digest = sha256(presented).digest()
    await ask(known, presented, clock)
    endpoint.revoke(presented)
    clock.advance(8)
    await known.refresh(presented, digest, clock)
    assert await verdict(known, presented, clock) == "inactive"


# --- while it fails --------------------------------------------------------------------------------------------------


async def test_an_endpoint_that_is_down_is_asked_once_per_retry(endpoint, clock):
    known = endpoint.introspection().introspector
    endpoint.down = True
    for number in range(50):
        assert await verdict(known, b"t-%d" % number, clock) == 5
    assert len(endpoint.hits) == 1
    clock.advance(4)
    assert await verdict(known, b"u", clock) == 1
    clock.advance(1)
    endpoint.down = False
    assert await verdict(known, endpoint.issue(), clock) == "good"


@pytest.mark.parametrize("status", [401, 429, 502, 503, 504])
@pytest.mark.parametrize(
    ("said", "wait"),
    [(None, 5), ("1", 5), ("20", 20), ("99999", 60), ("Mon, 23 Nov 2026 20:00:00 GMT", 5), ("-3", 5), ("٣٠", 5)],
)
async def test_an_endpoint_says_how_long_it_is_away(endpoint, clock, status, said, wait):
    known = endpoint.introspection().introspector
    headers = {} if said is None else {"retry-after": said.encode()}
    endpoint.answer = httpx2.Response(status, headers=headers)
    assert await verdict(known, b"t", clock) == wait
    assert await verdict(known, b"u", clock) == wait
    assert len(endpoint.hits) == 1


async def test_a_stale_answer_is_used_by_option_and_up_to_the_bound(endpoint, clock):
    known = endpoint.introspection(cache_seconds=10, stale_if_error=20).introspector
    presented = endpoint.issue()
    await ask(known, presented, clock)
    endpoint.down = True
    clock.advance(29.9)
    for _ in range(5):
        assert await verdict(known, presented, clock) == "good"
    assert len(endpoint.hits) == 2, "asked first, and once per `retry`"
    clock.advance(0.1)
    assert await verdict(known, presented, clock) == 5
    endpoint.down = False
    clock.advance(5)
    endpoint.revoke(presented)
    assert await verdict(known, presented, clock) == "inactive"


async def test_no_stale_answer_survives_a_refusal(endpoint, clock):
    known = endpoint.introspection(cache_seconds=10, refused_seconds=1, stale_if_error=86_400).introspector
    presented = endpoint.issue()
    await ask(known, presented, clock)
    endpoint.revoke(presented)
    clock.advance(10)
    assert await verdict(known, presented, clock) == "inactive"
    endpoint.down = True
    clock.advance(10)
    assert await verdict(known, presented, clock) == 5


async def test_without_the_option_nothing_stale_is_used(endpoint, clock):
    known = endpoint.introspection(cache_seconds=10).introspector
    presented = endpoint.issue()
    await ask(known, presented, clock)
    endpoint.down = True
    clock.advance(10)
    assert await verdict(known, presented, clock) == 5


async def test_credentials_that_are_refused_are_told_of_once(endpoint, clock, caplog):
    caplog.set_level(logging.DEBUG)
    known = endpoint.introspection().introspector
    endpoint.answer = httpx2.Response(401, json={"error": "invalid_client"})

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "sigil_policy"]

    for _ in range(10):
        await verdict(known, b"canary-token", clock)
        clock.advance(5)
    assert told() == [
        f"the introspection endpoint of {URL} refuses the credentials of this service (401)",
    ]
    endpoint.answer = None
    assert await verdict(known, b"canary-token", clock) == "inactive"
    assert told()[1:] == [f"the introspection endpoint of {URL} answers again"]
    assert SECRET not in caplog.text
    assert "canary" not in caplog.text


async def test_tokens_that_the_endpoint_cannot_bear_fill_no_log(endpoint, clock, caplog):
    known = endpoint.introspection(burst=10_000).introspector
    for number in range(200):
        odd = f"odd-{number}"
        endpoint.failing[odd] = httpx2.Response((400, 500)[number % 2])
        await verdict(known, odd.encode(), clock)
        await verdict(known, b"even-%d" % number, clock)
    assert len([record for record in caplog.records if record.name == "sigil_policy"]) <= 2


# --- a flood ---------------------------------------------------------------------------------------------------------


async def test_invented_tokens_cost_the_burst_and_the_rate(endpoint, clock):
    """Ten thousand within a hundred seconds."""
    known = endpoint.introspection(burst=20, rate=2).introspector
    waits = []
    for number in range(10_000):
        found = await verdict(known, b"invented-%d" % number, clock)
        if found != "inactive":
            waits.append(found)
        clock.advance(0.01)
    assert len(endpoint.hits) <= 20 + 2 * 100
    assert len(endpoint.hits) >= 200
    assert max(waits) <= 1


async def test_in_a_flood_those_who_are_known_go_on(endpoint, clock):
    known = endpoint.introspection(burst=5, rate=1, cache_seconds=1).introspector
    presented = endpoint.issue()
    await ask(known, presented, clock)
    for number in range(1_000):
        await verdict(known, b"invented-%d" % number, clock)
        assert await verdict(known, presented, clock) == "good"
        clock.advance(0.01)
    assert endpoint.hits.count("opaque-1") == pytest.approx(10, abs=1)


@pytest.mark.parametrize("answer", [httpx2.Response(503), None])
async def test_nobody_can_make_up_a_token_that_takes_the_endpoint_from_those_who_are_known(endpoint, clock, answer):
    known = endpoint.introspection(cache_seconds=1).introspector
    presented = endpoint.issue()
    await ask(known, presented, clock)
    clock.advance(1)
    if answer is None:
        endpoint.down = True
    else:
        endpoint.failing["poison"] = answer
    assert await verdict(known, b"poison", clock) == 5
    endpoint.down = False
    assert await verdict(known, presented, clock) == "good"


async def test_calls_on_their_way_are_bounded_and_half_are_for_those_who_are_known(endpoint, clock):
    known = endpoint.introspection(max_concurrent=4, cache_seconds=1).introspector
    presented = endpoint.issue()
    await ask(known, presented, clock)
    clock.advance(1)
    endpoint.hold = anyio.Event()
    endpoint.held = {f"invented-{number}" for number in range(50)}
    async with anyio.create_task_group() as tasks:
        for name in endpoint.held:
            tasks.start_soon(verdict, known, name.encode(), clock)
        await anyio.wait_all_tasks_blocked()
        assert endpoint.flying == 2
        with anyio.fail_after(20):
            assert await verdict(known, presented, clock) == "good"
        endpoint.hold.set()
    assert len(set(endpoint.hits)) == 51
    assert endpoint.most <= 4


async def test_who_stands_in_line_until_the_deadline_has_found_nothing_out(endpoint, clock, caplog):
    """A slow endpoint is not one that is away: those who had their turn have all the time that a call has."""

    async def slowly(request):
        await anyio.sleep(1.2)
        return await endpoint.handle(request)

    transport = httpx2.MockTransport(slowly)
    for _ in range(3):
        known = endpoint.introspection(max_concurrent=2, deadline=1.8, transport=transport).introspector
        found = {}
        endpoint.hits.clear()
        caplog.clear()

        async def see(number: int, known=known, found=found) -> None:
            found[number] = await verdict(known, endpoint.issue(f"t-{number}"), clock)

        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(see, number)
        if sorted(found.values(), key=str) == [1, "good", "good"]:
            break  # else the machine may have stood still: once more
    assert sorted(found.values(), key=str) == [1, "good", "good"]
    assert len(endpoint.hits) == 2
    assert "introspection" not in " ".join(r.getMessage() for r in caplog.records if r.name == "sigil_policy")
    assert await verdict(known, endpoint.issue("next"), clock) == "good", "nobody rests"


async def test_the_line_is_bounded(endpoint, clock, monkeypatch):
    monkeypatch.setattr("sigil_policy.identity.introspection._LINE", 3)
    known = endpoint.introspection().introspector
    endpoint.hold = anyio.Event()
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(verdict, known, b"t-%d" % number, clock)
        await anyio.wait_all_tasks_blocked()
        assert await verdict(known, b"one more", clock) == 1
        endpoint.hold.set()
    assert await verdict(known, b"one more", clock) == "inactive", "and they leave it"


# --- one call for all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_seconds", [0, 30])
async def test_a_hundred_who_wait_share_one_call(endpoint, clock, cache_seconds):
    known = endpoint.introspection(cache_seconds=cache_seconds, burst=1).introspector
    presented = endpoint.issue()
    endpoint.hold = anyio.Event()
    good = []

    async def wait() -> None:
        good.append(await ask(known, presented, clock))

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        endpoint.hold.set()
    assert len(good) == 100
    assert len(endpoint.hits) == 1


async def test_those_who_leave_take_nothing_from_those_who_stay(endpoint, clock):
    known = endpoint.introspection(burst=1).introspector
    presented = endpoint.issue()
    endpoint.hold = anyio.Event()
    leaving, arrived = [], []

    async def wait() -> None:
        arrived.append(await ask(known, presented, clock))

    async def leave() -> None:
        with anyio.CancelScope() as scope:
            leaving.append(scope)
            await wait()

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(leave)
        await anyio.wait_all_tasks_blocked()
        for _ in range(10):
            tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        for scope in leaving:
            scope.cancel()
        await anyio.wait_all_tasks_blocked()
        endpoint.hold.set()
    assert len(endpoint.hits) == 1
    assert len(arrived) >= 10
    assert await verdict(known, presented, clock) == "good"


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("leave", ["cancel", "timeout"])
async def test_clients_that_leave_cannot_end_a_call(endpoint, leave, clock):
    """What asyncio cancels is a task, and no scope shields from that."""
    import asyncio

    known = endpoint.introspection().introspector
    presented = endpoint.issue()
    endpoint.hold = anyio.Event()

    async def give_up() -> None:
        async with asyncio.timeout(0):
            await ask(known, presented, clock)

    for _ in range(10):
        leaving = asyncio.create_task(ask(known, presented, clock) if leave == "cancel" else give_up())
        await anyio.wait_all_tasks_blocked()
        leaving.cancel()
        with pytest.raises((asyncio.CancelledError, TimeoutError)):
            await leaving
    endpoint.hold.set()
    assert await verdict(known, presented, clock) == "good"
    assert len(endpoint.hits) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_call_that_the_event_loop_kills_is_made_again_by_who_waits(endpoint, begun, clock):
    import asyncio

    known = endpoint.introspection().introspector
    presented = endpoint.issue()
    endpoint.hold = anyio.Event()
    waiting = [asyncio.create_task(ask(known, presented, clock)) for _ in range(2)]
    await asyncio.sleep(0)
    if begun:
        await anyio.wait_all_tasks_blocked()
    for flight in known._here().flights.values():
        flight.task.cancel()
    endpoint.hold.set()
    await asyncio.gather(*waiting)
    assert len(endpoint.hits) == (2 if begun else 1)
    assert not known._here().flights


def test_a_call_that_ended_with_its_event_loop_holds_nobody_up(endpoint, clock):
    known = endpoint.introspection(max_concurrent=2).introspector
    presented = endpoint.issue()
    endpoint.hold = anyio.Event()

    async def leave_some_behind() -> None:
        with anyio.move_on_after(0.05):
            async with anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(verdict, known, b"t-%d" % number, clock)

    async def obtain() -> None:
        endpoint.hold = None
        with anyio.fail_after(20):
            await ask(known, presented, clock)

    anyio.run(leave_some_behind)
    anyio.run(obtain)


async def test_closing_waits_for_calls_and_closes_the_transport(endpoint, clock):
    known = endpoint.introspection().introspector
    presented = endpoint.issue()
    endpoint.hold = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, known, presented, clock)
        await anyio.wait_all_tasks_blocked()
        tasks.start_soon(known.aclose)
        await anyio.wait_all_tasks_blocked()
        assert endpoint.closed == 0
        endpoint.hold.set()
    assert endpoint.closed == 1


async def test_a_transport_that_was_never_used_is_closed_too(endpoint):
    await endpoint.introspection().introspector.aclose()
    assert endpoint.closed == 1


def test_no_secret_is_in_a_repr(endpoint):
    for options in ({}, {"access_token": SecretStr(SECRET)}):
        introspection = endpoint.introspection(**options)
        assert SECRET not in repr(introspection) + repr(introspection.introspector)


# --- the wire --------------------------------------------------------------------------------------------------------


class Wire:
    """A server on loopback that sends what it is told, once per connection or for ever."""

    def __init__(self, *parts: bytes, keep: bool = False, hang: bool = False, pause: float = 0) -> None:
        self.parts, self.keep, self.hang, self.pause = parts, keep, hang, pause
        self.requests: list[bytes] = []
        self.connections = 0

    async def serve(self, *, task_status) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            task_status.started(f"http://127.0.0.1:{port}/introspect")
            await listener.serve(self._answer)

    async def _answer(self, stream) -> None:
        self.connections += 1
        async with stream:
            try:
                while True:
                    request = await stream.receive()
                    while b"token_type_hint" not in request:
                        request += await stream.receive()
                    self.requests.append(request)
                    for part in self.parts:
                        await stream.send(part)
                        if self.pause:
                            await anyio.sleep(self.pause)
                    if self.hang:
                        await anyio.sleep_forever()
                    if not self.keep:
                        return
            except (anyio.BrokenResourceError, anyio.EndOfStream):
                pass


def http(body: bytes, *, length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (length, body)


GOOD = http(json.dumps({"active": True, **good_claims()}).encode())


async def over_the_wire(wire: Wire, *presented: bytes, **options) -> tuple[list[str | int], float]:
    async with anyio.create_task_group() as tasks:
        url = await tasks.start(wire.serve)
        introspection = Introspection(
            url=url,
            issuer=URL,
            audience=AUDIENCE,
            client_id="api",
            client_secret=SecretStr(SECRET),
            allow_insecure_loopback=True,
            **{"deadline": 30, **options},
        )
        begun = time.monotonic()
        found = [await verdict(introspection.introspector, one, FrozenClock(NOW)) for one in presented]
        took = time.monotonic() - begun
        await introspection.introspector.aclose()
        tasks.cancel_scope.cancel()
    return found, took


async def test_it_is_asked_over_the_wire_and_the_connection_is_kept(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    wire = Wire(GOOD, keep=True)
    found, _ = await over_the_wire(wire, b"one", b"two", b"three")
    assert found == ["good"] * 3
    assert wire.connections == 1
    head, _, body = wire.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /introspect HTTP/1.1\r\n")
    assert b"accept-encoding: identity" in head.lower()
    assert b"authorization: basic " in head.lower()
    assert body == b"token=one&token_type_hint=access_token"


async def test_a_connection_that_the_endpoint_has_closed_costs_no_request():
    wire = Wire(GOOD)
    found, _ = await over_the_wire(wire, b"one", b"two", b"three")
    assert found == ["good"] * 3


@pytest.mark.parametrize("error", [httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError])
@pytest.mark.parametrize(("times", "expected"), [(1, "good"), (2, 5)])
async def test_a_call_that_a_closed_connection_took_with_it_is_made_once_more(endpoint, clock, error, times, expected):
    presented = endpoint.issue()
    calls = []

    async def handle(request):
        calls.append(request)
        if len(calls) <= times:
            raise error("closed")
        return await endpoint.handle(request)

    known = endpoint.introspection(transport=httpx2.MockTransport(handle)).introspector
    assert await verdict(known, presented, clock) == expected
    assert len(calls) == 2


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(Wire(hang=True), id="says nothing"),
        pytest.param(Wire(http(b"{", length=100), hang=True), id="stops in the middle"),
        pytest.param(Wire(http(b"", length=10_000), *[b" "] * 1_000, pause=0.01), id="a byte at a time"),
    ],
)
async def test_a_slow_endpoint_is_left_at_the_deadline(wire, caplog):
    for _ in range(3):
        found, took = await over_the_wire(wire, b"one", b"two", deadline=0.3)
        assert found == [5, 5]
        assert "no answer within 0.3 seconds" in caplog.text
        if took < 2:
            break  # else the machine may have stood still: once more
    assert took < 2


async def test_a_huge_answer_is_not_read(caplog):
    for _ in range(3):
        found, took = await over_the_wire(Wire(http(b"", length=50_000_000), *[b" " * 65_536] * 760), b"one")
        assert found == [5]
        assert "more than 16384 bytes" in caplog.text
        if took < 2:
            break  # else the machine may have stood still: once more
    assert took < 2


async def test_a_port_that_nobody_listens_on_is_a_failure(endpoint, caplog, clock):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        introspection = endpoint.introspection(url=url, allow_insecure_loopback=True, transport=None)
        assert await verdict(introspection.introspector, b"t", clock) == 5
        await introspection.introspector.aclose()
    assert "cannot be reached" in caplog.text
