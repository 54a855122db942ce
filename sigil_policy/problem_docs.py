"""Pages for the problems of an API, so that every `type` leads somewhere.

    app.mount("/errors", ProblemDocs(base_url="https://api.example.com/errors/"))

    GET /errors/agt-001                             200, application/json: title, status, code, hints, description
    GET /errors/agt-001, Accept: text/html          200, the same as a page
    GET /errors/                                    200, all of them
    GET /errors/xyz-999                             404, a problem

What it guarantees:

* There is a page for every registered type, the library's and the application's, also for one that is declared later,
  and for every HTTP error that has a name (`req-404`, `srv-503`). Nothing of a request appears in any of them.
* Public, cacheable and the same for everybody: `Cache-Control`, an ETag, 304. HEAD has the headers of GET. `Vary` names
  what chose the form and, with `messages`, the language.
* A page runs no script and loads nothing; its Content-Security-Policy says so.

Mount it where `base_url` leads, inside of the stack or outside, or serve it alone. Where a framework mounts no ASGI
application, put Starlette's `Mount` around both. Whoever can call it can read every title, hint and description.

RFC 9457 sections 3.1.1 and 4; RFC 4647 section 3.4 (languages).
"""

from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from sigil_policy.core.catalogue import http_problem
from sigil_policy.core.clock import SYSTEM_CLOCK
from sigil_policy.core.exchange import SCOPE_KEY, Exchange
from sigil_policy.core.host import PLAIN
from sigil_policy.core.problems import Messages, Problem, ProblemStyle, ProblemType, encode_json, registered_types
from sigil_policy.wire.etags import lists_weakly
from sigil_policy.wire.languages import weighted

_STYLE = (
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:42rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "code{font-family:ui-monospace,monospace}dt{font-weight:600}"
)
_POLICY = f"default-src 'none'; style-src 'sha256-{b64encode(sha256(_STYLE.encode()).digest()).decode()}'"
_PAGE = """<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{content}
</body>
</html>
"""
_JSON = ("application/json", "application/problem+json", "application/*")


