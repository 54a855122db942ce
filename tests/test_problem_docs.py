"""The pages of the problem types: every `type` leads to one."""

import math
import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from sigil_policy.core.problems import ProblemType, registered_types
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems
from sigil_policy.policies.request_id import RequestID
from sigil_policy.problem_docs import ProblemDocs
from sigil_policy.testing import drive
from sigil_policy.testing.rules import broken_rules

pytestmark = pytest.mark.anyio

Lost = ProblemType(
    code="AGT_971",
    title="Lost <b>&",
    status=404,
    hints=["Look <i>here</i>", "Ask"],
    description='It was "lost" & <script>alert(1)</script>',
)
PAGE = {"accept": "text/html"}
MESSAGES = {"de": {"AGT_971": "Verloren"}, "pt-BR": {"AGT_971": "Perdido"}}


def mounted(**options: Any) -> PolicyStack:
    app = Starlette(routes=[Mount("/errors", ProblemDocs(**options))])
    return PolicyStack(app, [RequestID(), Problems(base_url="https://api.example.com/errors/")])


async def ask(app: Any, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> Any:
    sent = await drive(app, method, path, headers=headers or {})
    assert broken_rules(sent.messages) == []
    return sent


class Seen(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]


async def test_a_type_leads_to_its_page() -> None:
    """PD-06, RFC 9457 section 3.1.1: for every type that there is."""
    app = mounted(base_url="https://api.example.com/errors/")
    for kind in registered_types():
        sent = await ask(app, f"/errors/{kind.slug}", PAGE)
        assert (sent.status, sent.header("content-type")) == (200, "text/html; charset=utf-8")
        assert f"https://api.example.com/errors/{kind.slug}" in sent.body.decode()


async def test_who_does_not_ask_for_a_page_gets_json() -> None:
    sent = await ask(ProblemDocs(), "/agt-971")
    assert sent.json() == {
        "type": "https://sigil.acti.ai/errors/agt-971",
        "title": "Lost <b>&",
        "status": 404,
        "error_code": "AGT_971",
        "description": 'It was "lost" & <script>alert(1)</script>',
        "recovery_hints": ["Look <i>here</i>", "Ask"],
    }
    assert sent.header("vary") == "Accept"


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "application/json"),
        ("text/html", "text/html; charset=utf-8"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html; charset=utf-8"),
        ("text/*", "text/html; charset=utf-8"),
        ("application/json, text/html;q=0.9", "application/json"),
        ("text/html;q=0", "application/json"),
        ("text/html;q=0.5, */*", "application/json"),
        ("text/html;q=0.5, */*, application/json;q=0.1", "text/html; charset=utf-8"),
        ("text/html, */*", "text/html; charset=utf-8"),
        ("application/problem+json", "application/json"),
        ("image/png", "application/json"),
        ("", "application/json"),
    ],
)
async def test_accept_chooses_the_form(accept: str, kind: str) -> None:
    """RFC 9110 section 12.5.1."""
    assert (await ask(ProblemDocs(), "/agt-971", {"accept": accept})).header("content-type") == kind


async def test_everything_on_a_page_is_text() -> None:
    sent = await ask(ProblemDocs(), "/agt-971", PAGE)
    seen = Seen(sent.body.decode())
    assert not {"script", "b", "i", "img", "link"} & set(seen.tags)
    assert seen.links == ["/"]
    assert "script" not in (sent.header("content-security-policy") or "")
    assert (sent.header("content-security-policy") or "").startswith("default-src 'none'")
    assert sent.header("x-content-type-options") == "nosniff"


async def test_the_style_of_a_page_is_the_one_that_its_policy_allows() -> None:
    from base64 import b64encode
    from hashlib import sha256

    sent = await ask(ProblemDocs(), "/", PAGE)
    style = re.search(rb"<style>(.*?)</style>", sent.body, re.DOTALL)
    assert style is not None
    allowed = b64encode(sha256(style[1]).digest()).decode()
    assert sent.header("content-security-policy") == f"default-src 'none'; style-src 'sha256-{allowed}'"


