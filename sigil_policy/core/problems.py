"""RFC 9457 problems: the catalogue's types, the problem that is returned or raised, and how it looks on the wire.

    AgentNotFound = ProblemType(code="AGT_001", title="AgentNotFoundError", status=404,
                                hints=["List available agents with GET /v7/agents"])

    raise AgentNotFound(detail=f"Agent '{name}' not found")

A policy returns a problem, an application raises it (with `Problems` mounted it is answered). Titles are the same for
every occurrence of a type (RFC 9457 section 3.1.3); what differs goes into `detail`, which is written for the client:
no secret, no path of the machine, no `str(exc)`.
"""

import json
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlsplit

from sigil_policy.core.facts import Correlation
from sigil_policy.wire.caching import merge_vary
from sigil_policy.wire.languages import is_language, look_up

if TYPE_CHECKING:
    from sigil_policy.core.exchange import Exchange

HeaderPairs = Sequence[tuple[bytes, bytes]]
Messages = Mapping[str, Mapping[str, str]]

_CODE = re.compile(r"[A-Z]+(?:_[A-Z]+)*_\d{3}")
_EXTENSION = re.compile(r"[A-Za-z][A-Za-z0-9_]{2,}")
_ROUNDING = 1e-6  # a moment of time is exact to a quarter of a microsecond
_MEMBERS = frozenset(
    ("type", "title", "status", "detail", "instance", "error_code", "timestamp", "request_id", "recovery_hints")
)
OWNED = frozenset(("AUTH", "RATE", "CTX", "REQ", "API", "SRV"))
"""Components whose codes belong to the library; AGT, MEM, EVO, ORCH, WS and all others to applications."""