class ProblemDocs:
    """An ASGI application that explains problem types.

        ProblemDocs()
        ProblemDocs(base_url="https://api.example.com/errors/", messages={"de": {"AGT_001": "Agent nicht gefunden"}})

    Options:
        base_url: what `Problems(base_url=...)` says: absolute, and where this is mounted (default
            `https://sigil.acti.ai/errors/`).
        types: the problem types that have a page; None for all that are registered (default).
        max_age: seconds for which anyone may keep a page (default 3600); 0 has it asked for each time.
        messages: titles in other languages, by language tag and code (default: none).
        language: the language of all other texts (default "en").

    Raises `ValueError` for a relative `base_url`, a negative `max_age`, and tags and codes that are none.
    """

    def __init__(
        self,
        *,
        base_url: str = "https://sigil.acti.ai/errors/",
        types: Iterable[ProblemType] | None = None,
        max_age: int = 3_600,
        messages: Messages | None = None,
        language: str = "en",
    ) -> None:
        for tag, titles in (messages or {}).items():
            if not all(isinstance(title, str) for title in titles.values()):
                raise TypeError(f"messages[{tag!r}] maps codes to titles, which are texts")
        self.style = ProblemStyle(base_url=base_url, messages=messages or {}, language=language)
        if types is None:
            for status in HTTPStatus:
                if status >= 400:
                    http_problem(status)  # what an application answers with without declaring it
        else:
            types = tuple(types)
            for kind in types:
                if not isinstance(kind, ProblemType):
                    raise TypeError(f"types are ProblemType instances, not {type(kind).__name__}")
        if not isinstance(max_age, int) or max_age < 0:
            raise ValueError(f"max_age must be a number of seconds from 0 up, not {max_age!r}")
        self.types = types
        self.caching = b"public, max-age=%d" % max_age if max_age else b"public, no-cache"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await _live(receive, send)
        elif kind == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
        elif kind == "http":
            ex = scope.get(SCOPE_KEY)
            if not isinstance(ex, Exchange) or ex.finished:
                ex = Exchange(scope, receive, SYSTEM_CLOCK, PLAIN, self.style)
            status, headers, body = self._answer(ex, scope)
            headers.append((b"content-length", b"%d" % len(body)))
            if status == 304:
                headers.pop()
            await send({"type": "http.response.start", "status": status, "headers": headers})
            content = b"" if status == 304 or scope["method"] == "HEAD" else body
            await send({"type": "http.response.body", "body": content, "more_body": False})

    def _answer(self, ex: Exchange, scope: Any) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        root = (scope.get("root_path") or "").rstrip("/")
        slug = scope["path"].removeprefix(root).strip("/")
        root = "/" + root.strip("/") if root else ""  # "//host/path" would lead to another host
        found: ProblemType | None = None
        if slug:
            found = next((kind for kind in self._known() if kind.slug == slug), None)
            if found is None:
                return self._refuse(http_problem(404)("No problem type has this name"), ex)
        if scope["method"] not in ("GET", "HEAD"):
            return self._refuse(http_problem(405)(headers=[(b"allow", b"GET, HEAD")]), ex)
        language = ex.headers.get(b"accept-language", b"")
        as_page = _wants_page(ex.headers.get(b"accept", b""))
        if found is None:
            spoken = self.style.language
            known = [(kind, self.style.title(kind, language)) for kind in self._known()]
            spoken = next((tongue for _, (_, tongue) in known if tongue != spoken), spoken)
            body = self._index_page(known, root, spoken) if as_page else self._index(known)
        else:
            title, spoken = self.style.title(found, language)
            body = self._page(found, title, root, spoken) if as_page else encode_json(self._members(found, title))
        tag = b'"%b"' % sha256(body).hexdigest()[:32].encode()
        headers = [
            (b"cache-control", self.caching),
            (b"vary", b"Accept, Accept-Language" if self.style.messages else b"Accept"),
            (b"etag", tag),
        ]
        listed = ex.headers.get(b"if-none-match")
        if listed is not None and (listed.strip() == b"*" or lists_weakly(listed, tag)):
            return 304, headers, b""
        headers += [
            (b"content-type", b"text/html; charset=utf-8" if as_page else b"application/json"),
            (b"content-language", spoken.encode("ascii")),
            (b"x-content-type-options", b"nosniff"),
        ]
        if as_page:
            headers.append((b"content-security-policy", _POLICY.encode("ascii")))
        return 200, headers, body

    def _refuse(self, problem: Problem, ex: Exchange) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
        reply = ex.style.render(problem, ex)
        return reply.status, [pair for pair in reply.headers if pair[0] != b"content-length"], reply.body

    def _known(self) -> tuple[ProblemType, ...]:
        return registered_types() if self.types is None else self.types

    def _members(self, kind: ProblemType, title: str) -> dict[str, Any]:
        return {
            "type": self.style.type_uri(kind),
            "title": title,
            "status": kind.status,
            "error_code": kind.code,
            "description": kind.description,
            "recovery_hints": kind.hints,
        }

    def _index(self, known: list[tuple[ProblemType, tuple[str, str]]]) -> bytes:
        return encode_json({"problem_types": [self._members(kind, title) for kind, (title, _) in known]})

    def _index_page(self, known: list[tuple[ProblemType, tuple[str, str]]], root: str, language: str) -> bytes:
        rows = (
            f'<li><a href="{_path(root, kind)}"><code>{kind.code}</code></a> {escape(title)} ({kind.status})</li>'
            for kind, (title, _) in known
        )
        return _html("Problem types", language, "<h1>Problem types</h1>\n<ul>\n" + "\n".join(rows) + "\n</ul>")

    def _page(self, kind: ProblemType, title: str, root: str, language: str) -> bytes:
        parts = [f"<h1>{escape(title)}</h1>"]
        if kind.description:
            parts.append(f"<p>{escape(kind.description)}</p>")
        if kind.hints:
            hints = "".join(f"\n<li>{escape(hint)}</li>" for hint in kind.hints)
            parts.append(f"<h2>What helps</h2>\n<ul>{hints}\n</ul>")
        try:
            phrase = HTTPStatus(kind.status).phrase
        except ValueError:
            phrase = ""
        parts.append(
            f"<dl>\n<dt>Code</dt><dd><code>{kind.code}</code></dd>\n"
            f"<dt>Status</dt><dd>{kind.status} {escape(phrase)}</dd>\n"
            f"<dt>Type</dt><dd><code>{escape(self.style.type_uri(kind))}</code></dd>\n</dl>\n"
            f'<p><a href="{_path(root)}">All problem types</a></p>'
        )
        return _html(title, language, "\n".join(parts))


def _html(title: str, language: str, content: str) -> bytes:
    page = _PAGE.format(language=escape(language), title=escape(title), style=_STYLE, content=content)
    return page.encode("utf-8", "replace")


def _path(root: str, kind: ProblemType | None = None) -> str:
    return escape(quote(f"{root}/{kind.slug if kind else ''}", safe="/~!$&'()*+,;=:@-._", errors="replace"))


def _wants_page(accept: bytes) -> bool:
    """Whether HTML is wanted more than JSON; who wants anything gets JSON."""
    weights = dict(reversed(weighted(accept)))
    page = weights.get("text/html", weights.get("text/*", 0.0))
    data = [weights[name] for name in _JSON if name in weights]
    return page > 0 and page >= (max(data) if data else weights.get("*/*", 0.0))


async def _live(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
