"""A fetched key set: fresh, bounded, and there when the provider is not."""

import json
import socket
import ssl
import time
import tracemalloc
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import anyio
import anyio.lowlevel
import httpx2
import pytest
from anyio.streams.tls import TLSListener
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from sigil_policy.identity.flights import Flight
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import MAX_TRIALS, FetchedKeys, KeySet, KeysUnavailableError
from sigil_policy.testing import FrozenClock
from tests.identity.material import AUDIENCE, NOW, SECRET, URL, b64, private_pem, public_jwk, small_rsa
from tests.identity.provider import JWKS_URL, Pair, Provider

pytestmark = pytest.mark.anyio

A, B = Pair("a"), Pair("b")
ES256_A = ("ES256", "a")


def fetched(
    provider: Provider, url: str | None = JWKS_URL, *, algorithms: tuple[str, ...] = (), **options
) -> FetchedKeys:
    issuer = provider.issuer(url, issuer={"algorithms": algorithms} if algorithms else None, **options)
    assert issuer.fetched is not None
    return issuer.fetched


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(NOW)


async def kids(provider: Provider, clock, **options) -> list[tuple[str | None, str | None]]:
    keys = fetched(provider, **options)
    await keys.obtain(clock)
    return [(key.algorithm, key.id) for key in keys.ring.keys]


async def failure(keys: FetchedKeys, clock, caplog) -> str:
    """What the operator reads when the set cannot be fetched."""
    caplog.clear()
    with pytest.raises(KeysUnavailableError):
        await keys.obtain(clock)
    return " ".join(record.getMessage() for record in caplog.records if record.name == "sigil_policy")


# --- which keys are used (RFC 7517) ----------------------------------------------------------------------------------

RS = public_jwk("RS256", kid="r")
RS_BARE = {name: value for name, value in RS.items() if name not in ("alg", "key_ops")}


@pytest.mark.parametrize(
    ("entry", "used"),
    [
        pytest.param({**B.jwk(), "x-vendor": {"a": 1}, "x5c": ["AA"]}, True, id="JK-01 unknown members"),
        pytest.param({"kty": "AKP", "kid": "b", "alg": "ML-DSA-44", "pub": "AA"}, False, id="JK-02 unknown kty"),
        pytest.param({"kty": ["EC"], "kid": "b"}, False, id="JK-02 kty no string"),
        pytest.param({"kid": "b"}, False, id="JK-02 no kty"),
        pytest.param({"kty": "EC", "crv": "P-256", "kid": "b"}, False, id="JK-02 members missing"),
        pytest.param({**B.jwk(), "x": "AA"}, False, id="JK-02 off the curve"),
        pytest.param({**B.jwk(), "x": 7}, False, id="JK-02 x a number"),
        pytest.param({**B.jwk(), "kid": 7}, False, id="JK-02 kid a number"),
        pytest.param({**B.jwk(), "kid": "k" * 257}, False, id="JK-02 long kid"),
        pytest.param({**B.jwk(), "crv": "secp256k1"}, False, id="JK-02 unknown curve"),
        pytest.param("b", False, id="JK-02 no object"),
        pytest.param(B.jwk(use="enc"), False, id="JK-03 use enc"),
        pytest.param(B.jwk(use="sig"), True, id="JK-03 use sig"),
        pytest.param(B.jwk(key_ops=["sign"]), False, id="JK-03 key_ops without verify"),
        pytest.param(B.jwk(key_ops=["verify"]), True, id="JK-03 key_ops with verify"),
        pytest.param({"kty": "oct", "k": b64(SECRET).decode(), "alg": "HS256", "kid": "b"}, False, id="JK-05 oct"),
        pytest.param({**RS_BARE, "alg": "HS256", "kid": "b"}, False, id="JW-08 an RSA key as a secret"),
        pytest.param({**B.jwk(), "d": "AA"}, False, id="a private key"),
        pytest.param({**RS_BARE, "kid": "b", "alg": "RSA-OAEP"}, False, id="no signature algorithm"),
        pytest.param({**RS_BARE, "kid": "b", "alg": "PS256"}, True, id="PS256"),
        pytest.param(public_jwk("EdDSA", kid="b", alg="Ed25519"), True, id="RFC 9864"),
    ],
)
async def test_a_key_that_cannot_be_used_is_skipped_and_the_others_are_used(entry, used, clock):
    provider = Provider(A)
    provider.published.append(entry)
    found = await kids(provider, clock)
    assert found[0] == ES256_A
    assert ("b" in [kid for _, kid in found]) is used


