"""One assertion for answers that have to be problems.

assert_problem(client.get("/v7/agents/nobody"), "AGT_001", status=404)
assert_problem(await drive(app), "RATE_001", retry_after=60)
"""

import json
from typing import Any

from sigil_policy.core.problems import registered_types

_ALWAYS = ("type", "title", "status", "error_code", "timestamp", "instance")


def assert_problem(
    response: Any, code: str, *, status: int | None = None, media_type: str = "application/problem+json", **members: Any
) -> dict[str, Any]:
    """`response` is the problem `code` (RFC 9457), whole and consistent; its members are returned.

        problem = assert_problem(response, "AUTH_004", status=403, required_scopes=["agents:write"])
        assert "agents" in problem["detail"]

    Takes a response of Starlette's or FastAPI's `TestClient`, of httpx2 or httpx, and what `drive` returns. Checked are
    the media type, the status (of the response and in the body, and that of the registered type), the code, title and
    members that every problem has, `Cache-Control: no-store`, that the length is the body's, a `Retry-After` that
    agrees with its member, and the `members` that are given. A title may be in the language that `Content-Language`
    names, and a body that was compressed on its way has another length.

    Options:
        status: of the response (default None: the one that the type `code` is registered with).
        media_type: of the response (default `"application/problem+json"`).
        members: what members of the body have to be.

    Raises `AssertionError`, with everything that is wrong and with the response.
    """
    wrong: list[str] = []
    got, headers, body = _parts(response)
    kind = {known.code: known for known in registered_types()}.get(code)
    if status is None and kind is not None:
        status = kind.status
    if status is not None and got != status:
        wrong.append(f"the status is {got}, not {status}")
    said = headers.get("content-type", "")
    if said.partition(";")[0].strip().lower() != media_type:
        wrong.append(f"the media type is {said or 'absent'!r}, not {media_type!r} (RFC 9457, section 3)")
    if "no-store" not in headers.get("cache-control", ""):
        wrong.append(f"cache-control is {headers.get('cache-control')!r}: a cache may keep the problem for others")
    try:
        problem: Any = json.loads(body) if body else None
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        wrong.append("the body is no JSON object")
        problem = {}
    else:
        wrong += _members(problem, code, got, kind.title if kind and "content-language" not in headers else None)
        for name, expected in members.items():
            if name not in problem:
                wrong.append(f"the member {name!r} is missing")
            elif problem[name] != expected:
                wrong.append(f"{name} is {problem[name]!r}, not {expected!r}")
        wait = headers.get("retry-after")
        if wait is not None and "retry_after" in problem and str(problem["retry_after"]) != wait:
            wrong.append(f"Retry-After is {wait}, and the member retry_after {problem['retry_after']!r}")
    whole = "content-encoding" not in headers
    if whole and "content-length" in headers and headers["content-length"] != str(len(body)):
        wrong.append(f"content-length is {headers['content-length']}, and the body has {len(body)} bytes")
    if wrong:
        lines = "\n".join(f"* {one}" for one in wrong)
        shown = body.decode("utf-8", "replace")
        raise AssertionError(f"expected the problem {code}:\n{lines}\nanswered {got} {shown:.2000}")
    found: dict[str, Any] = problem
    return found


def _members(problem: dict[str, Any], code: str, status: int, title: str | None) -> list[str]:
    wrong = [f"the member {name!r} is missing" for name in _ALWAYS if name not in problem]
    if problem.get("error_code", code) != code:
        wrong.append(f"error_code is {problem['error_code']!r}, not {code!r}")
    if problem.get("status", status) != status:
        wrong.append(f"the body says status {problem['status']!r}, and the response {status} (RFC 9457, section 3.1.2)")
    if title is not None and problem.get("error_code") == code and problem.get("title", title) != title:
        wrong.append(f"title is {problem['title']!r}, and {code} is registered as {title!r}")
    if "detail" in problem and not isinstance(problem["detail"], str):
        wrong.append(f"detail is a string, not {problem['detail']!r} (RFC 9457, section 3.1.4)")
    return wrong


def _parts(response: Any) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body, of whichever kind of response."""
    status = getattr(response, "status_code", None)
    if status is None:
        status = getattr(response, "status", None)
    content = getattr(response, "content", None)
    if content is None:
        content = getattr(response, "body", None)
    if status is None or not isinstance(content, bytes) or not hasattr(response, "headers"):
        raise TypeError(
            f"a response of TestClient, httpx2, httpx or drive is expected, not {type(response).__name__}; "
            "one that is streamed has to be read first"
        )
    given: Any = response.headers
    pairs = given.items() if hasattr(given, "items") else given
    return int(status), {_text(name).lower(): _text(value) for name, value in pairs}, content


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value
