"""What has to hold for any bytes: only a refusal comes out, and nobody passes for whom no key has signed.

The first byte chooses what the rest is: a token, a header and claims to be signed rightly, a whole `Authorization`
field, a JSON text, or a published key.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.host import PLAIN
from sigil_policy.core.problems import DEFAULT_STYLE, Problem
from sigil_policy.identity.keys import Key
from sigil_policy.identity.tokens import TokenError, TokenVerifier
from sigil_policy.policies.bearer import BearerAuth
from sigil_policy.testing import FrozenClock
from sigil_policy.wire.jws import MAX_CONTAINERS, parse_compact, parse_object
from tests.identity.material import (
    NOW,
    b64,
    good_claims,
    make_issuer,
    make_key,
    private_key,
    public_jwk,
    public_pem,
    raw_token,
    token,
)

ALGORITHMS = ("HS256", "RS256", "ES256", "EdDSA")
SIGNED = {name: token(algorithm=name, header={"kid": name, "typ": "at+jwt"}) for name in ALGORITHMS}
KEYS = [make_key(name, id=name) for name in ALGORITHMS]
OTHER = make_issuer(make_key("HS256"), url="https://other.example")
VERIFIERS = (TokenVerifier([make_issuer(*KEYS)]), TokenVerifier([make_issuer(*KEYS), OTHER]))
BEARER = BearerAuth(issuers=[make_issuer(*KEYS)], required=True)
CLOCK = FrozenClock(NOW)
WORDS = [
    *(f'"{name}"'.encode() for name in ("alg", "kid", "typ", "cty", "crit", "b64", "jwk", "jku", "x5u", "none")),
    *(f'"{name}"'.encode() for name in (*good_claims(), "nbf", "jti", "cnf", "client_id", "kty", "crv", "x", "n", "e")),
    *(f'"{name}"'.encode() for name in (*ALGORITHMS, "at+jwt", "JWT", "oct", "RSA", "EC", "OKP", "P-256")),
    b"Bearer ", b"eyJhbGciOi", b"\\u0000", b"\\ud800", b"1e999", b"NaN", b"-0",
    b"\xef\xbb\xbf", b"[[[[", b"}}}}", b"..", b"=",
]  # fmt: skip


def check(data: bytes) -> None:
    """Raises when the property does not hold for `data`."""
    if data:
        KINDS[data[0] % len(KINDS)](data[1:])


def presented(data: bytes) -> None:
    for verifier in VERIFIERS:
        if _verified(verifier, data) is not None:
            assert data in SIGNED.values(), "a token that nobody has signed passes"


def signed(data: bytes) -> None:
    header, _, claims = data.partition(b"\0")
    made = raw_token(header, claims)
    for verifier in VERIFIERS:
        principal = _verified(verifier, made)
        if principal is not None:
            said = json.loads(claims.decode("utf-8"), object_pairs_hook=_once)
            head = json.loads(header.decode("utf-8"), object_pairs_hook=_once)
            assert head["alg"] == "HS256"
            assert not {"crit", "b64"} & head.keys()
            assert principal.subject == said["sub"]
            assert type(said["exp"]) in (int, float)
            assert said["exp"] + 5 > NOW
            assert isinstance(said["iss"], str)
            assert principal.issuer == said["iss"]
            assert all(" " not in scope and scope.isascii() for scope in principal.scopes)
            hash(principal.key)
            repr(principal)


def field(data: bytes) -> None:
    scope = {
        "type": "http", "method": "GET", "path": "/", "query_string": b"",
        "headers": [(b"authorization", data)],
    }  # fmt: skip
    exchange = Exchange(scope, _receive, CLOCK, PLAIN, DEFAULT_STYLE)
    answer = BEARER.on_request(exchange)
    if isinstance(answer, Problem):
        assert answer.status in (400, 401)
        DEFAULT_STYLE.render(answer, exchange)
        assert exchange.principal is None
    else:
        assert answer is None, "nothing here has to be waited for"
        assert data[:7].lower() == b"bearer "
        assert data[7:].lstrip(b" ") in SIGNED.values()


def text(data: bytes) -> None:
    for trusted in (False, True):
        try:
            found = parse_object(data, trusted=trusted)
        except ValueError:
            continue
        assert found == json.loads(data.decode("utf-8"), object_pairs_hook=_once)
        # What was read can be written, and is read again as the same.
        again = json.dumps(found, allow_nan=False).encode()
        assert again.count(b"[") + again.count(b"{") > MAX_CONTAINERS or parse_object(again, trusted=True) == found
    try:
        parts = parse_compact(data)
    except ValueError:
        return
    header = data.split(b".")[0]
    assert data == b".".join((header, b64(parts.payload), b64(parts.signature)))


def published(data: bytes) -> None:
    try:
        jwk = parse_object(data, trusted=True)
        key = Key(jwk=jwk)
    except (ValueError, TypeError):
        return
    assert not key.verify(b"message", b"signature")
    assert "d" not in jwk or jwk.get("kty") == "oct"
    assert json.dumps(jwk.get("k", jwk.get("x", "?")))[1:-1] not in repr(key)


KINDS: tuple[Callable[[bytes], None], ...] = (presented, signed, field, text, published)


def _verified(verifier: TokenVerifier, data: bytes) -> Principal | None:
    try:
        return verifier.verify(data, NOW).principal
    except TokenError:
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    assert len(found) == len(pairs), "a member occurs twice"
    return found


async def _receive() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def seeds() -> Iterator[bytes]:
    """Where the search starts: of every kind some that pass, and some that nearly do."""
    claims = json.dumps(good_claims()).encode()
    for made in SIGNED.values():
        yield b"\0" + made
        yield b"\0" + made[:-4]
        yield b"\2Bearer " + made
        yield b"\3" + made
    yield b"\0" + b64('{"alg":"none"}') + b"." + b64(claims) + b"."
    heads = [{"alg": "HS256"}, {"alg": "HS256", "kid": "HS256", "typ": "at+jwt"}, {"alg": "HS256", "crit": ["exp"]}]
    heads += [{"alg": name} for name in ("none", "RS256", "ES256", "EdDSA")]
    for head in heads:
        yield b"\1" + json.dumps(head).encode() + b"\0" + claims
    for changes in (
        {"aud": ["other", "sigil-api"]}, {"scope": ["a"]}, {"exp": "1"}, {"nbf": 1.5, "jti": "a"}, {"sub": "é"},
        {"iss": "https://other.example"}, {"cnf": {"jkt": "x"}}, {"deep": [[[{"a": [None, True, 1e300]}]]]},
    ):  # fmt: skip
        yield b'\1{"alg":"HS256"}\0' + json.dumps(good_claims(**changes)).encode()
        yield b"\3" + json.dumps(good_claims(**changes)).encode()
    yield b"\2Basic YTpi"
    yield b"\2Bearer"
    for name in ALGORITHMS[1:]:
        yield b"\4" + json.dumps(public_jwk(name, kid="a", use="sig")).encode()
    yield b'\4{"kty":"oct","k":"' + b64(b"k" * 64) + b'","alg":"HS256","kid":"a"}'
    yield b'\4{"kty":"oct","alg":"HS256","k":"' + b64(public_pem(private_key("ES256"))) + b'"}'
