"""The validator against a second writing of the specification: tables of what may follow what, and random exchanges."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigil_policy.testing import ProtocolViolation, broken_rules, validated

PAIR = [(b"x-a", b"1")]
Table = Mapping[str, Mapping[str, str]]

# --- what may follow what: for each state the messages that are allowed in it, and where they lead --------------------

BODY: dict[str, tuple[str, dict[str, Any]]] = {
    "part": ("http.response.body", {"body": b"x", "more_body": True}),
    "nothing": ("http.response.body", {"more_body": True}),
    "last": ("http.response.body", {"body": b"x"}),
    "end": ("http.response.body", {}),
}
HTTP_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "start": ("http.response.start", {"status": 200, "headers": PAIR}),
    "start, trailers": ("http.response.start", {"status": 200, "trailers": True}),
    **BODY,
    "trailer": ("http.response.trailers", {"headers": PAIR, "more_trailers": True}),
    "last trailer": ("http.response.trailers", {"headers": PAIR}),
    "path": ("http.response.pathsend", {"path": "/x"}),
    "copy": ("http.response.zerocopysend", {"file": 3, "more_body": True}),
    "last copy": ("http.response.zerocopysend", {"file": 3}),
    "push": ("http.response.push", {"path": "/x", "headers": PAIR}),
    "hint": ("http.response.early_hint", {"links": [b"</x>"]}),
    "debug": ("http.response.debug", {"info": {}}),
}


def started(over: str, name: str) -> dict[str, dict[str, str]]:
    """A response that was started, and one of which something was sent, until it is `over`."""
    begun = f"{name}, begun"
    parts = {"part": begun, "copy": begun, "last": over, "end": over, "last copy": over}
    return {
        name: {**parts, "nothing": name, "path": over, "push": name, "debug": name},
        begun: {**parts, "nothing": begun, "push": begun, "debug": begun},
    }


HTTP: Table = {
    "waiting": {"start": "started", "start, trailers": "promised", "push": "waiting", "hint": "waiting",
                "debug": "waiting"},
    **started("over", "started"),
    **started("trailing", "promised"),
    "trailing": {"trailer": "trailing", "last trailer": "over", "push": "trailing", "debug": "trailing"},
    "over": {"debug": "over"},
}  # fmt: skip
HTTP_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "request": ("http.request", {"body": b"x", "more_body": True}),
    "last request": ("http.request", {}),
    "gone": ("http.disconnect", {}),
}
HTTP_HEARD: Table = {
    "": {"request": "", "last request": "whole", "gone": "gone"},
    "whole": {"gone": "gone"},
    "gone": {"gone": "gone"},
}

SOCKET_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "accept": ("websocket.accept", {"subprotocol": "chat", "headers": PAIR}),
    "send": ("websocket.send", {"text": "x"}),
    "close": ("websocket.close", {"code": 4000, "reason": "x"}),
    "deny": ("websocket.http.response.start", {"status": 403, "headers": PAIR}),
    "denial": ("websocket.http.response.body", {"body": b"x", "more_body": True}),
    "last of denial": ("websocket.http.response.body", {}),
}
SOCKET: Table = {
    "waiting": {"accept": "open", "close": "closed", "deny": "denying"},
    "open": {"send": "open", "close": "closed"},
    "denying": {"denial": "denying", "last of denial": "denied"},
    "closed": {},
    "denied": {},
}
SOCKET_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "connect": ("websocket.connect", {}),
    "receive": ("websocket.receive", {"bytes": b"x", "text": None}),
    "gone": ("websocket.disconnect", {"code": 1001}),
}
SOCKET_HEARD: Table = {
    "": {"connect": "connected", "gone": "gone"},
    "connected": {"receive": "connected", "gone": "gone"},
    "gone": {"gone": "gone"},
}

LIFESPAN_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    f"{phase} {end}": (f"lifespan.{phase}.{end}", {})
    for phase in ("startup", "shutdown")
    for end in ("complete", "failed")
}
LIFESPAN_IN: dict[str, tuple[str, dict[str, Any]]] = {
    "startup": ("lifespan.startup", {}),
    "shutdown": ("lifespan.shutdown", {}),
}


class Http:
    """One exchange, as the tables have it."""

    scope: Mapping[str, Any] = {
        "type": "http", "method": "GET", "path": "/", "headers": [],
        "extensions": {kind: {} for kind, _ in HTTP_OUT.values() if kind.count(".") == 2},
    }  # fmt: skip
    said, hears, allowed, heard = HTTP_OUT, HTTP_IN, HTTP, HTTP_HEARD
    ends_well = frozenset(("over",))

    def __init__(self) -> None:
        self.state, self.listening = "waiting", ""

    def out(self, name: str) -> bool:
        step = self.allowed[self.state].get(name)
        self.state = self.state if step is None else step
        return step is not None

    def hear(self, name: str) -> bool:
        step = self.heard[self.listening].get(name)
        self.listening = self.listening if step is None else step
        return step is not None

    def may_end(self) -> bool:
        return self.listening == "gone" or self.state in self.ends_well


class Socket(Http):
    scope = {
        "type": "websocket", "path": "/", "headers": [], "subprotocols": ["chat"],
        "asgi": {"version": "3.0", "spec_version": "2.4"}, "extensions": {"websocket.http.response": {}},
    }  # fmt: skip
    said, hears, allowed, heard = SOCKET_OUT, SOCKET_IN, SOCKET, SOCKET_HEARD
    ends_well = frozenset(("open", "closed", "denied"))

    def hear(self, name: str) -> bool:
        if name == "receive" and self.state not in ("open", "closed"):
            return False  # nobody speaks before the handshake is over
        if name == "receive" and self.state == "closed" and not self.was_open:
            return False
        return super().hear(name)

    was_open = False

    def out(self, name: str) -> bool:
        self.was_open = self.was_open or name == "accept"
        return super().out(name)

    def may_end(self) -> bool:
        return self.state in self.ends_well or self.listening == "gone"


class Lifespan(Http):
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}}
    said, hears = LIFESPAN_OUT, LIFESPAN_IN

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.answered: dict[str, str] = {}

    def out(self, name: str) -> bool:
        phase, end = name.split()
        fine = phase in self.begun and phase not in self.answered
        fine = fine and not (phase == "shutdown" and self.answered.get("startup") == "failed")
        if fine:
            self.answered[phase] = end
        return fine

    def hear(self, name: str) -> bool:
        fine = name not in self.begun and (name == "startup" or "startup" in self.begun)
        if fine:
            self.begun.append(name)
        return fine

    def may_end(self) -> bool:
        return True


def steps_of(model: type[Http]) -> st.SearchStrategy[list[tuple[str, str]]]:
    said = st.tuples(st.just("out"), st.sampled_from(sorted(model.said)))
    heard = st.tuples(st.just("in"), st.sampled_from(sorted(model.hears)))
    return st.lists(said | said | heard, max_size=8)


@st.composite
def likely(draw: st.DrawFn, model: type[Http]) -> list[tuple[str, str]]:
    """Mostly steps that are allowed: what was drawn at random alone fails at its first steps."""
    seen, steps = model(), []
    for _ in range(draw(st.integers(0, 10))):
        options = [("out", name) for name in sorted(model.said)] + [("in", name) for name in sorted(model.hears)]
        fine = [step for step in options if runs(model, [*steps, step]) is None]
        step = draw(st.sampled_from(fine if fine and draw(st.integers(0, 9)) else options))
        steps.append(step)
        (seen.out if step[0] == "out" else seen.hear)(step[1])
    return steps


def runs(model: type[Http], steps: list[tuple[str, str]]) -> int | None:
    """The place of the first step that the tables forbid."""
    seen = model()
    for place, (way, name) in enumerate(steps):
        if not (seen.out(name) if way == "out" else seen.hear(name)):
            return place
    return None


def expected(model: type[Http], steps: list[tuple[str, str]]) -> int | str | None:
    place = runs(model, steps)
    if place is not None:
        return place
    seen = model()
    for way, name in steps:
        (seen.out if way == "out" else seen.hear)(name)
    return None if seen.may_end() else "end"


def judged(model: type[Http], steps: list[tuple[str, str]]) -> int | str | None:
    """The same, as the validator has it: where it raises, "end" for an exchange that ends too early."""
    reached: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for place, (way, name) in enumerate(steps):
            reached.append(place)
            if way == "in":
                await receive()
            else:
                kind, members = model.said[name]
                await send({"type": kind, **members})
        reached.append(len(steps))

    incoming = iter([{"type": model.hears[name][0], **model.hears[name][1]} for way, name in steps if way == "in"])

    async def receive() -> Any:
        return next(incoming)

    async def send(message: Any) -> None:
        pass

    running = validated(app)(dict(model.scope), receive, send)
    try:
        running.send(None)  # type: ignore[attr-defined]  # nothing here waits: no event loop is needed
    except StopIteration:
        return None
    except ProtocolViolation:
        return reached[-1] if reached[-1] < len(steps) else "end"
    raise AssertionError("nothing here waits")


MODELS = [Http, Socket, Lifespan]


@pytest.mark.parametrize("model", MODELS)
def test_the_validator_and_the_tables_agree(model: type[Http]) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.one_of(steps_of(model), likely(model)))
    def agree(steps: list[tuple[str, str]]) -> None:
        assert judged(model, steps) == expected(model, steps)

    agree()


@pytest.mark.parametrize("model", MODELS)
def test_every_pair_of_messages_in_every_state(model: type[Http]) -> None:
    """No luck needed: each way into each state, and everything that could come next."""
    options = [("out", name) for name in model.said] + [("in", name) for name in model.hears]
    waiting: list[list[tuple[str, str]]] = [[]]
    seen, count = set(), 0
    while waiting:
        steps = waiting.pop()
        for option in options:
            further = [*steps, option]
            found = judged(model, further)
            assert found == expected(model, further), further
            count += 1
            if found is None or found == "end":
                reached = model()
                for way, name in further:
                    (reached.out if way == "out" else reached.hear)(name)
                state = repr(sorted(vars(reached).items(), key=str))
                if state not in seen:
                    seen.add(state)
                    waiting.append(further)
    assert count > 20 and seen


@given(likely(Http))
def test_messages_alone_are_judged_as_in_an_exchange(steps: list[tuple[str, str]]) -> None:
    messages = [{"type": Http.said[name][0], **Http.said[name][1]} for way, name in steps if way == "out"]
    alone = [("out", name) for way, name in steps if way == "out"]
    place = runs(Http, alone)
    wrong = broken_rules(messages, scope=Http.scope)
    assert (not wrong) is (place is None)
    if place is not None:
        assert wrong[0].startswith(f"message {place}: ")
