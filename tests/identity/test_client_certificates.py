"""RFC 8705 section 3, RFC 9440: which certificate a client came with, and whose word for it counts."""

import datetime as dt
from base64 import b64decode, b64encode
from functools import cache
from typing import Any
from urllib.parse import quote

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.host import PLAIN
from sigil_policy.core.problems import DEFAULT_STYLE
from sigil_policy.identity.client_certificates import MAX_CERTIFICATE, ClientCertificate
from sigil_policy.testing import FrozenClock
from tests.identity.material import NOW, private_key
from tests.identity.proofs import base64url_hash, escaped

PROXY = "10.0.0.7"
TRUSTING = {"trusted_proxies": ["10.0.0.0/8"]}

# RFC 9440 section 2.2 and appendix A: the certificate of "BC", as the header has it.
RFC_9440 = (
    b":MIIBqDCCAU6gAwIBAgIBBzAKBggqhkjOPQQDAjA6MRswGQYDVQQKDBJMZXQncyBBdXRoZW50aWNhdGUxGzAZBgNVBAMMEkxBIEludGVybWVkaWF0"
    b"ZSBDQTAeFw0yMDAxMTQyMjU1MzNaFw0yMTAxMjMyMjU1MzNaMA0xCzAJBgNVBAMMAkJDMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE8YnXXfaUgm"
    b"nMtOXU/IncWalRhebrXmckC8vdgJ1p5Be5F/3YC8OthxM4+k1M6aEAEFcGzkJiNy6J84y7uzo9M6NyMHAwCQYDVR0TBAIwADAfBgNVHSMEGDAWgBRm"
    b"3WjLa38lbEYCuiCPct0ZaSED2DAOBgNVHQ8BAf8EBAMCBsAwEwYDVR0lBAwwCgYIKwYBBQUHAwIwHQYDVR0RAQH/BBMwEYEPYmRjQGV4YW1wbGUuY2"
    b"9tMAoGCCqGSM49BAMCA0gAMEUCIBHda/r1vaL6G3VliL4/Di6YK0Q6bMjeSkC3dFCOOB8TAiEAx/kHSB4urmiZ0NX5r5XarmPk0wmuydBVoU4hBVZ1"
    b"yhk=:"
)


@cache
def certificate(name: str = "client") -> x509.Certificate:
    key = private_key("ES256")
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin = dt.datetime.fromtimestamp(NOW, dt.UTC)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    made = made.serial_number(7).not_valid_before(begin).not_valid_after(begin + dt.timedelta(days=1))
    return made.sign(key, hashes.SHA256())


def der(name: str = "client") -> bytes:
    return certificate(name).public_bytes(Encoding.DER)


def pem(name: str = "client") -> str:
    return certificate(name).public_bytes(Encoding.PEM).decode()


def sha256_of(name: str = "client") -> str:
    return base64url_hash(der(name))


def hex_of(name: str = "client") -> str:
    return certificate(name).fingerprint(hashes.SHA256()).hex()


def exchange(*lines: tuple[str, bytes], peer: str | None = PROXY, tls: Any = None) -> Exchange:
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [(name.lower().encode(), value) for name, value in lines],
        "client": None if peer is None else (peer, 50_000),
        "extensions": {} if tls is None else {"tls": tls},
    }
    return Exchange(scope, anyio.sleep_forever, FrozenClock(NOW), PLAIN, DEFAULT_STYLE)


def found(sender: ClientCertificate, *lines: tuple[str, bytes], **options: Any) -> str | None:
    return sender.thumbprint(exchange(*lines, **options))


def test_the_certificate_of_rfc_9440():
    """RFC 9440 section 2.2; RFC 8705 section 3.1: x5t#S256 is the hash of the DER."""
    der_of_rfc = b64decode(RFC_9440[1:-1])
    assert x509.load_der_x509_certificate(der_of_rfc).subject.rfc4514_string() == "CN=BC"
    assert found(ClientCertificate(**TRUSTING), ("Client-Cert", RFC_9440)) == base64url_hash(der_of_rfc)


def test_a_thumbprint_is_43_characters_of_base64url():
    """RFC 8705 section 3.1."""
    made = found(ClientCertificate(**TRUSTING), ("Client-Cert", escaped(der())))
    assert made == sha256_of()
    assert len(made) == 43