async def test_the_index_names_all_types_and_its_links_work() -> None:
    app = mounted()
    listed = (await ask(app, "/errors/")).json()["problem_types"]
    assert [entry["error_code"] for entry in listed] == [kind.code for kind in registered_types()]
    for link in Seen((await ask(app, "/errors/", PAGE)).body.decode()).links:
        assert (await ask(app, link)).status == 200


async def test_http_errors_without_a_declaration_have_a_page() -> None:
    for slug in ("req-404", "req-429", "srv-503"):
        assert (await ask(ProblemDocs(), f"/{slug}")).status == 200


async def test_a_type_that_is_declared_later_has_a_page() -> None:
    app = ProblemDocs()
    ProblemType(code="AGT_972", title="LaterError", status=409)
    assert (await ask(app, "/agt-972")).json()["title"] == "LaterError"


async def test_only_the_types_that_were_given_are_shown() -> None:
    app = ProblemDocs(types=[Lost])
    assert len((await ask(app, "/")).json()["problem_types"]) == 1
    assert (await ask(app, "/req-404")).status == 404


@pytest.mark.parametrize(
    "path", ["/errors/xyz-999", "/errors/agt-971/x", "/errors/AGT_971", "/errors/%3Cscript%3E", "/errors/é"]
)
async def test_an_unknown_name_is_a_problem(path: str) -> None:
    sent = await ask(mounted(), path, PAGE)
    assert (sent.status, sent.header("content-type")) == (404, "application/problem+json")
    assert sent.json()["type"] == "https://api.example.com/errors/req-404"
    assert sent.json()["request_id"] == sent.header("x-request-id")


async def test_an_unknown_name_is_a_problem_without_a_stack() -> None:
    sent = await ask(ProblemDocs(base_url="urn:acme:"), "/xyz-999")
    assert (sent.status, sent.json()["type"]) == (404, "urn:acme:req-404")


@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "QUERY"])
async def test_other_methods_are_refused(method: str) -> None:
    sent = await ask(ProblemDocs(), "/agt-971", method=method)
    assert (sent.status, sent.header("allow")) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/agt-971", "/", "/xyz-999"])
async def test_head_has_the_headers_of_get(path: str) -> None:
    """RFC 9110 section 9.3.2."""
    got, head = await ask(ProblemDocs(), path), await ask(ProblemDocs(), path, method="HEAD")
    assert (head.status, head.body) == (got.status, b"")
    assert head.headers == got.headers


async def test_anyone_may_keep_a_page_and_ask_whether_it_still_holds() -> None:
    app = ProblemDocs(max_age=60)
    sent = await ask(app, "/agt-971")
    assert sent.header("cache-control") == "public, max-age=60"
    tag = sent.header("etag")
    again = await ask(app, "/agt-971", {"if-none-match": f'"x", W/{tag}'})
    assert (again.status, again.body, again.header("etag")) == (304, b"", tag)
    assert again.header("content-length") is again.header("content-type") is None
    assert (again.header("cache-control"), again.header("vary")) == ("public, max-age=60", "Accept")
    assert (await ask(app, "/agt-971", {**PAGE, "if-none-match": tag})).status == 200
    assert (await ask(ProblemDocs(max_age=0), "/agt-971")).header("cache-control") == "public, no-cache"


@pytest.mark.parametrize(
    ("language", "title", "spoken"),
    [
        ("de-CH, en;q=0.5", "Verloren", "de"),
        ("pt-BR", "Perdido", "pt-BR"),
        ("fr", "Lost <b>&", "en"),
        ("", "Lost <b>&", "en"),
        ("en, de;q=0.9", "Lost <b>&", "en"),
    ],
)
async def test_accept_language_chooses_the_title(language: str, title: str, spoken: str) -> None:
    """PD-20; RFC 4647 section 3.4, RFC 9110 section 12.5.4."""
    sent = await ask(ProblemDocs(messages=MESSAGES), "/agt-971", {"accept-language": language})
    assert (sent.json()["title"], sent.header("content-language")) == (title, spoken)
    assert sent.header("vary") == "Accept, Accept-Language"
    page = await ask(ProblemDocs(messages=MESSAGES), "/agt-971", {**PAGE, "accept-language": language})
    assert f'<html lang="{spoken}">' in page.body.decode()