async def test_a_short_rsa_key_is_skipped(clock):
    """JW-27, RFC 7518 section 3.3."""
    numbers = small_rsa().public_key().public_numbers()
    n = b64(numbers.n.to_bytes(128, "big")).decode()
    provider = Provider(A)
    provider.published.append({"kty": "RSA", "n": n, "e": "AQAB", "alg": "RS256", "kid": "small"})
    assert await kids(provider, clock) == [ES256_A]


async def test_an_rsa_key_without_alg_is_used_with_one_algorithm_only(clock):
    """JW-07: RS256 as OpenID Connect has it, or the one that the issuer is said to use."""
    provider = Provider()
    provider.published = [RS_BARE]
    assert await kids(provider, clock) == [("RS256", "r")]
    assert await kids(provider, clock, algorithms=("ES256", "PS384")) == [("PS384", "r")]


async def test_keys_of_other_algorithms_than_the_issuers_are_not_used(clock):
    """JW-05."""
    provider = Provider(A)
    provider.published.append(RS)
    assert await kids(provider, clock, algorithms=("ES256",)) == [ES256_A]


async def test_two_keys_of_one_kid_are_both_refused(clock, caplog):
    """JK-04: ambiguous ones are not used, the same one written twice is; other algorithms may share the id."""
    provider = Provider(A, B)
    provider.published += [Pair("b").jwk(), A.jwk(), {**RS, "kid": "a"}]
    assert await kids(provider, clock) == [ES256_A, ("RS256", "a")]
    assert "several keys of one id" in caplog.text


async def test_more_keys_without_kid_than_may_be_tried_fit_no_token(clock):
    """JK-10."""
    provider = Provider()
    provider.published = [{k: v for k, v in Pair("-").jwk().items() if k != "kid"} for _ in range(MAX_TRIALS + 1)]
    issuer = provider.issuer()
    await issuer.fetched.obtain(clock)
    assert issuer.candidates("ES256", None) == ()


# --- what a provider may send, and where it may send us ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        pytest.param(httpx2.Response(500), "answers 500", id="500"),
        pytest.param(httpx2.Response(204), "answers 204", id="204"),
        pytest.param(httpx2.Response(200, content=b"<html>canary</html>"), "no JSON object", id="HTML"),
        pytest.param(httpx2.Response(200, content=b"\xff\xfe{\x00"), "no JSON object", id="UTF-16"),
        pytest.param(httpx2.Response(200, content=b"[]"), "no JSON object", id="an array"),
        pytest.param(httpx2.Response(200, content=b"[" * 60_000), "no JSON object", id="nesting"),
        pytest.param(httpx2.Response(200, content=b'{"keys":[],"keys":[]}'), "no JSON object", id="JK-01 duplicate"),
        pytest.param(httpx2.Response(200, json={"keys": {"a": 1}}), "no JWK set", id="keys an object"),
        pytest.param(httpx2.Response(200, json={}), "no JWK set", id="no keys"),
        pytest.param(httpx2.Response(200, json={"keys": []}), "no key that can be used", id="empty"),
        pytest.param(httpx2.Response(200, json={"keys": [{}] * 65}), "more than 64 keys", id="too many"),
        pytest.param(httpx2.Response(200, content=b" " * 65_537), "more than 65536 bytes", id="too long"),
        pytest.param(
            httpx2.Response(200, content=b"", headers={"content-encoding": "gzip"}), "compressed", id="a bomb"
        ),
        pytest.param(httpx2.Response(302), "redirects more than", id="redirect to itself"),
        pytest.param(httpx2.Response(307, headers={"location": "/jwks.json"}), "redirects more", id="circle"),
        pytest.param(
            httpx2.Response(302, headers={"location": "https://evil.example/k"}), "another host", id="other host"
        ),
        pytest.param(
            httpx2.Response(302, headers={"location": JWKS_URL.replace("https", "http")}), "another host", id="to http"
        ),
        pytest.param(
            httpx2.Response(302, headers={"location": "//auth.sigil.acti.ai:444/"}), "another host", id="other port"
        ),
        pytest.param(
            httpx2.Response(302, headers={"location": "https://a:b@auth.sigil.acti.ai/"}), "another", id="user"
        ),
        pytest.param(httpx2.Response(302, headers={"location": "http://[::"}), "cannot be reached", id="no URL"),
    ],
)
async def test_an_answer_that_is_no_key_set_is_a_failure_and_shows_nothing_of_it(answer, complaint, clock, caplog):
    """JK-09, RFC 8725 section 3.10."""
    provider = Provider(A)
    provider.answer = answer
    told = await failure(fetched(provider), clock, caplog)
    assert complaint in told
    assert "canary" not in told