@pytest.mark.parametrize(
    ("form", "header", "value"),
    [
        pytest.param("rfc9440", "Client-Cert", escaped(der()), id="RFC 9440"),
        pytest.param("rfc9440", "Client-Cert", b" " + escaped(der()) + b" ", id="RFC 9440 with blanks around"),
        pytest.param("pem", "ssl-client-cert", quote(pem(), safe="").encode(), id="nginx"),
        pytest.param("pem", "ssl-client-cert", quote(pem(), safe="+=/").encode(), id="AWS"),
        pytest.param("xfcc", "x-forwarded-client-cert", f"Hash={hex_of()}".encode(), id="Envoy"),
        pytest.param("xfcc", "x-forwarded-client-cert", f"By=spiffe://a;Hash={hex_of().upper()}".encode(), id="caps"),
        pytest.param("xfcc", "x-forwarded-client-cert", f'Hash="{hex_of()}"'.encode(), id="Envoy in quotes"),
        pytest.param(
            "xfcc", "x-forwarded-client-cert",
            f'By=x;Hash={hex_of()};Subject="CN=a,O=\\"b;Hash=1\\"";URI=;Cert="{quote(pem())}"'.encode(),
            id="Envoy with all",
        ),
    ],
)  # fmt: skip
def test_every_form_names_the_same_certificate(form, header, value):
    assert found(ClientCertificate(form=form, **TRUSTING), (header, value)) == sha256_of()
    own = ClientCertificate(form=form, header="X-Own", **TRUSTING)
    assert found(own, ("X-Own", value)) == sha256_of()
    assert found(own, (header, value)) is None


@pytest.mark.parametrize("peer", ["203.0.113.7", "11.0.0.7", "::ffff:203.0.113.7", None, "nonsense", ""])
def test_nobody_but_a_trusted_proxy_is_believed(peer):
    """RFC 9440 section 4."""
    line = ("Client-Cert", escaped(der()))
    sender = ClientCertificate(**TRUSTING)
    assert found(sender, line, peer=peer) is None
    assert found(sender, line, ("x-forwarded-for", PROXY.encode()), peer=peer) is None
    assert found(ClientCertificate(), line, peer=peer) is None


def test_proxies_are_networks_and_sockets():
    line = ("Client-Cert", escaped(der()))
    assert found(ClientCertificate(trusted_proxies=["unix"]), line, peer=None) == sha256_of()
    assert found(ClientCertificate(trusted_proxies=["unix"]), line) is None
    assert found(ClientCertificate(trusted_proxies=["fd00::/8"]), line, peer="fd00::1") == sha256_of()
    assert found(ClientCertificate(**TRUSTING), line, peer=f"::ffff:{PROXY}") == sha256_of()


def test_a_pem_has_so_many_escapes_and_no_more():
    sender = ClientCertificate(form="pem", **TRUSTING)
    for blanks, good in ((900, True), (1_100, False)):
        value = quote(pem() + "\n" * blanks).encode()
        assert len(value) < MAX_CERTIFICATE
        assert (found(sender, ("ssl-client-cert", value)) is not None) is good


def test_a_header_that_comes_twice_counts_as_none():
    line = ("Client-Cert", escaped(der()))
    sender = ClientCertificate(**TRUSTING)
    assert found(sender, line, line) is None
    assert found(sender, ("Client-Cert", escaped(der()) + b", " + escaped(der("other")))) is None
    assert found(sender) is None


