"""RFC 9449 section 4.3: each check has a test that names it; replays, nonces, and what is configured."""

import json
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.host import PLAIN
from sigil_policy.core.problems import DEFAULT_STYLE
from sigil_policy.identity.dpop import DPoP, NonceRequired, ProofError, UsedProof
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.replays import MemoryReplays
from sigil_policy.testing import FrozenClock
from tests.identity.material import NOW, b64
from tests.identity.proofs import (
    ORIGIN,
    RFC_RESOURCE_REQUEST,
    RFC_THUMBPRINT,
    RFC_TOKEN,
    claims_of,
    client_jwk,
    proof,
    raw_proof,
    thumbprint,
)

pytestmark = pytest.mark.anyio

TOKEN = b"some.access.token"
SECRET = SecretStr("canary-nonce-secret-0d1c-of-32-bytes-at-least")
OWN = thumbprint(client_jwk())


def exchange(
    *values: bytes, method: str = "GET", path: str = "/", clock: FrozenClock | None = None, **scope: Any
) -> Exchange:
    """One that carries these `DPoP` lines."""
    full = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "headers": [(b"dpop", value) for value in values],
        **scope,
    }
    return Exchange(full, anyio.sleep_forever, clock or FrozenClock(NOW), PLAIN, DEFAULT_STYLE)


def make_dpop(**options: Any) -> DPoP:
    return DPoP(**{"origin": ORIGIN, **options})


def verify(ex: Exchange, *, key: str = OWN, token: bytes = TOKEN, **options: Any) -> bytes:
    return make_dpop(**options).verify(ex, token, key)


def nonce_at(dpop: DPoP, now: float) -> bytes:
    """The nonce that a caller without one is asked for."""
    ex = exchange(proof(TOKEN, iat=now), clock=FrozenClock(now))
    with pytest.raises(ProofError, match="refused"):
        dpop.verify(ex, TOKEN, OWN)
    return ex[NonceRequired].nonce


def reason(ex: Exchange, **options: Any) -> str:
    with pytest.raises(ProofError) as refused:
        verify(ex, **options)
    assert str(refused.value) == "the proof is refused"
    return refused.value.reason


def test_the_example_of_the_standard_is_good_for_its_request():
    """RFC 9449 section 7.1, figures 12 and 13."""
    ex = exchange(RFC_RESOURCE_REQUEST, path="/protectedresource", clock=FrozenClock(1562262618))
    origin = "https://resource.example.org"
    assert verify(ex, key=RFC_THUMBPRINT, token=RFC_TOKEN, origin=origin)
    assert reason(ex, key=RFC_THUMBPRINT, token=RFC_TOKEN) == "htu"
    assert reason(ex, key=RFC_THUMBPRINT, token=RFC_TOKEN + b"x", origin=origin) == "ath"
    assert reason(ex, key=OWN, token=RFC_TOKEN, origin=origin) == "key"


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA", "Ed25519", "PS256", "RS256"])
def test_a_proof_is_good(algorithm):
    ex = exchange(proof(TOKEN, algorithm=algorithm))
    assert verify(ex, key=thumbprint(client_jwk(algorithm)))


def test_check_1_there_is_one_proof_and_no_more():
    made = proof(TOKEN)
    assert reason(exchange()) == "header"
    assert reason(exchange(made, made)) == "header"
    assert reason(exchange(made + b", " + made)) == "form"
    ex = exchange(headers=[(b"DPoP", made), (b"dpop", made)])
    assert reason(ex) == "header"


@pytest.mark.parametrize("value", [b"", b"x", b"a.b.c", proof(TOKEN) + b"=", proof(TOKEN)[:-1], b"A" * 100_000])
def test_check_2_it_is_a_well_formed_jwt(value):
    assert reason(exchange(value)) == "form"


@pytest.mark.parametrize("name", ["jti", "htm", "htu", "iat"])
def test_check_3_all_required_claims_are_there(name):
    assert reason(exchange(proof(TOKEN, **{name: None}))) == "form"