async def test_a_provider_that_cannot_be_reached_is_named_without_its_error(clock, caplog):
    provider = Provider(A)
    provider.down = True
    told = await failure(fetched(provider), clock, caplog)
    assert "ConnectError" in told
    assert "canary" not in told


async def test_redirects_on_the_same_host_are_followed(clock):
    hits = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        hits.append(request.url.path)
        if request.url.path != "/new":
            return httpx2.Response(301, headers={"location": "/new"})
        return httpx2.Response(200, json={"keys": [A.jwk()]})

    keys = fetched(Provider(A), transport=httpx2.MockTransport(handle))
    await keys.obtain(clock)
    assert hits == ["/jwks.json", "/new"]


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("http://auth.example.com/jwks", id="http"),
        pytest.param("http://127.0.0.1:8000/jwks", id="loopback, not allowed"),
        pytest.param("file:/etc/passwd", id="file"),
        pytest.param("https://user:pw@auth.example.com/", id="user"),
        pytest.param("https://auth.example.com/#a", id="fragment"),
        pytest.param("https:///jwks", id="no host"),
        pytest.param("https://a b/", id="space"),
        pytest.param("jwks.json", id="a path"),
        pytest.param("https://h:x/", id="port"),
    ],
)
def test_keys_come_over_https_only(url):
    with pytest.raises(ValidationError) as caught:
        KeySet(url)
    assert "pw" not in str(caught.value)
    with pytest.raises(ValidationError):
        Issuer(url=URL, audience="a", jwks_url=url)
    with pytest.raises(ValidationError):
        KeySet(url.replace("127.0.0.1", "10.0.0.1"), allow_insecure_loopback=True)


def test_what_is_no_transport_is_refused():
    with pytest.raises(ValidationError, match="AsyncBaseTransport"):
        KeySet(JWKS_URL, transport="socks5://proxy")


# --- the wire --------------------------------------------------------------------------------------------------------


class Wire:
    """A server on loopback that sends what it is told."""

    def __init__(self, *parts: bytes, pause: float = 0, hang: bool = False) -> None:
        self.parts, self.pause, self.hang = parts, pause, hang
        self.requests: list[bytes] = []

    async def serve(self, *, task_status) -> None:
        listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
        async with listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            task_status.started(f"http://127.0.0.1:{port}/jwks.json")
            await listener.serve(self._answer)

    async def _answer(self, stream) -> None:
        async with stream:
            try:
                self.requests.append(await stream.receive())
                for part in self.parts:
                    await stream.send(part)
                    await anyio.sleep(self.pause)
                if self.hang:
                    await anyio.sleep_forever()
            except (anyio.BrokenResourceError, anyio.EndOfStream):
                pass


def http(body: bytes, *, length: int | None = None) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body) if length is None else length, body)


async def from_wire(wire: Wire, caplog, **options) -> tuple[FetchedKeys, str, float]:
    async with anyio.create_task_group() as tasks:
        url = await tasks.start(wire.serve)
        keys = KeySet(url, allow_insecure_loopback=True, **{"deadline": 30, **options})
        issuer = Issuer(url=URL, audience=AUDIENCE, keys=keys)
        begun = time.monotonic()
        with suppress(KeysUnavailableError):
            await issuer.fetched.obtain(FrozenClock(NOW))
        took = time.monotonic() - begun
        tasks.cancel_scope.cancel()
    return issuer.fetched, caplog.text, took


