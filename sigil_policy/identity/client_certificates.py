"""Confirms that who presents a token came with the TLS certificate that it is bound to (`cnf` with `x5t#S256`).

    BearerAuth(issuers=[...], sender=ClientCertificate(trusted_proxies=["10.0.0.0/8"]))
    BearerAuth(issuers=[...], sender=ClientCertificate(trusted_proxies=["unix"], form="pem", header="X-SSL-Cert"))
    BearerAuth(issuers=[...], sender=ClientCertificate())               # the server ends TLS itself, and says so

Where a proxy ends TLS, it hands the client's certificate on in a header, in one of three forms:

| form | default header | who writes it |
|---|---|---|
| "rfc9440" | `Client-Cert` | the standard: the certificate's DER in base64, between colons |
| "pem" | `ssl-client-cert` | nginx (`$ssl_client_escaped_cert`), AWS: a PEM, percent-encoded |
| "xfcc" | `x-forwarded-client-cert` | Envoy: the `Hash` of its only element |

Guarantees:

* **Only a trusted proxy is believed**: the header is read where the peer that the server saw is one of
  `trusted_proxies`, and from anybody else it counts as none. The proxy has to take the header away from what clients
  send (RFC 9440 section 4). The peer has to be the proxy's own address: a server that puts the client's in its place
  (uvicorn with `--proxy-headers`) makes every certificate count as none.
* **One certificate or none.** A header that comes twice, is malformed, or names several certificates counts as none.
* **The TLS extension of ASGI** is asked where the peer is no trusted proxy: of a proxy it would be the proxy's own. A
  certificate that the server could not verify counts as none.
* Certificates are hashed and compared, not read: whoever ends TLS has made sure that the client holds the key, and
  whether the certificate is in date or of an authority is what that one was told to check.

RFC 8705 section 3; RFC 9440; ASGI TLS extension 0.2.
"""

import re
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from sigil_policy.core.exchange import Exchange
from sigil_policy.identity.callers import TrustedProxies
from sigil_policy.identity.fields import CONFIG, HeaderName
from sigil_policy.wire.forwarded import is_trusted, parse_address

Form = Literal["rfc9440", "pem", "xfcc"]

MAX_CERTIFICATE = 16_384
"""Bytes of a header that holds a certificate; anything longer counts as none."""

_NAMES: dict[Form, str] = {
    "rfc9440": "Client-Cert",
    "pem": "ssl-client-cert",
    "xfcc": "x-forwarded-client-cert",
}
_PEM = re.compile(rb"\s*+-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]++)-----END CERTIFICATE-----\s*+")
# One element of pairs; a value in quotes may hold anything. A quote that is never closed matches nothing.
_PAIR = re.compile(rb'([A-Za-z]+)=("(?:[^"\\]|\\.)*+"|[^",;]*+)(?:;|\Z)', re.DOTALL)
# Certificates have fewer, and each takes time.
_MAX_ESCAPES = 1_024
_MAX_PAIRS = 128
_HASH = re.compile(rb"[0-9A-Fa-f]{64}")


@dataclass(frozen=True, kw_only=True, config=CONFIG)
class ClientCertificate:
    """Tokens bound to a client's certificate take a connection with that certificate; the module says what holds.

        ClientCertificate(trusted_proxies=["10.0.0.0/8"])

    Options:
        trusted_proxies: networks of proxies, and "unix" for one on a unix socket, whose header is believed (default
            none: only the TLS extension is asked).
        form: how they write it: "rfc9440" (default), "pem" or "xfcc"; see the module.
        header: the header that they write (default: that of the form).

    Raises `ValidationError` (a `ValueError`) for an option that cannot be.
    """

    trusted_proxies: TrustedProxies = ()
    form: Form = "rfc9440"
    header: HeaderName | None = None

    @model_validator(mode="after")
    def _prepare(self) -> "ClientCertificate":
        if not self.trusted_proxies and (self.header is not None or self.form != "rfc9440"):
            raise ValueError("form and header say what proxies write: name those that are believed in trusted_proxies")
        _ = self._networks, self._trusts_socket, self._name, self._read
        return self

    @cached_property
    def _networks(self) -> tuple[Any, ...]:
        return tuple(proxy for proxy in self.trusted_proxies if proxy != "unix")

    @cached_property
    def _trusts_socket(self) -> bool:
        return "unix" in self.trusted_proxies

    @cached_property
    def _name(self) -> bytes:
        return (self.header or _NAMES[self.form]).lower().encode("ascii")

    @cached_property
    def _read(self) -> Callable[[bytes], bytes]:
        readers: dict[Form, Callable[[bytes], bytes]] = {"rfc9440": _byte_sequence, "pem": _escaped_pem, "xfcc": _xfcc}
        return readers[self.form]

    def thumbprint(self, ex: Exchange) -> str | None:
        """The `x5t#S256` of the certificate that the client of `ex` came with, or None."""
        try:
            digest = self._from_header(ex) if self._is_proxied(ex) else _from_tls(ex)
        except ValueError:
            return None
        return None if digest is None else urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")

    def _is_proxied(self, ex: Exchange) -> bool:
        peer = ex.client
        return self._trusts_socket if peer is None else is_trusted(parse_address(peer), self._networks)

    def _from_header(self, ex: Exchange) -> bytes | None:
        value = ex.headers.get(self._name)
        if value is None or self._name in ex.repeated or len(value) > MAX_CERTIFICATE:
            return None
        return self._read(value)


def _from_tls(ex: Exchange) -> bytes | None:
    tls = (ex.scope.get("extensions") or {}).get("tls")
    if not isinstance(tls, dict) or tls.get("client_cert_error"):
        return None
    for certificate in tls.get("client_cert_chain") or ():
        # The client's own is the first.
        return _pem(certificate.encode("ascii")) if isinstance(certificate, str) else None
    return None


def _byte_sequence(value: bytes) -> bytes:
    """RFC 9440 section 2.2: one Byte Sequence (RFC 9651 section 3.3.5), without parameters."""
    value = value.strip(b" ")
    if len(value) < 3 or value[:1] != b":" or value[-1:] != b":":
        raise ValueError("not a byte sequence")
    return _digest(value[1:-1])


def _escaped_pem(value: bytes) -> bytes:
    if value.count(b"%") > _MAX_ESCAPES:
        raise ValueError("too many escapes")
    return _pem(unquote_to_bytes(value))


def _pem(text: bytes) -> bytes:
    found = _PEM.fullmatch(text)
    if found is None:
        raise ValueError("not one certificate in PEM")
    return _digest(b"".join(found[1].split()))


def _digest(encoded: bytes) -> bytes:
    der = b64decode(encoded, validate=True)
    if not der:
        raise ValueError("no certificate")
    return sha256(der).digest()


def _xfcc(value: bytes) -> bytes:
    hashes, position = [], 0
    for _ in range(_MAX_PAIRS):
        pair = _PAIR.match(value, position)
        if pair is None:
            break
        position = pair.end()
        if pair[1].lower() == b"hash":
            hashes.append(pair[2].strip(b'"'))
    # What is left begins with a comma, and is the element of another proxy: which is the client's would be a guess.
    if position < len(value) or len(hashes) != 1 or not _HASH.fullmatch(hashes[0]):
        raise ValueError("not one hash")
    return bytes.fromhex(hashes[0].decode("ascii"))