@pytest.mark.parametrize(
    ("form", "value"),
    [
        *((form, value) for form in ("rfc9440", "pem", "xfcc") for value in (b"", b"x", b":", b"::", b":::", b"\xff")),
        ("rfc9440", b64encode(der())),
        ("rfc9440", escaped(der())[:-1]),
        ("rfc9440", escaped(der()) + b";a=1"),
        ("rfc9440", b":" + b64encode(der()).replace(b"M", b"*", 1) + b":"),
        ("rfc9440", b":" + b64encode(der()).rstrip(b"=")[:-1] + b":"),
        ("rfc9440", b":" + b64encode(bytes(MAX_CERTIFICATE)) + b":"),
        ("rfc9440", f'"{pem()}"'.encode()),
        ("pem", quote(pem() + pem("other")).encode()),
        ("pem", quote(pem().replace("CERTIFICATE", "PUBLIC KEY")).encode()),
        ("pem", quote("x" + pem()).encode()),
        ("pem", b"-----BEGIN CERTIFICATE-----%20-----END CERTIFICATE-----"),
        ("pem", escaped(der())),
        ("xfcc", f"Hash={hex_of()},Hash={hex_of('other')}".encode()),
        ("xfcc", f"By=a,Hash={hex_of()}".encode()),
        ("xfcc", f"Hash={hex_of()};Hash={hex_of('other')}".encode()),
        ("xfcc", f"Hash={hex_of()}; Hash={hex_of()}".encode()),
        ("xfcc", f"Hash={hex_of()[:-1]}".encode()),
        ("xfcc", f'Subject="Hash={hex_of()}"'.encode()),
        ("xfcc", f'Subject="open;Hash={hex_of()}'.encode()),
        ("xfcc", b"By=x;Hash="),
    ],
    ids=range(38),
)  # fmt: skip
def test_what_is_malformed_counts_as_none(form, value):
    sender = ClientCertificate(form=form, header="X-Cert", **TRUSTING)
    assert found(sender, ("X-Cert", value)) is None


@given(
    st.sampled_from(["rfc9440", "pem", "xfcc"]),
    st.binary(max_size=300) | st.text('Hash=;,"\\:% -BEGINCRT', max_size=99),
)
def test_whatever_a_header_says_nothing_is_raised(form, value):
    sender = ClientCertificate(form=form, header="X-Cert", **TRUSTING)
    found(sender, ("X-Cert", value if isinstance(value, bytes) else value.encode()))


@given(st.data())
def test_a_mutated_certificate_is_another_one(data):
    made = bytearray(escaped(der()))
    place = data.draw(st.integers(0, len(made) - 1))
    made[place] ^= data.draw(st.integers(1, 255))
    if found(ClientCertificate(**TRUSTING), ("Client-Cert", bytes(made))) == sha256_of():
        assert b64decode(bytes(made)[1:-1], validate=True) == der(), "but for bits that mean nothing"


def tls_of(*chain: Any, error: str | None = None) -> dict[str, Any]:
    return {"client_cert_chain": list(chain), "client_cert_error": error, "server_cert": None}


def test_a_server_that_ends_tls_itself_says_who_came():
    """ASGI TLS extension 0.2: the client's certificate is the first of the chain."""
    for sender in (ClientCertificate(), ClientCertificate(**TRUSTING)):
        assert found(sender, peer="203.0.113.7", tls=tls_of(pem(), pem("authority"))) == sha256_of()
    for tls in (
        tls_of(),
        tls_of(pem(), error="not trusted"),
        tls_of("nonsense"),
        tls_of("é"),
        tls_of(7),
        tls_of(der()),
        {"client_cert_chain": None},
        {},
        [],
        "tls",
    ):
        assert found(ClientCertificate(), peer="203.0.113.7", tls=tls) is None


def test_the_certificate_of_the_proxy_is_not_the_clients():
    sender = ClientCertificate(**TRUSTING)
    proxy = tls_of(pem("proxy"))
    assert found(sender, tls=proxy) is None
    assert found(sender, ("Client-Cert", escaped(der())), tls=proxy) == sha256_of()
    stranger = found(sender, ("Client-Cert", escaped(der())), peer="203.0.113.7", tls=tls_of(pem("stranger")))
    assert stranger == sha256_of("stranger"), "of the connection, not of what it says in a header"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "der", **TRUSTING}, "form"),
        ({"header": "a b", **TRUSTING}, "HTTP token"),
        ({"header": "X-Cert"}, "trusted_proxies"),
        ({"form": "pem"}, "trusted_proxies"),
        ({"trusted_proxies": ["0.0.0.0/0"]}, "everybody"),
        ({"trusted_proxies": ["proxy.internal"]}, "trusted_proxies"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_what_cannot_be_fails_when_it_is_made(options, said):
    with pytest.raises(ValidationError, match=said):
        ClientCertificate(**options)