async def test_a_set_is_fetched_over_the_wire(caplog):
    wire = Wire(http(json.dumps({"keys": [A.jwk()]}).encode()))
    keys, _, _ = await from_wire(wire, caplog)
    assert [key.id for key in keys.ring.keys] == ["a"]
    request = wire.requests[0].lower()
    assert request.startswith(b"get /jwks.json http/1.1\r\n")
    assert b"accept-encoding: identity\r\n" in request
    assert b"authorization" not in request


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param(Wire(hang=True), id="says nothing"),
        pytest.param(Wire(http(b"{", length=100), hang=True), id="stops in the middle"),
        pytest.param(Wire(http(b"", length=10_000), *[b" "] * 1_000, pause=0.01), id="a byte at a time"),
    ],
)
async def test_a_slow_provider_is_left_at_the_deadline(wire, caplog):
    for _ in range(3):
        _, told, took = await from_wire(wire, caplog, deadline=0.3)
        assert "no answer within 0.3 seconds" in told
        if took < 2:
            break  # else the machine may have stood still: once more
    assert took < 2


async def test_a_huge_answer_is_not_read(caplog):
    wire = Wire(http(b"", length=50_000_000), *[b" " * 65_536] * 760)
    tracemalloc.start()
    try:
        _, told, _ = await from_wire(wire, caplog, max_bytes=2_048)
        assert "more than 2048 bytes" in told
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


async def test_a_port_that_nobody_listens_on_is_a_failure(caplog, clock):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        keys = KeySet(f"http://127.0.0.1:{taken.getsockname()[1]}/", allow_insecure_loopback=True, deadline=30)
        issuer = Issuer(url=URL, audience=AUDIENCE, keys=keys)
        assert "cannot be reached" in await failure(issuer.fetched, clock, caplog)


