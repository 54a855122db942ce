"""Routes: one matcher for all tables gives the answer that trying every rule gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigil_policy.core.routing import RouteMatcher, parse_route


def naive(rules: dict[str, object], method: str, path: str) -> object:
    """Try every rule, keep the most specific."""
    parts = [part for part in path.split("/") if part]
    if "." in parts or ".." in parts:
        return None
    best, answer = None, None
    for text, setting in rules.items():
        rule_method, _, rule_path = text.rpartition(" ")
        if rule_method not in ("", method) and not (rule_method == "GET" and method == "HEAD"):
            continue
        wanted = [part for part in rule_path.split("/") if part]
        tail = bool(wanted) and wanted[-1] == "**"
        fixed = wanted[:-1] if tail else wanted
        if len(parts) < len(fixed) or (not tail and len(parts) != len(fixed)):
            continue
        if any(not part.startswith("{") and part != got for part, got in zip(fixed, parts, strict=False)):
            continue
        kinds = ["b" if part.startswith("{") else "c" for part in fixed] + ["a" if tail else "d"]
        strength = ("".join(kinds), {"": 0, "GET": 1 if method == "HEAD" else 2}.get(rule_method, 2))
        if best is None or strength > best:
            best, answer = strength, setting
    return answer


segment = st.sampled_from(["v7", "v6", "agents", "run", "a", "b", "v60"])
rule_segment = st.one_of(segment, st.just("{x}"))
rule = st.builds(
    lambda method, parts, tail: (method + " " if method else "") + "/" + "/".join([*parts, *(["**"] if tail else [])]),
    st.sampled_from(["", "GET", "POST", "HEAD", "WEBSOCKET"]),
    st.lists(rule_segment, max_size=4),
    st.booleans(),
)
path = st.builds(
    lambda parts, slash: "/" + "/".join(parts) + slash,
    st.lists(st.one_of(segment, st.sampled_from(["", "other", ".", ".."])), max_size=6),
    st.sampled_from(["", "/"]),
)


@settings(max_examples=500)
@given(
    tables=st.lists(st.lists(rule, max_size=12, unique=True), max_size=3),
    method=st.sampled_from(["GET", "HEAD", "POST", "DELETE", "WEBSOCKET"]),
    path=path,
)
def test_the_matcher_answers_as_trying_every_rule_does(tables: list[list[str]], method: str, path: str) -> None:
    numbered = {number: {text: f"{number}:{text}" for text in texts} for number, texts in enumerate(tables)}
    found = RouteMatcher(numbered).match(method, path)
    assert {number: found.get(number) for number in numbered} == {
        number: naive(rules, method, path) for number, rules in numbered.items()
    }


@pytest.mark.parametrize(
    ("path", "setting"),
    [
        pytest.param("/v7/agents", "list", id="as-written"),
        pytest.param("/v7/agents/", "list", id="trailing-slash"),
        pytest.param("//v7//agents", "list", id="empty-segments"),
        pytest.param("/v7/agents/x", "one", id="parameter"),
        pytest.param("/v7/agents/x/", "one", id="parameter-trailing-slash"),
        pytest.param("/v7/agents/me", "me", id="literal-before-parameter"),
        pytest.param("/v7/agents/x/run", "below", id="tail"),
        pytest.param("/v7", "below", id="tail-may-be-empty"),
        pytest.param("/v70/agents", None, id="a-version-is-a-whole-segment"),
        pytest.param("/v7/agents/../agents", None, id="dot-segments-match-nothing"),
        pytest.param("/v7/./agents", None, id="single-dot"),
        pytest.param("/v7/agents/.hidden", "one", id="a-name-that-starts-with-a-dot"),
        pytest.param("/v7/agents/a%2Fb", "one", id="a-literal-percent-is-a-name"),
    ],
)
def test_slashes_dots_and_neighbours_do_not_dodge_a_rule(path: str, setting: str | None) -> None:
    rules = {"/v7/**": "below", "GET /v7/agents": "list", "/v7/agents/{name}": "one", "/v7/agents/me": "me"}
    assert RouteMatcher({1: rules}).match("GET", path).get(1) == setting


def test_get_covers_head_until_head_has_a_rule() -> None:
    assert RouteMatcher({1: {"GET /a": "get"}}).match("HEAD", "/a") == {1: "get"}
    assert RouteMatcher({1: {"GET /a": "get", "HEAD /a": "head"}}).match("HEAD", "/a") == {1: "head"}
    assert RouteMatcher({1: {"GET /a": "get", "/a": "any"}}).match("HEAD", "/a") == {1: "get"}
    assert RouteMatcher({1: {"POST /a": "post"}}).match("HEAD", "/a") == {}


def test_a_method_does_not_outweigh_a_more_specific_path() -> None:
    assert RouteMatcher({1: {"GET /v7/**": "tail", "/v7/{x}": "one"}}).match("GET", "/v7/a") == {1: "one"}


def test_starlettes_path_parameter_is_a_tail_and_other_convertors_are_parameters() -> None:
    matcher = RouteMatcher({1: {"/files/{rest:path}": "files", "/n/{n:int}": "number"}})
    assert matcher.match("GET", "/files/a/b") == {1: "files"}
    assert matcher.match("GET", "/n/x") == {1: "number"}


@pytest.mark.parametrize(
    "text",
    ["v7/agents", "get /v7", "GET v7", "GET  ", "/a/**/b", "/a/x{y}", "/a/{y}.json", "/a/{", "/a/../b", "/a b", "/a/*"],
)
def test_a_route_that_cannot_work_is_refused_with_the_way_to_write_it(text: str) -> None:
    with pytest.raises(ValueError, match="route"):
        parse_route(text)


def test_one_route_written_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="same route"):
        RouteMatcher({1: {"/a/{x}": 1, "/a/{y}": 2}})


def test_ten_thousand_routes_are_one_walk() -> None:
    """Counted, not timed: a match touches one dictionary per segment whatever the number of routes."""
    rules = {f"GET /v7/r{number}/{{x}}": number for number in range(10_000)}
    matcher = RouteMatcher({1: rules})
    assert matcher.match("GET", "/v7/r9999/y") == {1: 9999}
    assert matcher.match("GET", "/v7/r10000/y") == {}
