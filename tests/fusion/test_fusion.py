"""Fused equals nested equals the rules: the specification of the pass as a property.

The same random program runs several times: in one fused stack; in one stack for each policy and in a random partition,
with an opaque barrier between the stacks so that they cannot fuse; in one stack for each policy without a barrier; and
in the naive interpreter of the rules. All must show the same log: every hook with what it saw, every message that the
server got, everything that the application met, every exception, in the same order.

A comparison that never fails proves nothing: `test_a_broken_rule_is_noticed` breaks the interpreter rule by rule and
wants each fault found.
"""

import functools
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from sigil_policy.core import socket
from sigil_policy.core.stack import PolicyStack
from sigil_policy.testing.rules import broken_rules
from tests.conftest import FUSION_EXAMPLES
from tests.fusion.interpreter import interpret
from tests.fusion.programs import Log, Program, World, draw_program, programs, run, smallest


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Thousands of `on_finish` fail on purpose here, and the stack logs each one."""
    logging.disable(logging.CRITICAL)
    # Nobody is woken while a machine that has much to do takes its time: that would be no difference.
    shortest, socket._SHORTEST = socket._SHORTEST, 3_600.0
    yield
    socket._SHORTEST = shortest
    logging.disable(logging.NOTSET)


def barrier(app: Any) -> Any:
    """An ASGI application that shows nothing of the one behind it."""

    async def opaque(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return opaque


def fused(world: World) -> Any:
    return PolicyStack(world.app, world.policies, clock=world.clock)


def nested(world: World) -> Any:
    app: Any = world.app
    for policy in reversed(world.policies):
        app = barrier(PolicyStack(app, [policy], clock=world.clock))
    return app


def partitioned(world: World) -> Any:
    app: Any = world.app
    group = world.policies[-1:]
    for index in range(len(world.policies) - 2, -1, -1):
        if world.program.cuts[index]:
            app, group = barrier(PolicyStack(app, group, clock=world.clock)), []
        group = [world.policies[index], *group]
    return PolicyStack(app, group, clock=world.clock)


def absorbed(world: World) -> Any:
    """One stack for each policy and nothing between them: they fuse by themselves."""
    app: Any = world.app
    for policy in reversed(world.policies):
        app = PolicyStack(app, [policy], clock=world.clock)
    return app


def by_the_rules(world: World) -> Any:
    return interpret(world.app, world.policies, world.clock)


OTHERS = {"by the rules": by_the_rules, "nested": nested, "partitioned": partitioned, "absorbed": absorbed}


def difference(one: Log, other: Log) -> str:
    """The first place where two logs part, after what led to it; nothing when they are equal."""
    for index in range(max(len(one), len(other))):
        here, there = (log[index] if index < len(log) else "(nothing)" for log in (one, other))
        if here != there:
            before = "".join(f"\n           {entry}" for entry in one[:index])
            return f"{before}\n    fused: {here}\n    other: {there}"
    return ""


def disagreement(program: Program, backend: str) -> str:
    log = run(program, fused, backend)
    for name, side in OTHERS.items():
        if found := difference(log, run(program, side, backend)):
            return f"fused against {name}:{found}"
    return ""


def agree(program: Program, backend: str) -> None:
    if disagreement(program, backend):
        program = smallest(program, lambda candidate: bool(disagreement(candidate, backend)))
        pytest.fail(f"{program}\n{disagreement(program, backend)}")


@settings(max_examples=FUSION_EXAMPLES)
@given(program=programs)
def test_fused_equals_nested_equals_the_rules(program: Program) -> None:
    agree(program, "asyncio")


@settings(max_examples=FUSION_EXAMPLES // 4)
@given(program=programs)
def test_fused_equals_nested_equals_the_rules_on_trio(program: Program) -> None:
    agree(program, "trio")


@given(program=programs)
def test_both_event_loops_see_the_same_exchange(program: Program) -> None:
    assert not difference(run(program, fused, "asyncio"), run(program, fused, "trio"))


@given(program=programs)
def test_what_a_valid_application_sends_stays_valid(program: Program) -> None:
    """AS-06: one start, then the body, nothing after its end, whatever the policies do."""
    sends = [step.message for step in program.app if step.do == "send"]
    catches = any(step.catches for step in program.app)
    if not catches and not broken_rules(sends, lower_case=False):
        sent = [dict(entry[1]) for entry in run(program, fused) if entry[0] == "server" and entry[1] != "left"]
        assert not broken_rules(sent)


def test_programs_reach_what_they_are_meant_to_reach() -> None:
    """Each hook, each way to end, held bodies, answered errors: a generator that avoids them tests nothing."""
    reached = set()
    for seed in range(2_000):
        program = draw_program(seed)
        log = run(program, fused)
        hooks = [entry[1] for entry in log]
        reached |= {(program.kind, hook) for hook in hooks if isinstance(hook, str)}
        reached |= {(program.kind, entry[2]) for entry in log if entry[1] == "on_finish" and len(entry) > 3}
        reached |= {("depth", len(program.policies))}
        reached |= {(entry[1], "resumed") for entry in log if entry[1:] == ("on_chunk", "resumed")}
        reached |= {entry[1:] for entry in log if entry[:2] == ("app", "caught")}
        reached |= {("answered", "on_error") for entry in log[-1:] if "on_error" in hooks and entry[1] is None}
    for kind in ("http", "websocket"):
        for hook in ("on_request", "around", "enter", "exit", "on_response", "on_error", "on_finish"):
            assert (kind, hook) in reached
        for outcome in ("ok", "refused", "error", "timeout", "cancelled", "disconnected"):
            assert (kind, outcome) in reached
    assert {("http", "wants_body"), ("http", "on_body"), ("http", "on_chunk"), ("http", "read")} <= reached
    assert {("depth", 0), ("depth", 8), ("answered", "on_error")} <= reached
    assert {("http", "wants_chunks"), ("caught", "StreamEndedError"), ("on_chunk", "resumed")} <= reached


# --- a test of the test ------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, str]] = {
    # Rules 1 to 5: whose error, and who may still answer.
    "on_error for what its own on_request raised": ("if own or self.left:", "if self.left:"),
    "on_error answers behind a start that has left": ("if own or self.left:", "if own:"),
    "one global 'started' instead of one for each policy": ("if own or self.left:", "if own or ex.status:"),
    "a reply passes the policy's own hooks": (
        'await self.outward({"type": f"{prefix}http.response.start"',
        'await self.send({"type": f"{prefix}http.response.start"',
    ),
    "a failing on_response may not be answered by its own policy": (
        "self.policy.on_response(self.ex, head)\n        if start",
        "self.left = True\n        self.policy.on_response(self.ex, head)\n        if start",
    ),
    "a websocket close does not count as an answer": (
        'self.left = self.left or kind == "websocket.close"',
        "self.left = self.left or False",
    ),
    "cancellation reaches on_error": (
        "except Exception as error:\n            ex.error",
        "except BaseException as error:\n            ex.error",
    ),
    # Rule 7: answers to errors.
    "an answered error always stays pending": ("if answer.reraise:", "if True:"),
    "reraise is forgotten": ("if answer.reraise:", "if False:"),
    "an answered error is forgotten": ("await self.reply(answer)\n            if", "ex.error = None\n            if"),
    # Rules 10 to 13: held bodies.
    "an event stream is held": ('b"text/event-stream"', 'b"text/something-else"'),
    "a body over the bound is held": ("int(length) <= self.policy.bound", "True"),
    "a stream without a length is held": ('(more and head.get(b"content-length") is None)', "False"),
    "the bound is not kept while gathering": ("len(body) > self.policy.bound or", "False or"),
    "wants_body is not asked": ("not self.policy.wants_body(self.ex, head) or ", ""),
    "a held start is sent although the application failed": (
        "except BaseException as error:\n                    ex.error = error",
        "except BaseException as error:\n                    ex.error = error; await self.release()",
    ),
    "a held start is lost when the application returns": (
        "await self.release()\n                except",
        "pass\n                except",
    ),
    "a held start is overtaken by another message": (
        "await self.release()\n            if self.ex._ended:\n                return\n            self.left",
        "self.left",
    ),
    "a second start replaces a held one": (
        "await self.release()\n            if self.ex._ended:\n                return\n            head",
        "head",
    ),
    "a hold survives a failing on_body": ("self.held = None\n        new", "new"),
    "content-length is not corrected": ('elif head.get(b"content-length") is not None:', "elif False:"),
    "content-length stays on 304": ("if head.status in (204, 304):", "if False:"),
    # Rule 14: chunks.
    "on_chunk after the chunk has left": (
        "if self.watches else None\n",
        "if self.watches and not await self.outward(message) else None\n",
    ),
    "bodies that were held are no chunks": ("await self.chunk(part)", "await self.outward(part)"),
    "wants_chunks is not asked": ("self.watches = self.policy.wants_chunks(self.ex, head)", "self.watches = True"),
    "wants_chunks is asked before on_response": (
        "self.policy.on_response(self.ex, head)\n        if start",
        "self.policy.wants_chunks(self.ex, head); self.policy.on_response(self.ex, head)\n        if start",
    ),
    "wants_chunks is asked after the head has left": (
        "self.watches = self.policy.wants",
        "self.left = True; self.watches = self.policy.wants",
    ),
    # The end of a stream.
    "a stream of a promised length is ended": ('head.get(b"content-length") is not None or start', "start"),
    "a stream with trailers is ended": ('start.get("trailers", False)', "False"),
    "the last chunk ends a stream": ('or not message.get("more_body", False):\n            return', "or False: return"),
    "the chunk that went over is lost": (
        "await self.outward(message)\n        if self.ex._ended",
        "if self.ex._ended",
    ),
    "the last words pass the policy's own hooks": (
        'await self.outward({"type": "http.response.body", "body": end.last})',
        'await self.chunk({"type": "http.response.body", "body": end.last})',
    ),
    "the last words are lost": ('"body": end.last}', "}"),
    "a stream goes on after its end": ("self.ex._ended = True\n        self.ex.refused", "self.ex.refused"),
    "a stream is over although its end did not go out": (
        'await self.outward({"type": "http.response.body", "body": end',
        'self.ex._ended = True; await self.outward({"type": "http.response.body", "body": end',
    ),
    "inner policies see what comes after the end": (
        "if self.ex._ended:\n            raise StreamEndedError\n        kind",
        "kind",
    ),
    "two policies end one stream": (
        "if self.ex._ended:\n            return None",
        "if False:\n            return None",
    ),
    "what was held goes on after the end": (
        "for part in parts:\n            if not self.ex._ended:",
        "for part in parts:\n            if True:",
    ),
    "an ended stream was nobody's refusal": (
        "self.ex._ended = True\n        self.ex.refused_by = type(self.policy)",
        "self.ex._ended = True\n        _ = type(self.policy)",
    ),
    "the end of a stream is an error": ("if not (ex._ended and because_of_the_end(error)):", "if True:"),
    "any error after the end is because of it": (
        "if not (ex._ended and because_of_the_end(error)):",
        "if not ex._ended:",
    ),
    "what an application makes of the end is an error": ("error.__cause__ or error.__context__", "None"),
    "one of a group is enough": ("return all(because", "return any(because"),
    # Rules 9, 15 and 16: HEAD and WebSockets.
    "a reply to HEAD has a body": ('or self.ex.method == "HEAD"', "or False"),
    "a denial response where none is offered": ('if "websocket.http.response" not in', "if None in"),
    "the close code is always the same": ('"code": answer.code', '"code": 1008'),
    "a status leaves on websocket.accept": ('if start["type"] != "websocket.accept":', "if True:"),
    "headers on an accept that cannot have them": ('>= "2.1"', '>= "2.0"'),
    # Connections that are watched.
    "a message is heard before the accept": (
        'message["type"] != "websocket.receive" or not self.opened',
        'message["type"] != "websocket.receive"',
    ),
    "a check before the accept": ("if self.opened and not self.ex._closing and", "if not self.ex._closing and"),
    "a closed connection is watched": ('self.opened = self.opened and kind != "websocket.close"', "pass"),
    "a check goes on after the end": ("if self.opened and not self.ex._closing and", "if self.opened and"),
    "a check is asked once only": ("self.ex.clock.monotonic() + answer", "math.inf"),
    "a check is asked always": ("self.due <= self.ex.clock.monotonic()", "True"),
    "a check waits for a message": (
        "if await self.check():\n                return self.ex._closing\n            message",
        "message",
    ),
    "what was heard late is not checked": (
        "return message\n            if await self.check():",
        "return message\n            if False:",
    ),
    "what is sent is not checked": (
        "if await self.check():\n                raise",
        "if False:\n                raise",
    ),
    "a refused message goes further in": (
        "DEFAULT_STYLE.message(answer, self.ex)})",
        "DEFAULT_STYLE.message(answer, self.ex)})\n                return message",
    ),
    "a refused message is answered from the inside": (
        'await self.outward({"type": "websocket.send"',
        'await self.send({"type": "websocket.send"',
    ),
    "a close is nobody's refusal": (
        "self.ex.refused_by = type(self.policy).__name__\n        with",
        "with",
    ),
    "a connection goes on after its end": (
        '"reason": end.reason}\n        self.ex._ended = True',
        '"reason": end.reason}',
    ),
    "a client that left before the close is an error": (
        "with contextlib.suppress(Exception):  # who",
        "with contextlib.nullcontext():  # who",
    ),
    "a reason where the server knows none": ('>= "2.3"', '>= "2.0"'),
    "what the framework makes of the end is an error": (
        "StreamEndedError | WebSocketDisconnect):",
        "StreamEndedError):",
    ),
    "the chosen subprotocol is no field": ('if start.get("subprotocol") is not None:', "if False:"),
    "a policy chooses no subprotocol": ('if chosen := head.get(b"sec-websocket-protocol"):', "if chosen := None:"),
    "the chosen subprotocol stays a field": ('head.remove(b"sec-websocket-protocol")', "pass"),
    # Rules 18 to 20: the end.
    "a failing on_finish is raised": (
        "except Exception:\n            pass",
        "except ZeroDivisionError:\n            pass",
    ),
    "an awaiting on_finish is cancelled": ("shield=True", "shield=False"),
    "every reply is a refusal": ("if answer.status >= 400:", "if True:"),
    "a disconnect after the end counts": ("and not ex.done", "and True"),
    "a request body that was read is replayed for ever": (
        "message, ex._replay = ex._replay, None",
        "message = ex._replay",
    ),
    "pathsend does not end a response": ('in ("http.response.pathsend", "websocket.close")', 'in ("websocket.close",)'),
}

_SOURCE = Path(__file__).with_name("interpreter.py").read_text(encoding="utf-8")


def broken(old: str, new: str) -> Any:
    """The interpreter with `old` replaced by `new` in its source."""
    assert _SOURCE.count(old) == 1, f"{old!r} is {_SOURCE.count(old)} times in the interpreter"
    spec = importlib.util.spec_from_loader("broken_interpreter", loader=None)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    exec(compile(_SOURCE.replace(old, new), "broken_interpreter.py", "exec"), module.__dict__)

    def by_a_broken_rule(world: World) -> Any:
        return module.interpret(world.app, world.policies, world.clock)

    return by_a_broken_rule


_drawn = functools.cache(draw_program)


@functools.cache
def _sound(seed: int) -> Log:
    return run(_drawn(seed), fused)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_is_noticed(fault: str) -> None:
    side = broken(*FAULTS[fault])
    assert any(difference(_sound(seed), run(_drawn(seed), side)) for seed in range(3_000))