def self_signed(folder) -> ssl.SSLContext:
    """A server's TLS for `localhost`, by nobody whom the machine trusts; the certificate is in `folder`."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, SHA256())
    )
    (folder / "cert.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_text(private_pem(private))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return tls


@pytest.mark.parametrize("trusted", [False, True])
async def test_a_certificate_that_the_machine_does_not_trust_is_refused(trusted, tmp_path, caplog):
    """JK-09: https means verified https; a private CA comes with a transport of its own."""
    wire = Wire(http(json.dumps({"keys": [A.jwk()]}).encode()))
    server = self_signed(tmp_path)
    plain = await anyio.create_tcp_listener(local_host="127.0.0.1")
    listener = TLSListener(plain, server, standard_compatible=False)
    port = plain.extra(anyio.abc.SocketAttribute.local_port)
    options = {"deadline": 30}
    if trusted:
        ours = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        options["transport"] = httpx2.AsyncHTTPTransport(verify=ours)
    issuer = Issuer(url=URL, audience=AUDIENCE, keys=KeySet(f"https://localhost:{port}/jwks.json", **options))
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, wire._answer)
        with suppress(KeysUnavailableError):
            await issuer.fetched.obtain(FrozenClock(NOW))
        await issuer.fetched.aclose()
        tasks.cancel_scope.cancel()
    assert bool(issuer.fetched.ring.keys) is trusted
    assert bool(wire.requests) is trusted
    assert ("ConnectError" in caplog.text) is not trusted


# --- discovery (OpenID Connect, RFC 8414) -----------------------------------------------------------------------------


async def test_the_metadata_says_where_the_keys_are(clock):
    provider = Provider(A)
    keys = fetched(provider, None)
    await keys.obtain(clock)
    assert provider.hits == ["/.well-known/openid-configuration", "/jwks.json"]
    clock.advance(600)
    await keys.obtain(clock)
    assert provider.hits[2:] == ["/jwks.json"], "it is asked again only when something has failed"


async def test_an_oauth_server_has_its_metadata_between_host_and_path(clock):
    """RFC 8414 section 3.1."""
    provider = Provider(A, url=f"{URL}/tenant")
    provider.missing = frozenset({"/tenant/.well-known/openid-configuration"})
    await fetched(provider, None).obtain(clock)
    assert provider.hits[1:] == ["/.well-known/oauth-authorization-server/tenant", "/tenant/jwks.json"]


@pytest.mark.parametrize("issuer", ["https://evil.example", f"{URL}/", URL.upper(), None, 7, [URL]])
async def test_metadata_of_another_issuer_are_no_metadata(issuer, clock, caplog):
    """JK-11, RFC 8414 section 3.3: exactly."""
    provider = Provider(A)
    provider.metadata["issuer"] = issuer
    assert "another issuer" in await failure(fetched(provider, None), clock, caplog)
    assert not provider.fetches


@pytest.mark.parametrize("url", [None, 7, "http://auth.sigil.acti.ai/jwks", "http://127.0.0.1/", "file:/etc/passwd"])
async def test_metadata_cannot_send_us_anywhere(url, clock, caplog):
    provider = Provider(A)
    provider.metadata["jwks_uri"] = url
    assert "no usable jwks_uri" in await failure(fetched(provider, None), clock, caplog)
    assert not provider.fetches


async def test_keys_that_have_moved_are_found_again(clock):
    provider = Provider(A)
    keys = fetched(provider, None)
    await keys.obtain(clock)
    provider.metadata["jwks_uri"] = f"{URL}/moved/jwks.json"
    provider.missing = frozenset({"/jwks.json"})
    clock.advance(600)
    await keys.obtain(clock)
    clock.advance(5)
    await keys.refresh(clock)
    assert provider.hits[-1] == "/moved/jwks.json"


# --- freshness -------------------------------------------------------------------------------------------------------


async def test_a_set_is_due_before_its_lifetime_ends_and_nobody_has_to_wait(clock):
    provider = Provider(A)
    keys = fetched(provider)
    assert keys.remaining(clock) == 0
    await keys.obtain(clock)
    assert keys.remaining(clock) == 480
    clock.advance(479.9)
    assert not keys.is_due(clock)
    clock.advance(0.1)
    assert keys.is_due(clock)
    assert keys.remaining(clock) == 5, "used on, and looked at again soon"
    await keys.refresh(clock)
    await keys.refresh(clock)
    assert provider.fetches == 2
    assert keys.remaining(clock) == 480


async def test_after_its_lifetime_a_set_is_fetched_before_it_is_used(clock):
    """An idle service must not go by the keys of yesterday."""
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    clock.advance(600)
    assert keys.remaining(clock) == 0
    provider.publish(B)
    await keys.obtain(clock)
    assert [key.id for key in keys.ring.keys] == ["b"]


@pytest.mark.parametrize(
    ("headers", "lifetime"),
    [
        pytest.param({"cache-control": "public, max-age=1000"}, 1000, id="max-age"),
        pytest.param({"cache-control": "max-age=1000", "age": "400"}, 600, id="age"),
        pytest.param({"cache-control": "max-age=0"}, 30, id="not below the cool-down"),
        pytest.param({"cache-control": "max-age=999999999"}, 86_400, id="not over a day"),
        pytest.param({"cache-control": "s-maxage=1000"}, 600, id="for shared caches"),
        pytest.param({"cache-control": "max-age=soon"}, 600, id="no number"),
    ],
)
async def test_the_provider_says_how_long_its_set_is_fresh(headers, lifetime, clock):
    """JK-09."""
    provider = Provider(A)
    provider.headers = headers
    keys = fetched(provider)
    await keys.obtain(clock)
    assert keys.remaining(clock) == pytest.approx(0.8 * lifetime)


async def test_while_the_provider_is_down_the_keys_go_on_up_to_the_bound(clock):
    """JK-08."""
    provider = Provider(A)
    keys = fetched(provider, max_stale=3_600)
    await keys.obtain(clock)
    provider.down = True
    clock.advance(600)
    await keys.obtain(clock)
    assert provider.fetches == 2
    assert keys.remaining(clock) == 5
    assert not keys.is_due(clock), "it is not asked again before `retry` seconds have passed"
    clock.advance(3_599)
    assert keys.is_due(clock)
    assert keys.remaining(clock) == 1
    await keys.obtain(clock)
    assert provider.fetches == 2, "and nobody waits for that"
    clock.advance(1)
    assert keys.remaining(clock) == 0
    with pytest.raises(KeysUnavailableError) as caught:
        await keys.obtain(clock)
    assert caught.value.retry_after == 5
    provider.down = False
    clock.advance(5)
    await keys.obtain(clock)
    assert keys.remaining(clock) == 480


async def test_a_provider_that_is_down_at_the_start_is_asked_once_per_retry(clock):
    provider = Provider(A)
    provider.down = True
    keys = fetched(provider)
    for _ in range(50):
        with pytest.raises(KeysUnavailableError):
            await keys.obtain(clock, ES256_A)
    assert provider.fetches == 1
    clock.advance(5)
    provider.down = False
    await keys.obtain(clock, ES256_A)


async def test_an_initial_set_serves_until_the_provider_is_there(clock):
    provider = Provider(B)
    provider.down = True
    keys = fetched(provider, initial={"keys": [A.jwk()]}, max_stale=60)
    assert keys.remaining(clock) == 5
    assert keys.is_due(clock)
    await keys.obtain(clock)
    assert provider.fetches == 0
    await keys.refresh(clock)
    assert [key.id for key in keys.ring.keys] == ["a"]
    clock.advance(5)
    provider.down = False
    await keys.refresh(clock)
    assert [key.id for key in keys.ring.keys] == ["b"]


async def test_an_initial_set_does_not_serve_for_ever(clock):
    provider = Provider()
    provider.down = True
    keys = fetched(provider, initial={"keys": [A.jwk()]}, max_stale=60)
    assert keys.remaining(clock)
    clock.advance(60)
    assert keys.remaining(clock) == 0


@pytest.mark.parametrize("initial", [{}, {"keys": []}, {"keys": [{"kty": "oct", "k": b64(SECRET).decode()}]}])
def test_an_initial_set_without_keys_is_refused(initial):
    with pytest.raises(ValidationError, match="initial") as caught:
        Provider().issuer(initial=initial)
    assert SECRET not in str(caught.value)


async def test_an_unchanged_set_is_not_read_again(clock):
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    ring = keys.ring
    clock.advance(600)
    await keys.obtain(clock)
    assert keys.ring is ring
    provider.publish(A, B)
    clock.advance(600)
    await keys.obtain(clock)
    assert keys.ring.keys[0] is ring.keys[0]


# --- keys that are not there -----------------------------------------------------------------------------------------


async def test_a_rotation_is_seen_at_once(clock):
    """JK-07."""
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    provider.publish(B)
    assert keys.ask(("ES256", "b"), clock) == 0
    await keys.obtain(clock, ("ES256", "b"))
    assert keys.ring.fitting("ES256", "b")
    assert not keys.ring.fitting("ES256", "a")


async def test_a_key_that_a_fetch_did_not_bring_is_absent_for_a_while(clock):
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    name = ("ES256", "b")
    assert keys.ask(name, clock) == 0
    await keys.obtain(clock, name)
    for _ in range(100):
        assert keys.is_absent(name, clock)
        await keys.obtain(clock, name)
    assert provider.fetches == 2
    clock.advance(30)
    assert not keys.is_absent(name, clock)
    provider.publish(A, B)
    await keys.obtain(clock, name)
    assert keys.ring.fitting(*name)


async def test_random_key_ids_cost_the_burst_and_one_fetch_per_cool_down(clock):
    """JK-06: 10,000 of them within a hundred seconds."""
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    waits = []
    for number in range(10_000):
        name = ("ES256", f"random-{number}")
        wait = keys.ask(name, clock)
        if wait:
            waits.append(wait)
        else:
            await keys.obtain(clock, name)
        clock.advance(0.01)
    assert provider.fetches - 1 <= 3 + 100 // 30
    assert max(waits) <= 30
    assert len(keys._asked) <= 1_024


async def test_a_rotation_during_such_a_flood_is_seen_within_one_cool_down(clock):
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    wanted = ("ES256", "b")
    seen = None
    for number in range(10_000):
        if number == 2_000:
            provider.publish(A, B)
            rotated = clock.monotonic()
        if number >= 2_000 and seen is None:
            if not keys.ring.fitting(*wanted) and keys.ask(wanted, clock) == 0:
                await keys.obtain(clock, wanted)
            if keys.ring.fitting(*wanted):
                seen = clock.monotonic()
        name = ("ES256", f"random-{number}")
        if keys.ask(name, clock) == 0:
            await keys.obtain(clock, name)
        clock.advance(0.01)
    assert seen is not None
    assert seen - rotated <= 30
    assert keys.ring.fitting(*wanted)


async def test_who_was_told_to_wait_is_refused_after_the_next_fetch(clock):
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    for number in range(3):
        name = ("ES256", f"random-{number}")
        assert keys.ask(name, clock) == 0
        await keys.obtain(clock, name)
    patient = ("ES256", "patient")
    assert keys.ask(patient, clock) == 30
    assert not keys.is_absent(patient, clock)
    with pytest.raises(KeysUnavailableError):
        await keys.obtain(clock, patient)
    clock.advance(30)
    other = ("ES256", "other")
    assert keys.ask(other, clock) == 0
    await keys.obtain(clock, other)
    assert keys.is_absent(patient, clock)


# --- one fetch for all -----------------------------------------------------------------------------------------------


async def test_a_hundred_who_wait_share_one_fetch(clock):
    provider = Provider(A)
    provider.hold = anyio.Event()
    keys = fetched(provider)
    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(keys.obtain, clock, ES256_A)
        await anyio.wait_all_tasks_blocked()
        provider.hold.set()
    assert provider.fetches == 1


async def test_those_who_leave_take_nothing_from_those_who_stay(clock):
    """The one that fetches is cancelled, and so are half of those that wait."""
    provider = Provider(A)
    provider.hold = anyio.Event()
    keys = fetched(provider)
    arrived = []

    async def wait() -> None:
        await keys.obtain(clock)
        arrived.append(1)

    leaving = []

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
        provider.hold.set()
    assert provider.fetches == 1
    assert len(arrived) >= 10, "all who stayed"
    assert keys.remaining(clock) == 480


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("leave", ["cancel", "timeout"])
async def test_clients_that_leave_cannot_end_a_fetch_however_often_they_do(leave, clock):
    """What asyncio cancels is a task, and no scope shields from that: a server that does so when a client disconnects
    would let anybody keep the keys away from all others."""
    import asyncio

    provider = Provider(A)
    provider.hold = anyio.Event()
    keys = fetched(provider)

    async def give_up() -> None:
        async with asyncio.timeout(0):
            await keys.obtain(clock)

    staying = asyncio.create_task(keys.obtain(clock))
    for _ in range(10):
        leaving = asyncio.create_task(keys.obtain(clock) if leave == "cancel" else give_up())
        await anyio.wait_all_tasks_blocked()
        leaving.cancel()
        with pytest.raises((asyncio.CancelledError, TimeoutError)):
            await leaving
    staying.cancel()
    await anyio.wait_all_tasks_blocked()
    provider.hold.set()
    await keys.obtain(clock)
    assert provider.fetches == 1
    assert keys.remaining(clock) == 480


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_fetch_that_the_event_loop_kills_is_made_again_by_who_waits(begun, clock):
    import asyncio

    provider = Provider(A)
    provider.hold = anyio.Event()
    keys = fetched(provider)
    waiting = [asyncio.create_task(keys.obtain(clock)) for _ in range(2)]
    await asyncio.sleep(0)
    if begun:
        await anyio.wait_all_tasks_blocked()
    assert keys._flight.task is not None
    keys._flight.task.cancel()
    provider.hold.set()
    await asyncio.gather(*waiting)
    assert provider.fetches == (2 if begun else 1)


def test_a_fetch_that_ended_with_its_event_loop_holds_nobody_up(clock):
    provider = Provider(A)
    keys = fetched(provider)

    async def leave_one_behind() -> None:
        keys._flight = Flight()

    async def obtain() -> None:
        with anyio.fail_after(20):
            await keys.obtain(clock)

    anyio.run(leave_one_behind)
    anyio.run(obtain)
    assert keys.remaining(clock) == 480


async def test_a_refresh_never_stalls_the_event_loop_for_long(clock):
    """64 RSA keys are read one by one; the others have their turn in between."""
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    provider.published = [{**RS, "kid": f"r{number}"} for number in range(64)]
    turns = 0
    done = anyio.Event()

    async def others() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(others)
        await anyio.lowlevel.checkpoint()
        clock.advance(600)
        turns = 0
        await keys.obtain(clock)
        done.set()
    assert turns > 60


def test_nothing_that_was_fetched_is_in_the_repr():
    provider = Provider(A)
    keys = fetched(provider, initial={"keys": [A.jwk()]})
    assert A.jwk()["x"] not in repr(keys) + repr(provider.issuer(initial={"keys": [A.jwk()]}))


async def test_closing_closes_the_transport(clock):
    provider = Provider(A)
    keys = fetched(provider)
    await keys.obtain(clock)
    await keys.obtain(clock)
    assert provider.closed == 0
    await keys.aclose()
    assert provider.closed == 1