@pytest.mark.parametrize("typ", [None, "JWT", "at+jwt", "dpop", "application/dpop+jwt"])
def test_check_4_its_type_is_that_of_a_proof(typ):
    assert reason(exchange(proof(TOKEN, header={"typ": typ}))) == "form"


@pytest.mark.parametrize("alg", [None, "none", "HS256", "dir", ""])
def test_check_5_the_algorithm_is_asymmetric(alg):
    assert reason(exchange(proof(TOKEN, header={"alg": alg}))) == "form"


def test_check_5_the_algorithm_is_one_that_is_accepted():
    ex = exchange(proof(TOKEN, algorithm="ES384"))
    key = thumbprint(client_jwk("ES384"))
    assert reason(ex, key=key) == "alg"
    assert verify(ex, key=key, algorithms=["ES384"])
    assert reason(exchange(proof(TOKEN)), algorithms=["ES384"]) == "alg"


def test_check_6_the_signature_is_by_the_key_in_it():
    good = proof(TOKEN)
    signed, _, signature = good.rpartition(b".")
    other = proof(TOKEN).rpartition(b".")[2]
    for forged in (other, b64(b"\0" * 64), b64(b"\xff" * 64), b64(b"short"), b""):
        assert reason(exchange(signed + b"." + forged)) == "signature"
    header, _, _ = good.split(b".")
    changed = b64(json.dumps(claims_of(TOKEN)))
    assert reason(exchange(header + b"." + changed + b"." + signature)) == "signature"
    assert verify(exchange(good))


def test_check_6_a_point_on_no_curve_verifies_nothing():
    jwk = {**client_jwk(), "y": b64(b"\1" * 32).decode()}
    assert reason(exchange(proof(TOKEN, header={"jwk": jwk})), key=thumbprint(jwk)) == "signature"


def test_check_7_the_key_is_public():
    assert reason(exchange(proof(TOKEN, header={"jwk": {**client_jwk(), "d": "AAAA"}}))) == "form"


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "PURGE"])
def test_check_8_the_method_is_that_of_the_request(method):
    assert verify(exchange(proof(TOKEN, htm=method), method=method))
    for other in {"GET", "POST", "HEAD", method.lower()} - {method}:
        assert reason(exchange(proof(TOKEN, htm=other), method=method)) == "htm"


def test_check_8_a_handshake_is_a_get():
    ex = exchange(proof(TOKEN), type="websocket", method="WEBSOCKET")
    assert verify(ex)
    assert reason(exchange(proof(TOKEN, htm="WEBSOCKET"), type="websocket")) == "htm"


@pytest.mark.parametrize(
    ("htu", "path"),
    [
        ("https://api.example.com/v7/agents", "/v7/agents"),
        ("HTTPS://API.EXAMPLE.COM:443/v7/agents", "/v7/agents"),
        ("https://api.example.com/v7/agents?page=2#top", "/v7/agents"),
        ("https://api.example.com", "/"),
        ("https://api.example.com/%7Eann/a%2Fb", "/~ann/a%2fb"),
        ("https://api.example.com/a/./b", "/a/c/../b"),
        ("https://api.example.com/caf%C3%A9", "/café"),
    ],
)
def test_check_9_the_url_is_that_of_the_request(htu, path):
    assert verify(exchange(proof(TOKEN, htu=htu), path=path, query_string=b"page=2"))


