"""Where the server is, and how to get in: one URL.

    Address.parse("rediss://app:s3cret@cache.example.com:6380/1?ssl_ca_certs=/etc/ssl/cache.pem")

| URL | what it means |
|---|---|
| `redis://[user:password@]host[:port][/db]` | one server; `valkey://` is the same |
| `rediss://...`, `valkeys://...` | over TLS; the certificate is verified |
| `unix://[user:password@]/path[?db=1]` | its socket in the file system; also `redis+unix://`, `valkey+unix://` |
| `redis+cluster://host:port,host:port` | a cluster, found through any of these nodes; also `rediss+cluster://` |
| `redis+sentinel://host:port,host:port/service[/db]` | the primary that the sentinels name; also `rediss+sentinel://` |

What is reserved in a URL is percent-encoded in user, password and path. After `?`:

    db                    the number of the database (default 0)
    client_name           how `CLIENT LIST` calls us (default `sigil-policy`)
    ssl_ca_certs          file of the authorities to trust (default: the machine's)
    ssl_certfile          file of our certificate, where the server wants one; with `ssl_keyfile`
    ssl_check_hostname    `false` accepts the certificate of another host
    ssl_cert_reqs         `none` accepts any certificate: anybody on the way can read and change everything
    sentinel_username     to get into the sentinels; user and password of the URL are the server's own
    sentinel_password

Guarantees: a URL that cannot work fails here with a `ValueError`, and neither that error nor any repr shows a part of
it that could be secret.
"""

import ssl
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, NoReturn
from urllib.parse import parse_qsl, unquote

Kind = Literal["single", "cluster", "sentinel"]

