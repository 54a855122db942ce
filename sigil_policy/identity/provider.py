"""What an identity provider publishes, fetched within limits: its metadata and its key set.

    client = make_client(transport=None, tls=trust())
    url = await find_key_set(client, "https://auth.example.com", limit=65_536, loopback=False)
    document = await fetch(client, url, limit=65_536)        # ProviderError, whatever is wrong

Only `https`; plain `http` to this machine's own loopback where the caller says so. Redirects are followed on the same
host only, at most three. Nothing is decompressed, so that a small answer stays small. The caller bounds the time.
OpenID Connect Discovery 1.0, RFC 8414, RFC 7517; RFC 8725 section 3.10.
"""

import re
from functools import cache
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from anyio import CancelScope

from sigil_policy.wire.jws import parse_object

if TYPE_CHECKING:
    import ssl

    import httpx2

_HEADERS = {"accept": "application/json, application/jwk-set+json", "accept-encoding": "identity"}
_REDIRECTS = 3
# Commas in a document: what they divide takes long to read for its length, and everybody waits meanwhile.
_MOST_ITEMS = 4_096
_MOVED = frozenset((301, 302, 303, 307, 308))
_MAX_AGE = re.compile(r"(?:^|[,\s])max-age\s*=\s*\"?(\d{1,9})", re.IGNORECASE)
_SECONDS = re.compile(r"\d{1,9}")


class ProviderError(Exception):
    """The provider gave nothing that can be used. The text is for the operator's log, and shows nothing it sent."""


class Document(NamedTuple):
    """What was fetched, and for how many seconds its sender calls it fresh (None: it does not say)."""

    body: bytes
    max_age: float | None


def load_client() -> Any:
    """The HTTP client's module, loaded where key sets are configured and nowhere else."""
    try:
        import httpx2
    except ImportError:
        raise ImportError("fetched key sets need an extra: pip install 'sigil-policy[identity]'") from None
    return httpx2


@cache
def trust() -> "ssl.SSLContext":
    """Whose certificates are believed: the machine's. Takes a quarter of a second once; call it in a thread."""
    context: ssl.SSLContext = load_client().create_ssl_context()
    return context


def make_client(
    transport: "httpx2.AsyncBaseTransport | None", tls: "ssl.SSLContext | Literal[True]"
) -> "httpx2.AsyncClient":
    """A client that follows nothing by itself, and goes through no proxy that some variable of the environment names.

    It is made for each fetch: a connection that idles between two is of no use, and one that belongs to an event loop
    would be in the way of the next.
    """
    client: httpx2.AsyncClient = load_client().AsyncClient(
        transport=transport, verify=tls, follow_redirects=False, timeout=None, trust_env=False
    )
    return client


async def fetch(client: "httpx2.AsyncClient", url: str, *, limit: int) -> Document:
    """The document at `url`, at most `limit` bytes of it."""
    here = load_client().URL(url)
    for _ in range(_REDIRECTS + 1):
        async with client.stream("GET", here, headers=_HEADERS) as response:
            if response.status_code in _MOVED:
                there = here.join(response.headers.get("location", ""))
                # Whoever can make the provider redirect must not choose where keys come from, nor send us inside.
                if (there.scheme, there.host, there.port) != (here.scheme, here.host, here.port) or there.userinfo:
                    raise ProviderError("redirects to another host")
                here = there
                continue
            if response.status_code != 200:
                raise ProviderError(f"answers {response.status_code}")
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise ProviderError("answers compressed, which was not asked for")
            return Document(await read_body(response, limit), _max_age(response.headers))
    raise ProviderError(f"redirects more than {_REDIRECTS} times")


async def read_body(response: "httpx2.Response", limit: int) -> bytes:
    """The body of `response`; one of more than `limit` bytes is left where that is seen, and a `ProviderError`."""
    body = bytearray()
    # Left by cancellation, which every layer below sees: a loop that is left by an exception would leave them open.
    with CancelScope() as reading:
        async for part in response.aiter_bytes():
            if len(body) <= limit:
                body += part[: limit + 1]
            if len(body) > limit:
                reading.cancel()
    if len(body) > limit:
        raise ProviderError(f"answers with more than {limit} bytes")
    return bytes(body)


async def find_key_set(client: "httpx2.AsyncClient", issuer: str, *, limit: int, loopback: bool) -> str:
    """The `jwks_uri` that `issuer` publishes: by OpenID Connect, or by RFC 8414 where it knows nothing of that."""
    try:
        document = await fetch(client, _openid_url(issuer), limit=limit)
    except ProviderError as error:
        if str(error) not in ("answers 404", "answers 405", "answers 410"):
            raise
        document = await fetch(client, _oauth_url(issuer), limit=limit)
    metadata = read_object(document.body)
    # JK-11: exactly, or one provider could speak for another (RFC 8414 section 3.3).
    if metadata.get("issuer") != issuer:
        raise ProviderError("publishes metadata of another issuer")
    url = metadata.get("jwks_uri")
    try:
        return check_url(url if isinstance(url, str) else "", loopback=loopback)
    except ValueError:
        raise ProviderError("publishes no usable jwks_uri") from None


def read_object(body: bytes) -> dict[str, Any]:
    """The strict JSON object in `body`, of at most 4,096 members and elements."""
    try:
        if body.count(b",") < _MOST_ITEMS:
            return parse_object(body, trusted=True)
    except ValueError:
        pass
    # Outside of the handler: nothing of what was read is chained here.
    raise ProviderError("answers with something that is no JSON object")


def check_url(
    url: str,
    *,
    loopback: bool,
    goods: str = "keys come",
    danger: str = "whoever can change them on the way can sign anything",
) -> str:
    """`url`, if keys may be fetched from there; else `ValueError`. `goods` and `danger` say it of something else."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("a provider is named by a URL, for example 'https://auth.example.com/jwks.json'")
    if parts.username is not None or parts.password is not None or "#" in url:
        raise ValueError("a provider's URL has neither a user or password nor a fragment")
    if parts.scheme == "http" and _is_loopback(host):
        if not loopback:
            raise ValueError(f"{goods} over https; for a provider on this machine write allow_insecure_loopback=True")
    elif parts.scheme != "https":
        raise ValueError(f"{goods} over https: {danger}")
    return url


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _openid_url(issuer: str) -> str:
    # OpenID Connect Discovery 1.0 section 4: appended to the issuer.
    return f"{issuer.rstrip('/')}/.well-known/openid-configuration"


def _oauth_url(issuer: str) -> str:
    # RFC 8414 section 3.1: inserted between the host and the issuer's path.
    parts = urlsplit(issuer)
    return f"{parts.scheme}://{parts.netloc}/.well-known/oauth-authorization-server{parts.path.rstrip('/')}"


def _max_age(headers: Any) -> float | None:
    found = _MAX_AGE.search(headers.get("cache-control", ""))
    if found is None:
        return None
    age = _SECONDS.fullmatch(headers.get("age", "0").strip())
    return max(0.0, float(found[1]) - (float(age[0]) if age else 0.0))