async def test_problems_speak_the_language_too() -> None:
    """PD-07: one title for one type in one language; PD-20."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Lost("not here", headers=[(b"vary", b"Origin")])

    stack = PolicyStack(app, [Problems(messages=MESSAGES)])
    sent = await drive(stack, headers={"accept-language": "de"})
    assert (sent.json()["title"], sent.json()["detail"], sent.header("content-language")) == (
        "Verloren",
        "not here",
        "de",
    )
    assert sent.header("vary") == "Origin, Accept-Language"
    sent = await drive(stack)
    assert (sent.json()["title"], sent.header("content-language")) == ("Lost <b>&", "en")
    sent = await drive(PolicyStack(app, [Problems()]), headers={"accept-language": "de"})
    assert (sent.header("vary"), sent.header("content-language")) == ("Origin", None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "/errors/"}, "absolute"),
        ({"max_age": -1}, "seconds"),
        ({"types": ["AGT_971"]}, "ProblemType"),
        ({"messages": {"de_DE": {}}}, "language tag"),
        ({"messages": {"de": {"agt": "x"}}}, "AGT_001"),
        ({"messages": {"de": {"AGT_971": ""}}}, "AGT_971"),
        ({"messages": {"de": {"AGT_971": 5}}}, "which are texts"),
        ({"language": "en\r\nx"}, "language tag"),
    ],
)
def test_wrong_options_are_refused_at_construction(options: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        ProblemDocs(**options)


@pytest.mark.parametrize("options", [{"messages": {"de_DE": {}}}, {"language": ""}, {"messages": {"de": {"x": "y"}}}])
def test_wrong_languages_are_refused_by_problems(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"language tag|AGT_001"):
        Problems(**options)


async def test_it_may_be_served_alone() -> None:
    """A lifespan is answered, a WebSocket is refused."""
    sent: list[str] = []
    incoming = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Any:
        return {"type": next(incoming)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await ProblemDocs()({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    closed = await drive(ProblemDocs(), kind="websocket")
    assert [message["type"] for message in closed.messages] == ["websocket.close"]


async def test_a_prefix_in_links_is_text_too() -> None:
    sent = await drive(ProblemDocs(), path='/"><script>/', scope={"root_path": '/"><script>'}, headers=PAGE)
    assert sent.status == 200
    assert "script" not in Seen(sent.body.decode()).tags


@pytest.mark.parametrize("root", ["//evil.example", "///evil.example/x", "/\\evil.example", "//"])
async def test_a_link_never_leads_to_another_host(root: str) -> None:
    """RFC 3986 section 4.2: what begins with two slashes names a host. A prefix may come from a path parameter."""
    for slug in ("", "agt-971"):
        sent = await drive(ProblemDocs(), path=f"{root.rstrip('/')}/{slug}", scope={"root_path": root}, headers=PAGE)
        links = Seen(sent.body.decode()).links
        assert sent.status == 200 and links
        assert not [link for link in links if link.startswith(("//", "/\\")) or not link.startswith("/")]


async def test_an_index_in_many_languages_is_made_quickly_whoever_asks() -> None:
    """0.2 ms is how long an event loop may stand still; one language was looked up anew for each type."""
    messages = {tag: {kind.code: kind.title for kind in registered_types()} for tag in ("de", "fr", "ja", "zh-Hant")}
    app = ProblemDocs(messages=messages)
    taken = dict.fromkeys(("", "x-" * 500 + "x", ",".join(["aa-bb-cc-dd-ee-ff-gg-hh-ii-jj"] * 32)), math.inf)
    # The least of each, in turns: what holds the machine up holds up all of them, or is over in a later round.
    for turn in range(90):
        for field, least in taken.items():
            began = time.thread_time()
            await drive(app, headers={"accept-language": field})
            taken[field] = min(least, time.thread_time() - began)
        if turn >= 8 and max(taken.values()) < 3 * taken[""]:
            break
    assert max(taken.values()) < 3 * taken[""]
