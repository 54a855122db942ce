"""Whatever is done to a token, an answer is all that comes out, and only what a key has signed, byte by byte, passes.

Two kinds of hostility: tokens that were changed after they had been signed, and claims and headers that the issuer's
own key has signed, with anything in them. Each goes through `BearerAuth` of a service with one issuer, with two (claims
are read before the signature there), and with a key set that is fetched (unknown ids are asked for there).
"""

import asyncio
import base64
import json
import os
import string

import httpx2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import KeySet
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.testing import FrozenClock, drive
from tests.identity.material import (
    AUDIENCE,
    NOW,
    URL,
    b64,
    good_claims,
    make_issuer,
    make_key,
    public_jwk,
    raw_token,
    token,
)

EXAMPLES = 400 if os.environ.get("CI") == "true" else 150
ALGORITHMS = ("HS256", "RS256", "ES256", "EdDSA")
SIGNED = {algorithm: token(algorithm=algorithm, header={"kid": algorithm}) for algorithm in ALGORITHMS}
OTHER = token(good_claims(sub="root"), header={"kid": "HS256"})


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


def _fetched() -> Issuer:
    body = {"keys": [public_jwk(name, kid=name, alg=name) for name in ALGORITHMS[1:]]}
    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json=body))
    return Issuer(
        url=URL, audience=AUDIENCE, leeway=0, keys=KeySet(f"{URL}/jwks.json", transport=transport, deadline=30)
    )


OURS = make_issuer(*(make_key(name, id=name) for name in ALGORITHMS), leeway=0)
UNNAMED = make_issuer(*(make_key(name) for name in ALGORITHMS), url="https://other.example", leeway=0)
SERVICES = {"one issuer": [OURS], "two issuers": [OURS, UNNAMED], "fetched keys": [_fetched()]}