@pytest.mark.parametrize(
    "htu",
    [
        "https://api.example.com/",
        "https://api.example.com/v7/agents/",
        "https://api.example.com/V7/agents",
        "https://api.example.com/v7%2Fagents",
        "https://api.example.com/v7//agents",
        "http://api.example.com/v7/agents",
        "https://api.example.com:8443/v7/agents",
        "https://evil.example/v7/agents",
        "https://api.example.com.evil.example/v7/agents",
        "https://api.example.com@evil.example/v7/agents",
        "wss://api.example.com/v7/agents",
        "/v7/agents",
        "//api.example.com/v7/agents",
    ],
)
def test_check_9_the_url_of_another_request(htu):
    lies = [(b"host", b"evil.example"), (b"x-forwarded-host", b"evil.example"), (b"x-forwarded-proto", b"http")]
    made = proof(TOKEN, htu=htu)
    ex = exchange(path="/v7/agents", headers=[(b"dpop", made), *lies], server=("evil.example", 443), scheme="http")
    assert reason(ex) == "htu", "what the request says of its own host is not asked"


def test_check_9_what_a_server_says_of_the_path():
    made = proof(TOKEN, htu=f"{ORIGIN}/a%2Fb/%C3%A9")
    assert verify(exchange(made, path="/ignored", raw_path=b"/a%2fb/%c3%a9?x=1"))
    assert reason(exchange(made, path="/a/b/é", raw_path=None)) == "htu", "what was decoded is not the same"
    assert verify(exchange(proof(TOKEN, htu=f"{ORIGIN}/%C3%A9"), path="/é", raw_path=None))
    assert reason(exchange(made, path="/a/b", raw_path=b"*")) == "htu"
    assert reason(exchange(proof(TOKEN, htu=f"{ORIGIN}/é"), raw_path=b"/\xe9")) == "htu"
    assert verify(exchange(proof(TOKEN), raw_path=b"")), "RFC 3986 section 6.2.3"
    assert reason(exchange(made, path="/a/b", raw_path=b"/" + b"a" * 100_000)) == "htu"
    assert reason(exchange(made, path="/\udce9", raw_path=None)) == "htu"


def test_check_9_a_long_url_that_is_written_alike_is_the_same():
    path = "/" + "%E8%AA%9E" * 250
    assert verify(exchange(proof(TOKEN, htu=ORIGIN + path), path="/x", raw_path=path.encode()))
    assert reason(exchange(proof(TOKEN, htu=ORIGIN + path), path="/x", raw_path=path.lower().encode())) == "htu"


def test_check_9_a_service_with_several_names():
    origins = ["https://api.example.com", "https://eu.example.com:8443/billing/"]
    assert verify(exchange(proof(TOKEN, htu="https://api.example.com/x"), path="/x"), origin=origins)
    ex = exchange(proof(TOKEN, htu="https://eu.example.com:8443/billing/x"), path="/x")
    assert verify(ex, origin=origins)
    assert reason(exchange(proof(TOKEN, htu="https://eu.example.com:8443/x"), path="/x"), origin=origins) == "htu"


def test_check_9_a_service_that_names_itself():
    def by_tenant(ex: Exchange) -> str | None:
        tenant = ex.headers.get(b"x-tenant")
        return None if tenant is None else f"https://{tenant.decode()}.example.com"

    made = proof(TOKEN, htu="https://ann.example.com/")
    ex = exchange(headers=[(b"dpop", made), (b"x-tenant", b"ann")])
    assert verify(ex, origin=by_tenant)
    assert reason(exchange(headers=[(b"dpop", made), (b"x-tenant", b"bob")]), origin=by_tenant) == "htu"
    assert reason(exchange(made), origin=by_tenant) == "htu"


def test_check_10_the_nonce_is_one_of_this_service():
    dpop = make_dpop(nonce_secret=SECRET, nonce_period=100)
    nonce = nonce_at(dpop, NOW).decode()
    clock = FrozenClock(NOW)

    def again(given: str | None) -> str:
        ex = exchange(proof(TOKEN, nonce=given, iat=clock.time()), clock=clock)
        try:
            dpop.verify(ex, TOKEN, OWN)
        except ProofError as refused:
            return refused.reason
        return "good"

    assert again(nonce) == "good"
    for wrong in (None, nonce[:-1], nonce + "x", "é", "x" * 500):
        assert again(wrong) == "nonce"
    forged = proof(TOKEN, iat=clock.time())[:-8] + b"AAAAAAAA"
    ex = exchange(forged, clock=clock)
    with pytest.raises(ProofError):
        dpop.verify(ex, TOKEN, OWN)
    assert NonceRequired not in ex, "who cannot sign is not asked for more"
    clock.advance(100)
    assert again(nonce) == "good", "until the next one has ended"
    clock.advance(100)
    assert again(nonce) == "nonce"
    clock.jump(-300)
    assert again(nonce) == "good", "the process that made it has a clock that is ahead"
    clock.jump(-100)
    assert again(nonce) == "nonce"