_SCHEMES = ("redis", "rediss", "valkey", "valkeys")
_EXPECTED = (
    "redis://host:6379/0, rediss:// for TLS, unix:///path, redis+cluster://host:port,host:port "
    "or redis+sentinel://host:port,host:port/service/0 (valkey is the same as redis)"
)
_PLAIN = frozenset(("db", "client_name"))
_TLS = frozenset(("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "ssl_cert_reqs"))
_SENTINEL = frozenset(("sentinel_username", "sentinel_password"))


class Endpoint(NamedTuple):
    """One server: a host and its port, or the path of a socket."""

    host: str
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        return self.path or (f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a server wants to hear first. Its repr shows nothing."""

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)


_NOBODY = Credentials()


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """What a URL says. Made by `Address.parse`."""

    kind: Kind
    endpoints: tuple[Endpoint, ...]
    credentials: Credentials
    db: int
    client_name: str
    tls: ssl.SSLContext | None = field(repr=False)
    service: str = ""
    sentinels: Credentials = _NOBODY

    def __str__(self) -> str:
        return ",".join(map(str, self.endpoints)) + (f"/{self.service}" if self.service else "")

    @staticmethod
    def parse(url: str) -> "Address":
        """Read a URL. Raises `ValueError` if it is none of those above."""
        scheme, slashes, rest = url.partition("://")
        if not slashes:
            _refuse("has no scheme, or no '://' behind it")
        base, _, form = scheme.lower().partition("+")
        if base == "unix" and not form:
            base, form = "redis", "unix"
        if base not in _SCHEMES or form not in ("", "unix", "cluster", "sentinel"):
            _refuse("has another scheme")
        if "#" in rest or not rest.isprintable() or " " in rest:
            _refuse("has a '#', a blank or a control character; percent-encode it")
        rest, _, query = rest.partition("?")
        netloc, _, rest = rest.partition("/")
        try:
            options = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        except ValueError:
            _refuse("has something after '?' that is not name=value")
        secure = base.endswith("s") and base != "redis"
        known = _PLAIN | (_TLS if secure else frozenset()) | (_SENTINEL if form == "sentinel" else frozenset())
        given = dict(options)
        if len(given) < len(options) or not given.keys() <= known:
            _refuse(f"has an option that is unknown here, or given twice; known are {', '.join(sorted(known))}")
        user, hosts = _split_user(netloc)
        path = [unquote(part) for part in rest.split("/")] if form != "unix" and rest else []
        service = ""
        if form == "unix":
            if hosts or secure or not rest:
                _refuse("should be unix:///path/of/the.sock, without host and TLS")
            endpoints: tuple[Endpoint, ...] = (Endpoint("", 0, "/" + unquote(rest)),)
        else:
            port = 26_379 if form == "sentinel" else 6_379
            names = hosts.split(",")
            if len(names) > 1 and not form:
                _refuse("names several hosts; write redis+cluster:// or redis+sentinel://")
            endpoints = tuple(_endpoint(name, port, form) for name in names)
        if form == "sentinel":
            service = path.pop(0) if path else ""
            if not service:
                _refuse("should end with the name that the sentinels know: redis+sentinel://host:port/service")
        if len(path) > 1 or (path and path[0] and "db" in given):
            _refuse("has a path that is not the number of a database")
        db = _number(path[0] if path and path[0] else given.get("db", "0"), "the database", 2**31)
        if form == "cluster" and db:
            _refuse("names a database; a cluster has only 0")
        return Address(
            kind="cluster" if form == "cluster" else "sentinel" if form == "sentinel" else "single",
            endpoints=endpoints,
            credentials=user,
            db=db,
            client_name=_client_name(given.get("client_name", "sigil-policy")),
            tls=_context(given) if secure else None,
            service=service,
            sentinels=Credentials(given.get("sentinel_username", ""), given.get("sentinel_password", "")),
        )


def _refuse(problem: str) -> NoReturn:
    # Nothing of the URL is repeated: where it is wrong, any part of it may be a piece of the password.
    raise ValueError(f"the URL of the store {problem}. Expected: {_EXPECTED}") from None


def _split_user(netloc: str) -> tuple[Credentials, str]:
    user, at, hosts = netloc.rpartition("@")
    if not at:
        return _NOBODY, netloc
    name, colon, password = user.partition(":")
    if not colon or not password or "@" in user:
        _refuse("should say user:password@host or :password@host, both percent-encoded")
    return Credentials(unquote(name), unquote(password)), hosts


def _endpoint(text: str, port: int, form: str) -> Endpoint:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            _refuse("has an IPv6 address that is not like [::1]:6379")
        number = rest[1:]
    else:
        host, _, number = text.partition(":")
    if not host:
        if form or text:
            _refuse("has a host without a name")
        host = "localhost"
    if len(host) > 253 or not host.isascii() or not host.isprintable() or " " in host or "%" in host:
        _refuse("has a host that is no name of one")
    return Endpoint(host, _number(number, "the port", 65_536, 1) if number else port)


def _number(text: str, what: str, end: int, start: int = 0) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and start <= int(text) < end):
        _refuse(f"has something for {what} that is not a number from {start} to {end - 1}")
    return int(text)


def _client_name(name: str) -> str:
    if not name or not name.isascii() or not name.isprintable() or " " in name:
        _refuse("has a client_name that is not one printable word")
    return name


def _context(given: dict[str, str]) -> ssl.SSLContext:
    verify = given.get("ssl_cert_reqs", "required")
    check = given.get("ssl_check_hostname", "true").lower()
    if verify not in ("required", "none") or check not in ("true", "false"):
        _refuse("should have ssl_cert_reqs=required or none, and ssl_check_hostname=true or false")
    if "ssl_keyfile" in given and "ssl_certfile" not in given:
        _refuse("has an ssl_keyfile without its ssl_certfile")
    try:
        context = ssl.create_default_context(cafile=given.get("ssl_ca_certs"))
        if "ssl_certfile" in given:
            context.load_cert_chain(given["ssl_certfile"], given.get("ssl_keyfile"))
    except OSError as error:
        _refuse(f"names a certificate, key or authority that cannot be loaded ({type(error).__name__})")
    context.check_hostname = check == "true" and verify == "required"
    context.verify_mode = ssl.CERT_REQUIRED if verify == "required" else ssl.CERT_NONE
    return context