async def reached(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


APPS = {
    name: PolicyStack(reached, policies=[BearerAuth(issuers=issuers, required=True)], clock=FrozenClock(NOW))
    for name, issuers in SERVICES.items()
}


def answers(loop, *values: bytes, kind: str = "http", but: str | None = None) -> set[int]:
    """The statuses of the services' answers; an exception that comes out of a stack comes out here."""

    async def ask() -> set[int]:
        headers = [("authorization", value) for value in values]
        sent = [await drive(app, headers=headers, kind=kind) for name, app in APPS.items() if name != but]
        return {200 if one.status == 101 else one.status for one in sent}

    return loop.run(ask())


# --- changed after it was signed -------------------------------------------------------------------------------------

WORDS = [
    b".",
    b"..",
    b"=",
    b"==",
    b"\0",
    b" ",
    b"\t",
    b"\r\n",
    b"%2e",
    b"+",
    b"/",
    b",",
    b'"',
    b"\xff\xfe",
    b"\xef\xbb\xbf",
]
WORDS += ["ﬀ".encode(), "\u2028".encode(), b"e30", b"bnVsbA", b"A" * 100]


@st.composite
def changes(draw, data: bytes) -> bytes:
    """`data` after one change."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    to = draw(st.integers(at, min(len(data), at + draw(st.sampled_from([1, 2, 8, 64, 1_000])))))
    match draw(st.sampled_from(("bit", "cut", "head", "tail", "word", "bytes", "twice", "swap", "case", "char"))):
        case "bit" if data:
            return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        case "cut":
            return data[:at] + data[to:]
        case "head":
            return data[at:]
        case "tail":
            return data[:at]
        case "word":
            return data[:at] + draw(st.sampled_from(WORDS)) + data[at:]
        case "bytes":
            return data[:at] + draw(st.binary(max_size=20)) + data[to:]
        case "twice":
            return data[:to] + data[at:]
        case "swap":
            return data[to:] + data[at:to] + data[:at]
        case "case":
            return data[:at] + data[at:to].swapcase() + data[to:]
        case _:
            letters = string.ascii_letters + string.digits + "-_"
            return data[:at] + draw(st.sampled_from(letters)).encode() + data[at + 1 :]


@st.composite
def parts_changed(draw, original: bytes) -> bytes:
    """Another header, payload or signature, in base64url as it should be."""
    parts = original.split(b".")
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(parts) - 1))
        match draw(st.sampled_from(("inside", "other", "drop", "again", "swap", "huge"))):
            case "inside":
                parts[at] = b64(draw(changes(_decoded(parts[at]))))
            case "other":
                parts[at] = draw(st.sampled_from([OTHER, *SIGNED.values()])).split(b".")[min(at, 2)]
            case "drop":
                parts[at] = b""
            case "again":
                parts.insert(at, parts[at])
            case "swap":
                parts[0], parts[at] = parts[at], parts[0]
            case _:
                parts[at] = (parts[at] * draw(st.sampled_from([2, 50, 1_000])))[:100_000]
    return b".".join(parts)


def _decoded(part: bytes) -> bytes:
    return base64.urlsafe_b64decode(part + b"=" * (-len(part) % 4))


@st.composite
def mutated(draw) -> tuple[bytes, bytes]:
    """A token of ours, and what has become of it."""
    original = changed = draw(st.sampled_from(list(SIGNED.values())))
    if draw(st.booleans()):
        changed = draw(parts_changed(changed))
    else:
        for _ in range(draw(st.integers(1, 3))):
            changed = draw(changes(changed))
    return original, changed


@settings(max_examples=EXAMPLES)
@given(case=mutated(), kind=st.sampled_from(["http", "websocket"]))
def test_a_token_that_was_changed_passes_only_if_it_is_still_the_same(loop, case, kind):
    original, changed = case
    answers(loop, b"Bearer " + original)  # remembered: what is like it is not it
    found = answers(loop, b"Bearer " + changed, kind=kind)
    # RFC 9110 section 11.4: any number of spaces follows the scheme.
    if changed.lstrip(b" ") in SIGNED.values() or changed.lstrip(b" ") == OTHER:
        assert 200 in found  # HS256 is of no fetched key
        assert found <= {200, 401}
    else:
        assert found <= {400, 401, 503}


@settings(max_examples=EXAMPLES)
@given(
    values=st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.sampled_from([b"Bearer ", b"bearer\t", b"Basic ", b"Bearer", b"DPoP "]).flatmap(
                lambda scheme: st.binary(max_size=200).map(lambda rest: scheme + rest)
            ),
            st.text(max_size=100).map(lambda text: b"Bearer " + text.encode("utf-8", "surrogatepass")),
        ),
        min_size=1,
        max_size=3,
    ),
    kind=st.sampled_from(["http", "websocket"]),
)
def test_arbitrary_headers_are_answered_and_nobody_passes(loop, values, kind):
    assert answers(loop, *values, kind=kind) <= {400, 401, 503}


@pytest.mark.parametrize("size", [8_000, 8_192, 8_193, 80_000, 1_000_000])
@pytest.mark.parametrize(
    "letter",
    [b"A", b".", b"=", b"\0", b" ", b"eyJhbGciOiJub25lIn0.", b"\xff"],
    ids=["A", "dots", "=", "nul", "spaces", "none", "ff"],
)
def test_giant_headers_are_answered_and_nobody_passes(loop, letter, size):
    giant = (letter * size)[:size]
    for value in (giant, b"Bearer " + giant, b"Bearer " + SIGNED["HS256"] + giant, giant + SIGNED["HS256"]):
        assert answers(loop, value, but="fetched keys" if value.startswith(b"Bearer ey") else None) <= {400, 401}


# --- hostile, and rightly signed -------------------------------------------------------------------------------------

NEVER, ALWAYS = False, True
JUNK = [None, True, False, 0, -1, 1.5, "", "x", [], {}, [None], {"a": 1}, [[["x"]]], "9" * 50]


def members(good: list, bad: list, *, absent: bool) -> st.SearchStrategy:
    """(value, whether it may be so); the value `...` is left out."""
    return st.sampled_from([(value, ALWAYS) for value in good] + [(value, NEVER) for value in bad] + [(..., absent)])


NOT_DATES = [value for value in JUNK if value is False or value not in (0, 1.5)]
LATER = int(NOW) + 3_600
SCOPE_OF_JUNK = [value for value in JUNK if value is not None and not isinstance(value, str)]
HOSTILE_CLAIMS = {
    "iss": members([URL], [*JUNK, URL + "/", URL.upper(), [URL], {"url": URL}], absent=NEVER),
    "aud": members(
        [AUDIENCE, [AUDIENCE], ["other", AUDIENCE], [AUDIENCE] * 3],
        [*JUNK, AUDIENCE.upper(), [AUDIENCE, 1], [[AUDIENCE]], {AUDIENCE: 1}, AUDIENCE + "\0"],
        absent=NEVER,
    ),
    "sub": members(
        ["user_123", "x" * 255, "user 123", "Ünïcødé", "日本語", "\U0001f600"],
        [
            *(value for value in JUNK if value not in ("x", "9" * 50)),
            "x" * 256, "a\nb", "a\0b", "\x1b[31mred", "\u202eevil", "\u2028", "\ud800", ["root"],
        ],
        absent=NEVER,
    ),
    "exp": members(
        [LATER, LATER + 0.5, 253_402_300_799, float(LATER)],
        [*JUNK, int(NOW), int(NOW) - 1, str(LATER), [LATER], 10**400, 1e308, LATER * 1_000, {"seconds": LATER}],
        absent=NEVER,
    ),
    "nbf": members([int(NOW), 0, 1.5, NOW - 0.25], [*NOT_DATES, LATER], absent=ALWAYS),
    "iat": members([int(NOW), 0, 1.5], [*NOT_DATES, LATER, str(int(NOW))], absent=ALWAYS),
    "scope": members(["", "a b", " a  b ", "a\nb", "é", None, "9" * 50, "\\"], SCOPE_OF_JUNK, absent=ALWAYS),
    "tier": members([*JUNK, "pro", "\0", "x" * 300, 10**400, {"deep": [{}]}], [], absent=ALWAYS),
    "azp": members([*JUNK, "\u202e", "x" * 1_000], [], absent=ALWAYS),
    "jti": members([*JUNK, "\n", "x" * 1_000], [], absent=ALWAYS),
    # Nobody has shown that the token is his (RFC 7800).
    "cnf": members([], [*JUNK, {"jkt": 1}, {"x5t#S256": "x"}], absent=ALWAYS),
    "__proto__": members([{"sub": "root"}], [], absent=ALWAYS),
    "": members(JUNK, [], absent=ALWAYS),
    "\ud7ff": members(JUNK, ["\udfff"], absent=ALWAYS),
}  # fmt: skip
HOSTILE_HEADER = {
    "typ": members(
        ["JWT", "jwt", "at+jwt", "application/AT+JWT"],
        [*JUNK, "JOSE", "dpop+jwt", "application/application/jwt", "jwt ", "\uff2a\uff37\uff34", ["JWT"]],
        absent=ALWAYS,
    ),
    "cty": members([*JUNK, "text"], ["JWT", "jwt", "application/jwt", "Application/JWT"], absent=ALWAYS),
    "crit": members([], [*JUNK, ["exp"], ["alg"]], absent=ALWAYS),
    "b64": members([], JUNK, absent=ALWAYS),
    "jku": members([*JUNK, "http://127.0.0.1:1/canary"], [], absent=ALWAYS),
    "jwk": members([*JUNK, {"kty": "oct", "k": "AA"}], [], absent=ALWAYS),
    "zip": members(["DEF", *JUNK], [], absent=ALWAYS),
    "x" * 100: members(JUNK, [], absent=ALWAYS),
}


FRAMES = [("", "", ALWAYS)] * 12 + [
    (" \n", "\t", ALWAYS),
    ("\ufeff", "", NEVER),
    ("", "\0", NEVER),
    ("", "{}", NEVER),
    ("[", "]", NEVER),
    ("//\n", "", NEVER),
    ("", ",", NEVER),
]


@st.composite
def objects(draw, good: dict, hostile: dict) -> tuple[bytes, bool]:
    """A JSON text, and whether it may pass: `good` with hostile members, in any order and spelling, some twice."""
    passes = True
    found = {**good}
    for name in draw(st.lists(st.sampled_from(list(hostile)), max_size=4, unique=True)):
        value, fits = draw(hostile[name])
        passes = passes and fits
        found.pop(name, None)
        if value is not ...:
            found[name] = value
    items = draw(st.permutations(list(found.items())))
    if draw(st.integers(0, 9)) == 0 and items:
        items.append((items[0][0], draw(st.sampled_from([items[0][1], "root"]))))
        passes = False
    text = "{" + ",".join(f"{_spelled(draw, name)}:{_text(value)}" for name, value in items) + "}"
    before, after, strict = draw(st.sampled_from(FRAMES))
    encoding = draw(st.sampled_from([*["utf-8"] * 27, "utf-16", "utf-16-le", "utf-32"]))
    data = (before + text + after).encode(encoding, "surrogatepass")
    return data, passes and strict and encoding == "utf-8"


def _spelled(draw, name: str) -> str:
    """The name as JSON, plainly or with an escape: both are the same name."""
    if name and name.isascii() and draw(st.integers(0, 9)) == 0:
        return f'"\\u{ord(name[0]):04x}{name[1:]}"'
    return json.dumps(name)


def _text(value) -> str:
    return json.dumps(value, allow_nan=True)


@settings(max_examples=2 * EXAMPLES)
@given(
    claims=objects(good_claims(), HOSTILE_CLAIMS),
    header=st.one_of(st.just((None, True)), objects({"alg": "EdDSA", "kid": "EdDSA"}, HOSTILE_HEADER)),
)
def test_claims_and_headers_that_were_signed_pass_exactly_where_the_standards_let_them(loop, claims, header):
    text, passes = header
    presented = raw_token(text if text is not None else '{"alg":"EdDSA","kid":"EdDSA"}', claims[0], "EdDSA")
    expected = 200 if passes and claims[1] else 401
    assert answers(loop, b"Bearer " + presented, but="two issuers") == {expected}
    # There claims are read within tighter bounds, and a number of 400 digits is beyond them.
    assert answers(loop, b"Bearer " + presented) <= {expected, 401}


LEAVES = st.sampled_from([*JUNK, URL, AUDIENCE, "user_123", LATER, "EdDSA", "jwt", -(10**30), 1e300, float("nan")])
VALUES = LEAVES | st.lists(LEAVES, max_size=3) | st.dictionaries(st.text(max_size=3), LEAVES, max_size=3)
NAMES = st.sampled_from([*good_claims(), "nbf", "alg", "kid", "typ", "cty", "crit"]) | st.text(max_size=5)
MEMBERS = st.dictionaries(NAMES, st.floats() | st.integers() | st.text(max_size=9) | VALUES, max_size=8)


@settings(max_examples=EXAMPLES)
@given(
    claims=MEMBERS,
    header=MEMBERS,
    over=st.booleans(),
)
@example(claims={"a": [[]] * 600}, header={}, over=True)
@example(claims={"a": list(range(1_000))}, header={}, over=True)
@example(claims={}, header={"a": "\\" * 1_000}, over=True)
@example(claims={"exp": 10**4_000}, header={}, over=True)
def test_any_json_that_was_signed_is_answered(loop, claims, header, over):
    """`over`: the good members are there, and only something else is odd."""
    claims = {**claims, **good_claims()} if over else claims
    header = {**header, "alg": "EdDSA", "kid": "EdDSA"} if over else header
    presented = raw_token(_text(header), _text(claims), "EdDSA")
    assert answers(loop, b"Bearer " + presented) <= ({200, 401} if over else {401, 503})


@pytest.mark.parametrize("depth", [2, 15, 16, 17, 100, 2_000])
@pytest.mark.parametrize("pair", [("[", "]"), ('{"a":', "}")], ids=["arrays", "objects"])
@pytest.mark.parametrize("where", ["header", "claims"])
def test_nesting_is_bounded(loop, where, pair, depth):
    """JW-29: the outermost object is counted."""
    opened, closed = pair
    bomb = f',"x":{opened * (depth - 1)}1{closed * (depth - 1)}}}'
    header, claims = '{"alg":"EdDSA","kid":"EdDSA"}', json.dumps(good_claims())
    if where == "header":
        header = header[:-1] + bomb
    else:
        claims = claims[:-1] + bomb
    expected = 200 if depth <= 16 else 401
    assert answers(loop, b"Bearer " + raw_token(header, claims, "EdDSA")) == {expected}
