"""Resource identifiers, and where the metadata of one is found (RFC 9728 sections 1.2 and 3.1, RFC 8707 section 2).

resource_path("https://api.example.com/mcp")    # "/mcp"
metadata_url("https://api.example.com/mcp")
                                # "https://api.example.com/.well-known/oauth-protected-resource/mcp"
metadata_url("https://api.example.com/")        # "https://api.example.com/.well-known/oauth-protected-resource"
"""

import re
from urllib.parse import urlsplit

from sigil_policy.wire.origins import is_origin

WELL_KNOWN = "/.well-known/oauth-protected-resource"

_PATH = re.compile(r"(?:/[A-Za-z0-9._~!$&'()+,;=:@-]*)*")
_LOOPBACK = frozenset(("localhost", "127.0.0.1", "::1"))


def check_url(url: str, *, allow_loopback: bool = False) -> None:
    """`ValueError`, which says what to write, unless `url` identifies a server: https, no query, no fragment.

    With `allow_loopback` also plain http, to this machine.
    """
    scheme, separator, rest = url.partition("://")
    found = re.search(r"[/?#]", rest)
    authority, path = (rest[: found.start()], rest[found.start() :]) if found else (rest, "")
    loopback = scheme == "http" and urlsplit(f"//{authority}").hostname in _LOOPBACK if authority else False
    if loopback and not allow_loopback:
        raise ValueError(f"{url!r} is plain http to this machine; for development, say so with allow_loopback=True")
    if not separator or (scheme != "https" and not loopback):
        raise ValueError(f"{url!r} must be an https URL, for example 'https://api.example.com/mcp'")
    if not is_origin(f"{scheme}://{authority}"):
        raise ValueError(f"{url!r}: write the host in lower case, without a user, and without the port it has anyway")
    if _PATH.fullmatch(path) is None or not {".", ".."}.isdisjoint(path.split("/")):
        raise ValueError(
            f"{url!r}: no query, no fragment, no dot segment and nothing percent-encoded may stand in it "
            "(RFC 9728 section 1.2)"
        )


def resource_path(resource: str) -> str:
    """The path of a resource identifier; a `/` that is the whole path counts as none (RFC 9728 section 3.1)."""
    path = urlsplit(resource).path
    return "" if path == "/" else path


def metadata_url(resource: str) -> str:
    """Where the metadata of `resource` is: the well-known path stands between its host and its path."""
    parts = urlsplit(resource)
    return f"{parts.scheme}://{parts.netloc}{WELL_KNOWN}{resource_path(resource)}"