_REGISTRY: dict[str, "ProblemType"] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A whole response that a policy answers with.

    `code` is the close code where a WebSocket server cannot send a response instead (default 1008, policy violation).
    `reraise` keeps the pending error going to the server after `on_error` has answered it. `after` is awaited once the
    response has been sent.
    """

    status: int = 200
    headers: HeaderPairs = ()
    body: bytes = b""
    code: int = 1008
    reraise: bool = False
    after: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemType:
    """One kind of problem: its registered code, its title, its status, what helps, and what it means.

    Calling it makes an occurrence. Declaring a second, different type under a code that is taken is refused, and so is
    a code whose component the library owns (AUTH, RATE, CTX, REQ, API, SRV).
    """

    code: str
    title: str
    status: int
    hints: tuple[str, ...] = ()
    description: str = ""

    def __init__(self, *, code: str, title: str, status: int, hints: Iterable[str] = (), description: str = "") -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise ValueError(
                f"problem code {code!r} must look like AGT_001: upper-case words and three digits, joined by '_'"
            )
        if code.split("_", 1)[0] in OWNED:
            raise ValueError(
                f"problem code {code!r} belongs to sigil_policy (it owns {', '.join(sorted(OWNED))}); "
                "choose a component of your own, for example AGT_001"
            )
        if not isinstance(title, str) or not title:
            raise ValueError(f"problem type {code} needs a title, for example title='AgentNotFoundError'")
        if not isinstance(status, int) or not 400 <= status <= 599:
            raise ValueError(f"problem type {code} has status {status!r}; an error status is 400 to 599")
        if isinstance(hints, str):
            raise TypeError(
                f"problem type {code}: hints is a list of sentences, not one string; write hints=[{hints!r}]"
            )
        if not isinstance(description, str):
            raise TypeError(
                f"problem type {code}: description is a text for its page, not {type(description).__name__}"
            )
        self._fill(code, title, status, tuple(hints), description)
        _register(self)

    def _fill(self, code: str, title: str, status: int, hints: tuple[str, ...], description: str) -> None:
        values = {"code": code, "title": title, "status": status, "hints": hints, "description": description}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def slug(self) -> str:
        """The last part of the type URI: `agt-001`."""
        return self.code.lower().replace("_", "-")

    def __call__(
        self,
        detail: str | None = None,
        *,
        headers: HeaderPairs = (),
        hints: Iterable[str] | None = None,
        retry_after: float | None = None,
        **extensions: Any,
    ) -> "Problem":
        return Problem(self, detail, headers=headers, hints=hints, retry_after=retry_after, **extensions)


def library_type(code: str, title: str, status: int, *hints: str, description: str = "") -> ProblemType:
    """A type under a component that the library owns; only the catalogue calls this."""
    made = object.__new__(ProblemType)
    made._fill(code, title, status, hints, description)
    _register(made)
    return made


def _register(made: ProblemType) -> None:
    known = _REGISTRY.setdefault(made.code, made)
    if known != made:
        raise ValueError(
            f"problem code {known.code} is already declared ({known.title}, {known.status}); every code means one thing"
        )


def registered_types() -> tuple[ProblemType, ...]:
    """Every declared problem type, ordered by code."""
    return tuple(_REGISTRY[code] for code in sorted(_REGISTRY))


class Problem(Exception):  # noqa: N818  RFC 9457's own word
    """One occurrence of a problem: return it from a policy, raise it from an application.

    `headers` are added to the response (lower-case names). Keyword arguments become extension members; a value that
    JSON cannot say is written as text, never an error. `hints=None` takes the type's hints. `retry_after` is after how
    many seconds another try is worth it: the field `Retry-After` and a member, in whole seconds, never too few and at
    least 1 (RFC 9110 section 10.2.3).
    """

    def __init__(
        self,
        type: ProblemType,  # noqa: A002  the member's name in RFC 9457
        detail: str | None = None,
        *,
        headers: HeaderPairs = (),
        hints: Iterable[str] | None = None,
        retry_after: float | None = None,
        **extensions: Any,
    ) -> None:
        super().__init__(type.code)
        for name in extensions:
            if name in _MEMBERS or not _EXTENSION.fullmatch(name):
                raise ValueError(
                    f"extension member {name!r} must start with a letter, have three or more of A-Z a-z 0-9 _ "
                    "(RFC 9457 section 4), and not be a member that the problem has anyway"
                )
        self.type = type
        self.detail = detail
        if retry_after is not None:
            wait = max(1, math.ceil(retry_after - _ROUNDING))
            headers = (*headers, (b"retry-after", b"%d" % wait))
            extensions["retry_after"] = wait
        self.headers = tuple(headers)
        self.hints = type.hints if hints is None else tuple(hints)
        self.extensions: Mapping[str, Any] = extensions

    @property
    def status(self) -> int:
        return self.type.status

    def __str__(self) -> str:
        return f"{self.type.code} {self.type.title}"

    def __repr__(self) -> str:
        return f"Problem({self.type.code}, status={self.status})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemStyle:
    """How problems look on the wire; a mounted `Problems` policy sets it for what is inside it.

    `messages` are titles in other languages, by language tag and code; `language` is the one that all others are in.
    """

    base_url: str = "https://sigil.acti.ai/errors/"
    media_type: str = "application/problem+json"
    instance: Literal["path", "urn"] = "path"
    messages: Messages = field(default_factory=dict)
    language: str = "en"

    def __post_init__(self) -> None:
        for tag in (self.language, *self.messages):
            if not is_language(tag):
                raise ValueError(f"{tag!r} is not a language tag such as 'de' or 'pt-BR' (RFC 5646 section 2.1)")
        for tag, titles in self.messages.items():
            for code, title in titles.items():
                if not _CODE.fullmatch(code) or not title:
                    raise ValueError(
                        f"messages[{tag!r}] maps codes such as AGT_001 to titles; {code!r}: {title!r} doesn't"
                    )
        parts = urlsplit(self.base_url)
        if not parts.scheme or not (parts.netloc or parts.path) or not self.base_url.endswith(("/", ":", "#")):
            raise ValueError(
                f"problem type base {self.base_url!r} must be an absolute URI that ends with '/', ':' or '#', "
                "for example 'https://errors.example.com/' (RFC 9457 section 3.1.1)"
            )

    def type_uri(self, problem_type: ProblemType) -> str:
        return self.base_url + problem_type.slug

    def title(self, kind: ProblemType, accept_language: bytes) -> tuple[str, str]:
        """The title of `kind` for a client with this Accept-Language, and the language that it is in."""
        known = [tag for tag, titles in self.messages.items() if kind.code in titles]
        tag = look_up(accept_language, (*known, self.language)) if known else None
        return (kind.title, self.language) if tag not in known else (self.messages[str(tag)][kind.code], str(tag))

    def members(self, problem: Problem, ex: "Exchange") -> dict[str, Any]:
        """The members of the body, in the order in which a reader wants them."""
        correlation = ex.get(Correlation)
        kind = problem.type
        title = self.title(kind, ex.headers.get(b"accept-language", b""))[0] if self.messages else kind.title
        members: dict[str, Any] = {"type": self.type_uri(kind), "title": title, "status": kind.status}
        if problem.detail is not None:
            members["detail"] = problem.detail
        members["instance"] = (
            f"urn:sigil:request:{correlation.request_id}"
            if self.instance == "urn" and correlation is not None
            else quote(ex.path, safe="/:@!$&'()*+,;=-._~", errors="surrogatepass")
        )
        members["error_code"] = kind.code
        members["timestamp"] = datetime.fromtimestamp(int(ex.clock.time()), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        if correlation is not None:
            members["request_id"] = correlation.request_id
            if correlation.trace_id is not None:
                members["trace_id"] = correlation.trace_id
        members["recovery_hints"] = list(problem.hints)
        members.update(problem.extensions)
        return members

    def render(self, problem: Problem, ex: "Exchange", *, reraise: bool = False) -> Reply:
        """The reply for `problem`: never stored by a cache, never sniffed as anything else."""
        body = encode_json(self.members(problem, ex))
        own = {name for name, _ in problem.headers}
        headers: list[tuple[bytes, bytes]] = [
            (b"content-type", self.media_type.encode("ascii")),
            (b"content-length", b"%d" % len(body)),
            (b"x-content-type-options", b"nosniff"),
        ]
        if b"cache-control" not in own:
            headers.append((b"cache-control", b"no-store"))
        headers.extend(problem.headers)
        if self.messages:
            # RFC 9457 section 3.1.3 lets a title be translated; RFC 9110 section 12.5.5 has it said to caches.
            vary = merge_vary([value for name, value in headers if name == b"vary"], (b"Accept-Language",))
            spoken = self.title(problem.type, ex.headers.get(b"accept-language", b""))[1].encode("ascii")
            headers = [pair for pair in headers if pair[0] not in (b"vary", b"content-language")]
            headers += [(b"content-language", spoken), (b"vary", vary)]
        return Reply(
            status=problem.status, headers=headers, body=body, code=close_code(problem.status), reraise=reraise
        )

    def message(self, problem: Problem, ex: "Exchange") -> str:
        """What a client on a WebSocket gets for a message that was refused: `{"type": "error", "data": {...}}`.

        `data` has the members of the problem, `error_message` (its detail, or title) and the `retry_after` if it names
        one; a client of the guidelines reads `error_message`.
        """
        text = problem.detail or problem.type.title
        data = {"error_message": text, **self.members(problem, ex)}
        return encode_json({"type": "error", "data": data, "timestamp": data["timestamp"]}).decode("ascii")


DEFAULT_STYLE = ProblemStyle()


def close_code(status: int) -> int:
    """The WebSocket close code that says what an HTTP status would (RFC 6455 section 7.4.1; 1013 from IANA)."""
    if status in (429, 503):
        return 1013
    return 1011 if status >= 500 else 1008


def encode_json(value: Any) -> bytes:
    """`value` as strict JSON (RFC 8259), whatever it holds: what JSON cannot say is written as text."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")
    except (TypeError, ValueError, RecursionError):
        return json.dumps(_plain(value, 12), allow_nan=False, separators=(",", ":")).encode("ascii")


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, str | bool):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Enum):
        return _plain(value.value, depth - 1) if depth > 0 else None
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else f"{'-' if value < 0 else ''}0x{abs(value):x}"[:64]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if depth <= 0:
        return None
    if isinstance(value, Mapping):
        return {str(_plain(key, 0)): _plain(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth - 1) for item in value]
    # Anything else may hold what the client must not see: say what it is, never its text.
    return type(value).__name__
