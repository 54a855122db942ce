"""RFC 9457: types, occurrences and their wire form."""

import json
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.core.catalogue import TOKEN_INVALID, http_problem
from sigil_policy.core.clock import Clock
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Correlation
from sigil_policy.core.host import PLAIN
from sigil_policy.core.problems import (
    DEFAULT_STYLE,
    Problem,
    ProblemStyle,
    ProblemType,
    encode_json,
    registered_types,
)
from sigil_policy.testing import FrozenClock

AgentGone = ProblemType(code="AGT_901", title="AgentGoneError", status=410, hints=["Create it again"])


def exchange(path: str = "/v7/agents/x", clock: Clock | None = None) -> Exchange:
    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing reads the body")

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    return Exchange(scope, receive, clock or FrozenClock(1_768_132_800), PLAIN, DEFAULT_STYLE)


def test_the_members_are_those_of_the_guidelines() -> None:
    ex = exchange()
    ex.give(Correlation("550e8400-e29b-41d4-a716-446655440000"))
    reply = DEFAULT_STYLE.render(AgentGone(detail="Agent 'x' is gone"), ex)
    assert json.loads(reply.body) == {
        "type": "https://sigil.acti.ai/errors/agt-901",
        "title": "AgentGoneError",
        "status": 410,
        "detail": "Agent 'x' is gone",
        "instance": "/v7/agents/x",
        "error_code": "AGT_901",
        "timestamp": "2026-01-11T12:00:00Z",
        "request_id": "550e8400-e29b-41d4-a716-446655440000",
        "recovery_hints": ["Create it again"],
    }


def test_a_problem_is_never_stored_nor_sniffed_and_has_the_exact_media_type() -> None:
    """PD-01, CA-07, ST-32."""
    headers = dict(DEFAULT_STYLE.render(TOKEN_INVALID(), exchange()).headers)
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"cache-control"] == b"no-store"
    assert headers[b"x-content-type-options"] == b"nosniff"


def test_instance_is_a_uri_reference_whatever_the_path_holds() -> None:
    """PD-10, AS-27: the path arrives decoded and leaves encoded."""
    reply = DEFAULT_STYLE.render(AgentGone(), exchange('/v7/ä b"<>%/\x00'))
    assert json.loads(reply.body)["instance"] == "/v7/%C3%A4%20b%22%3C%3E%25/%00"


def test_instance_can_name_the_occurrence() -> None:
    """PD-10, departure D-05."""
    ex = exchange()
    ex.give(Correlation("r-1"))
    assert json.loads(ProblemStyle(instance="urn").render(AgentGone(), ex).body)["instance"].endswith("r-1")


class Colour(Enum):
    RED = "red"


class Secretive:
    def __repr__(self) -> str:
        raise RuntimeError("hunter2")


def test_extension_values_that_json_cannot_say_do_not_turn_a_4xx_into_a_500() -> None:
    """PD-23, JS-01, JS-03."""
    loop: list[Any] = []
    loop.append(loop)
    problem = AgentGone(
        inf=float("inf"), raw=b"\xff", when=datetime(2026, 1, 11, tzinfo=UTC), price=Decimal("1.5"), tags={1},
        colour=Colour.RED, text="\ud800", error=ValueError("hunter2"), odd=Secretive(), loop=loop, huge=10**5000,
    )  # fmt: skip
    body = DEFAULT_STYLE.render(problem, exchange()).body
    members = json.loads(body)
    assert b"hunter2" not in body
    assert members["inf"] == "inf"
    assert members["error"] == "ValueError"
    assert members["colour"] == "red"


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.decimals(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner),
    max_leaves=20,
)


@given(json_like)
def test_whatever_is_encoded_is_strict_json(value: Any) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(encode_json(value), parse_constant=refuse)


@pytest.mark.parametrize("code", ["agt_001", "AGT001", "AGT_01", "AGT_0001", "_001", "AGT__001", "", "AGT_001\n", 7])
def test_a_code_outside_of_the_grammar_is_refused(code: Any) -> None:
    """D-10."""
    with pytest.raises(ValueError, match="must look like AGT_001"):
        ProblemType(code=code, title="X", status=400)


def test_codes_with_a_category_are_in_the_grammar() -> None:
    """D-10: the guidelines write ORCH_VALIDATION_001 too."""
    assert ProblemType(code="ORCH_VALIDATION_901", title="X", status=400).slug == "orch-validation-901"


def test_a_code_means_one_thing() -> None:
    with pytest.raises(ValueError, match="already declared"):
        ProblemType(code="AGT_901", title="AnotherError", status=404)
    # Declared again alike, as a module that is reloaded does.
    assert ProblemType(code="AGT_901", title="AgentGoneError", status=410, hints=["Create it again"]) == AgentGone


@pytest.mark.parametrize("component", ["AUTH", "RATE", "CTX", "REQ", "API", "SRV"])
def test_the_librarys_components_are_refused_to_applications(component: str) -> None:
    with pytest.raises(ValueError, match="belongs to sigil_policy"):
        ProblemType(code=f"{component}_900", title="X", status=400)


@pytest.mark.parametrize("status", [200, 399, 600, "404"])
def test_a_type_has_an_error_status(status: Any) -> None:
    with pytest.raises(ValueError, match="400 to 599"):
        ProblemType(code="AGT_902", title="X", status=status)


@pytest.mark.parametrize("base", ["errors/", "/errors/", "agt", "https://x.test/errors", ""])
def test_a_relative_problem_type_is_refused(base: str) -> None:
    """PD-05."""
    with pytest.raises(ValueError, match="absolute URI"):
        ProblemStyle(base_url=base)


@pytest.mark.parametrize("name", ["ab", "1abc", "with-dash", "status", "error_code"])
def test_extension_names_follow_the_rfc(name: str) -> None:
    """PD-13."""
    with pytest.raises(ValueError, match="extension member"):
        AgentGone(**{name: 1})


def test_titles_of_plain_http_errors_are_the_phrases_of_rfc_9110() -> None:
    """PD-08, D-35."""
    assert [http_problem(s).title for s in (404, 413, 422, 503, 499)] == [
        "Not Found",
        "Content Too Large",
        "Unprocessable Content",
        "Service Unavailable",
        "Client Error",
    ]


def test_every_registered_status_is_a_registered_http_status() -> None:
    """ST-24: of the library's own types."""
    own = [kind for kind in registered_types() if kind.code.split("_")[0] in ("AUTH", "RATE", "CTX", "API")]
    assert {kind.status for kind in own} <= {400, 401, 403, 410, 422, 429, 503}


def test_a_problem_says_neither_detail_nor_extensions_in_repr_and_str() -> None:
    problem = AgentGone(detail="hunter2", secret_word="hunter2")
    assert "hunter2" not in repr(problem) + str(problem) + "".join(map(str, problem.args))
    assert isinstance(problem, Problem)


@pytest.mark.parametrize(("wait", "told"), [(0, 1), (0.2, 1), (1, 1), (1.000_000_2, 1), (1.01, 2), (41.5, 42)])
def test_retry_after_is_a_field_and_a_member_of_whole_seconds(wait: float, told: int) -> None:
    """RFC 9110 section 10.2.3: never sooner than it helps, and at least a second."""
    reply = DEFAULT_STYLE.render(AgentGone(retry_after=wait), exchange())
    assert dict(reply.headers)[b"retry-after"] == b"%d" % told
    assert json.loads(reply.body)["retry_after"] == told
    assert "retry_after" not in AgentGone().extensions