def test_check_11_it_was_made_lately():
    clock = FrozenClock(NOW)
    ex = exchange(proof(TOKEN, iat=NOW), clock=clock)
    for later, good in ((0.0, True), (59.9, True), (0.1, False), (-65.0, True), (-0.1, False), (1e6, False)):
        clock.jump(later)
        assert (verify(ex, leeway=5) != b"") if good else reason(ex, leeway=5) == "iat"
    assert verify(exchange(proof(TOKEN, iat=NOW + 30)))
    assert reason(exchange(proof(TOKEN, iat=NOW + 30.5))) == "iat"
    assert verify(exchange(proof(TOKEN, iat=NOW - 500)), max_age=600)
    assert reason(exchange(proof(TOKEN, iat=NOW + 0.5)), leeway=0) == "iat"


def test_check_11_an_end_of_its_own_holds_too():
    assert verify(exchange(proof(TOKEN, exp=NOW + 1, nbf=NOW)))
    assert reason(exchange(proof(TOKEN, exp=NOW - 5)), leeway=5) == "exp"
    assert reason(exchange(proof(TOKEN, nbf=NOW + 5.5)), leeway=5) == "nbf"


def test_check_12_it_is_for_this_token():
    assert reason(exchange(proof(b"another.token"))) == "ath"
    assert reason(exchange(proof(TOKEN, ath=None))) == "ath"
    assert reason(exchange(proof(TOKEN, ath="é"))) == "ath"


def test_check_12_it_is_by_the_key_of_this_token():
    ex = exchange(proof(TOKEN, algorithm="EdDSA"))
    for key in (OWN, "", "é", "x" * 10_000):
        assert reason(ex, key=key) == "key"


CHANGES = st.tuples(
    st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 9_999), st.binary(min_size=1, max_size=9)
)


