"""Problems: what is answered for the application, and what is not."""

from typing import Any

import pytest
from pydantic import ValidationError

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.policy import Answer, Policy
from sigil_policy.core.problems import ProblemType, Reply
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems, from_http_error, from_validation_errors, json_pointer
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio

Refused = ProblemType(code="AGT_903", title="RefusedError", status=409)


class Leak(Exception): ...


def raising(error: Exception, *, started: bool = False) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        raise error

    return app


async def test_an_unhandled_error_is_answered_without_its_text_and_raised_on() -> None:
    """PD-09, AS-23."""
    sent = await drive(PolicyStack(raising(Leak("dsn=postgres://u:hunter2@db/x")), [Problems()]), raise_errors=False)
    assert sent.status == 500
    assert sent.json()["error_code"] == "SRV_500"
    assert b"hunter2" not in sent.body
    assert b"Leak" not in sent.body
    assert isinstance(sent.error, Leak)


async def test_an_error_after_the_start_is_only_raised_on() -> None:
    """PD-22."""
    sent = await drive(PolicyStack(raising(Leak(), started=True), [Problems()]), raise_errors=False)
    assert [m["type"] for m in sent.messages] == ["http.response.start", "http.response.body"]
    assert isinstance(sent.error, Leak)


async def test_a_raised_problem_is_the_answer_and_no_error_to_the_server() -> None:
    sent = await drive(PolicyStack(raising(Refused(detail="no")), [Problems()]))
    assert (sent.status, sent.json()["error_code"], sent.json()["detail"]) == (409, "AGT_903", "no")


async def test_without_problems_nothing_is_answered_for_the_application() -> None:
    class Watch(Policy): ...

    sent = await drive(PolicyStack(raising(Refused()), [Watch()]), raise_errors=False)
    assert sent.messages == []
    assert sent.error is not None


async def test_a_policys_refusal_is_a_problem_without_problems_mounted() -> None:
    class Gate(Policy):
        def on_request(self, ex: Exchange) -> Answer:
            return Refused()

    sent = await drive(PolicyStack(raising(Leak()), [Gate()]))
    assert sent.header("content-type") == "application/problem+json"
    assert sent.json()["type"] == "https://sigil.acti.ai/errors/agt-903"


async def test_the_mounted_style_holds_for_refusals_inside() -> None:
    class Gate(Policy):
        def on_request(self, ex: Exchange) -> Answer:
            return Refused()

    stack = PolicyStack(raising(Leak()), [Problems(base_url="urn:acme:"), Gate()])
    assert (await drive(stack)).json()["type"] == "urn:acme:agt-903"


@pytest.mark.parametrize("method", ["HEAD"])
async def test_head_never_carries_a_problem_body(method: str) -> None:
    """PD-21, RFC 9110 section 9.3.2."""
    sent = await drive(PolicyStack(raising(Refused()), [Problems()]), method)
    assert sent.status == 409
    assert sent.body == b""
    assert int(sent.header("content-length") or 0) > 0


async def test_a_bare_500_of_an_application_inside_becomes_a_problem() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"21"), (b"x-kept", b"1")]
        await send({"type": "http.response.start", "status": 500, "headers": headers})
        await send({"type": "http.response.body", "body": b"Internal Server Error"})

    sent = await drive(PolicyStack(app, [Problems()]))
    assert sent.json()["error_code"] == "SRV_500"
    assert sent.header("content-length") == str(len(sent.body))
    assert sent.header("x-kept") == "1"


async def test_a_500_that_an_application_meant_is_untouched() -> None:
    """PD-27."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"My own words"})

    assert (await drive(PolicyStack(app, [Problems()]))).body == b"My own words"


async def test_on_a_websocket_an_unhandled_error_refuses_the_handshake() -> None:
    """AS-15: as a denial response where the server can, else as a close."""
    stack = PolicyStack(raising(Leak()), [Problems()])
    sent = await drive(stack, kind="websocket", raise_errors=False)
    assert sent.messages[0]["type"] == "websocket.http.response.start"
    assert sent.messages[0]["status"] == 500
    sent = await drive(stack, kind="websocket", scope={"extensions": {}}, raise_errors=False)
    assert sent.messages == [{"type": "websocket.close", "code": 1011, "reason": ""}]


async def test_two_problems_in_one_stack_answer_once() -> None:
    """AS-26."""
    sent = await drive(PolicyStack(raising(Leak()), [Problems(), Problems(base_url="urn:in:")]), raise_errors=False)
    assert [m["type"] for m in sent.messages] == ["http.response.start", "http.response.body"]
    assert sent.json()["type"] == "urn:in:srv-500"


@pytest.mark.parametrize("options", [{"base_url": "errors/"}, {"validation_status": 418}, {"colour": 1}])
async def test_wrong_options_are_refused_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Problems(**options)


async def test_headers_of_an_http_error_survive() -> None:
    """PD-26: Allow, WWW-Authenticate, Retry-After; the exception's own media type does not."""
    problem = from_http_error(405, "no", {"Allow": "GET, HEAD", "Retry-After": "3", "Content-Type": "text/x"})
    assert problem.headers == ((b"allow", b"GET, HEAD"), (b"retry-after", b"3"))


async def test_a_401_of_the_application_gets_a_challenge() -> None:
    """ST-03, RFC 9110 section 15.5.2."""
    assert from_http_error(401).headers == ((b"www-authenticate", b'Bearer realm="api"'),)
    own = from_http_error(401, headers={"WWW-Authenticate": "Basic"})
    assert own.headers == ((b"www-authenticate", b"Basic"),)


async def test_a_detail_that_is_no_text_is_data() -> None:
    problem = from_http_error(409, {"code": 7})
    assert (problem.detail, problem.extensions) == (None, {"data": {"code": 7}})


@pytest.mark.parametrize(
    ("path", "pointer"),
    [
        (["a/b"], "#/a~1b"),
        (["m~n"], "#/m~0n"),
        (["c%d"], "#/c%25d"),
        (["g|h"], "#/g%7Ch"),
        (["é"], "#/%C3%A9"),
        (["profile", "color"], "#/profile/color"),
        ([0], "#/0"),
        ([], "#"),
    ],
)
async def test_pointers_are_json_pointers_as_uri_fragments(path: list[str | int], pointer: str) -> None:
    """PD-14 to PD-16, RFC 6901 sections 3, 4 and 6."""
    assert json_pointer(path) == pointer


async def test_validation_problems_say_where_and_what_but_never_the_input() -> None:
    """PD-17, PD-24."""
    errors = [
        {"type": "string_too_short", "loc": ("body", "user", 0, "password"), "msg": "Too short", "input": "hunter2"},
        {"type": "int_parsing", "loc": ("query", "per_page"), "msg": "Not a number", "input": "hunter2"},
        {
            "type": "value_error",
            "loc": ("body", "name"),
            "msg": "Value error, Name 'hunter2' is bad",
            "input": "hunter2",
        },
        {"type": "union_tag_invalid", "loc": ("body",), "msg": "Tag 'hunter2' unknown", "input": {"t": "hunter2"}},
        {"type": "json_invalid", "loc": ("body", 17), "msg": "JSON decode error", "input": {}},
    ]
    problem = from_validation_errors(errors, 400)
    assert "hunter2" not in str(problem.extensions)
    assert problem.extensions["validation_errors"][0] == {"field": "user.0.password", "message": "Too short"}
    assert problem.extensions["errors"][0] == {"detail": "Too short", "pointer": "#/user/0/password"}
    assert problem.extensions["errors"][1] == {"detail": "Not a number", "parameter": "per_page", "in": "query"}
    assert problem.extensions["validation_errors"][2]["message"] == "Name '…' is bad"
    assert problem.extensions["errors"][4]["pointer"] == "#"
    assert (problem.type.code, from_validation_errors(errors, 422).type.code) == ("REQ_001", "REQ_002")


async def test_a_reply_is_sent_as_it_is() -> None:
    class Gate(Policy):
        def on_request(self, ex: Exchange) -> Answer:
            return Reply(status=204, headers=[(b"x", b"1"), (b"content-length", b"3")], body=b"abc")

    sent = await drive(PolicyStack(raising(Leak()), [Gate()]))
    assert (sent.status, sent.headers, sent.body) == (204, [(b"x", b"1")], b"")