@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_a_mutated_proof_never_passes(changes):
    made = bytearray(proof(TOKEN))
    before = bytes(made)
    for action, place, text in changes:
        place %= len(made)
        if action == "flip":
            made[place] ^= text[0]
        elif action == "cut":
            del made[place : place + 5 * len(text)]
        else:
            made[place:place] = text
    if bytes(made) != before:
        reason(exchange(bytes(made)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@given(st.sampled_from(["jti", "htm", "htu", "iat", "ath", "nonce", "exp", "nbf"]), JSON)
def test_a_claim_of_another_kind_is_refused_or_good_and_nothing_else(name, value):
    text = json.dumps({**claims_of(TOKEN), name: value})
    ex = exchange(raw_proof(json.dumps({"typ": "dpop+jwt", "alg": "ES256", "jwk": client_jwk()}), text))
    try:
        verify(ex)
    except ProofError:
        return
    assert name in ("jti", "nonce", "exp", "nbf") or value == claims_of(TOKEN)[name]


# --- used once -----------------------------------------------------------------------------------------------------


async def first(dpop: DPoP, ex: Exchange) -> bool:
    found = dpop.claim(ex, dpop.verify(ex, TOKEN, OWN))
    return found if isinstance(found, bool) else await found


async def test_a_proof_is_used_once():
    """RFC 9449 section 11.1."""
    dpop, made = make_dpop(), proof(TOKEN)
    assert await first(dpop, exchange(made))
    assert not await first(dpop, exchange(made))
    assert await first(dpop, exchange(proof(TOKEN)))
    assert await first(dpop, exchange(proof(TOKEN, jti="same")))
    assert not await first(dpop, exchange(proof(TOKEN, jti="same", iat=NOW - 1))), "its id is what counts"


async def test_ids_of_several_keys_are_apart():
    dpop = make_dpop()
    for algorithm in ("ES256", "EdDSA"):
        ex = exchange(proof(TOKEN, algorithm=algorithm, jti="same"))
        assert dpop.claim(ex, dpop.verify(ex, TOKEN, thumbprint(client_jwk(algorithm)))) is True


async def test_a_proof_is_known_for_as_long_as_it_would_be_good():
    dpop, clock = make_dpop(max_age=60, leeway=5), FrozenClock(NOW)
    made = proof(TOKEN, iat=NOW + 5)
    assert await first(dpop, exchange(made, clock=clock))
    clock.advance(64.9)
    assert not await first(dpop, exchange(made, clock=clock))
    clock.jump(-60)
    assert not await first(dpop, exchange(made, clock=clock)), "also when the clock is set back"
    clock.advance(60)
    assert not await first(dpop, exchange(made, clock=clock))


async def test_a_policy_further_in_does_not_find_it_used():
    outer, inner = make_dpop(), make_dpop()
    ex = exchange(proof(TOKEN))
    assert await first(outer, ex)
    assert await first(inner, ex), "a store of its own"
    assert await first(outer, ex)
    assert ex.get(UsedProof).stores == (outer.store, inner.store)
    later = exchange(ex.headers[b"dpop"])
    assert not await first(outer, later)
    assert not await first(inner, later)


class Slow:
    """A store on another machine."""

    remote = True

    def __init__(self, *, error: Exception | None = None, hangs: bool = False) -> None:
        self.kept = MemoryReplays()
        self.error = error
        self.hangs = hangs

    async def claim(self, name: bytes, seconds: float, now: float) -> bool:
        await anyio.sleep_forever() if self.hangs else await anyio.lowlevel.checkpoint()
        if self.error is not None:
            raise self.error
        return self.kept.claim(name, seconds, now)


@pytest.mark.parametrize("remote", [False, True])
async def test_of_many_at_once_exactly_one_is_first(remote):
    dpop, made = make_dpop(replays=Slow() if remote else None), proof(TOKEN)
    passed: list[bool] = []

    async def one() -> None:
        passed.append(await first(dpop, exchange(made)))

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(one)
    assert passed.count(True) == 1


@pytest.mark.parametrize(
    "store", [Slow(error=StoreUnavailableError("away", 7.0)), Slow(hangs=True), MemoryReplays(max_entries=1)],
    ids=["away", "silent", "full"],
)  # fmt: skip
async def test_a_store_that_cannot_say(store):
    if isinstance(store, MemoryReplays):
        store.claim(b"other", 1e9, 0.0)
    closed = make_dpop(replays=store, deadline=0.01)
    with pytest.raises(StoreUnavailableError) as lost:
        await first(closed, exchange(proof(TOKEN)))
    assert lost.value.retry_after > 0
    opened = make_dpop(replays=store, deadline=0.01, on_store_loss="open")
    made = proof(TOKEN)
    assert [await first(opened, exchange(made)) for _ in range(2)] == [True, True]


async def test_what_is_refused_is_never_kept():
    """Section 11.1: nobody fills the store with what no key has signed."""
    dpop = make_dpop()
    for ex in (
        exchange(proof(TOKEN)[:-8] + b"AAAAAAAA"),
        exchange(proof(TOKEN, algorithm="EdDSA")),
        exchange(proof(TOKEN, htm="POST")),
        exchange(proof(TOKEN, iat=NOW - 1_000)),
    ):
        with pytest.raises(ProofError):
            await first(dpop, ex)
    assert len(dpop.store) == 0


async def test_a_claim_that_is_cancelled_says_nothing():
    dpop = make_dpop(replays=Slow(hangs=True), deadline=60)
    ex = exchange(proof(TOKEN))
    with anyio.move_on_after(0.01) as scope:
        await first(dpop, ex)
    assert scope.cancelled_caught
    assert ex.get(UsedProof) is None


# --- nonces -----------------------------------------------------------------------------------------------------


def test_nonces_tell_nothing_and_differ_by_secret():
    """Section 8: a nonce cannot be foreseen."""
    dpop = make_dpop(nonce_secret=SECRET)
    other = make_dpop(nonce_secret=SecretStr("canary-another-secret-0d1c-of-32-bytes"))
    nonces = {nonce_at(dpop, NOW + 300 * step) for step in range(100)} | {nonce_at(other, NOW)}
    assert len(nonces) == 101
    assert all(len(nonce) == 24 and nonce.isascii() for nonce in nonces)
    assert nonce_at(dpop, NOW) == nonce_at(make_dpop(nonce_secret=SECRET), NOW), "the same in all processes"


@pytest.mark.parametrize(
    ("cache", "kept", "brings"),
    [
        (None, b"no-store", True),
        (b"private, No-Store", b"private, No-Store", True),
        (b"max-age=60", b"max-age=60", False),
    ],
)
def test_the_next_nonce_comes_before_the_last_one_ends(cache, kept, brings):
    """Section 8.2; section 8: with a response that nobody stores."""
    clock = FrozenClock(NOW - NOW % 100)
    dpop = make_dpop(nonce_secret=SECRET, nonce_period=100)
    nonce = nonce_at(dpop, clock.time()).decode()
    for step in range(2):
        ex = exchange(proof(TOKEN, nonce=nonce, iat=clock.time()), clock=clock)
        assert dpop.verify(ex, TOKEN, OWN)
        head = Head(200, [] if cache is None else [(b"cache-control", cache)])
        dpop.supply_nonce(ex, head)
        dpop.supply_nonce(ex, head)
        if step == 0:
            assert head.get(b"dpop-nonce") is None
            assert head.get(b"cache-control") == cache
        else:
            assert head.get_all(b"dpop-nonce") == ([nonce_at(dpop, clock.time())] if brings else [])
            assert head.get_all(b"cache-control") == [kept]
        clock.advance(100)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"origin": "api.example.com"}, "origin is the scheme, host and port"),
        ({"origin": "https://api.example.com/?x"}, "origin is the scheme"),
        ({"origin": "wss://api.example.com"}, "origin is the scheme"),
        ({"origin": []}, "origin"),
        ({"algorithms": []}, "algorithms"),
        ({"algorithms": ["HS256"]}, "algorithms"),
        ({"algorithms": ["none"]}, "algorithms"),
        ({"max_age": 0}, "max_age"),
        ({"max_age": 601}, "max_age"),
        ({"leeway": 61}, "leeway"),
        ({"leeway": float("nan")}, "leeway"),
        ({"replays": 7}, "replays must be a URL or a ReplayStore"),
        ({"replays": "https://x"}, "scheme"),
        ({"on_store_loss": "local"}, "on_store_loss"),
        ({"nonce_secret": "short"}, "at least 32 bytes"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_what_cannot_be_fails_when_it_is_made(options, said):
    with pytest.raises(ValidationError, match=said):
        make_dpop(**options)


def test_no_secret_is_shown():
    dpop = make_dpop(nonce_secret=SECRET, replays="redis://user:canary-password@replays.invalid:6379/0")
    assert "canary" not in repr(dpop)
    with pytest.raises(ValidationError) as refused:
        make_dpop(nonce_secret="canary-short")
    assert "canary" not in str(refused.value)


async def test_many_keys_are_remembered_and_no_more():
    dpop = make_dpop()
    ex = exchange(proof(TOKEN))
    for _ in range(3):
        dpop.verify(ex, TOKEN, OWN)
    assert len(dpop._key.cache) == 1
