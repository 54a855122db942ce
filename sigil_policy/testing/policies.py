"""For authors of policies: the checks that every policy passes, and what they prove.

    @pytest.mark.parametrize("check", policy_checks(), ids=str)
    async def test_my_policy(check: PolicyCheck) -> None:
        await check(MyPolicy(name="x"), secrets=["the secret that it was given"])

    await check_policy(MyPolicy(name="x"))          # all of them, one after the other

The policy stands in a stack, between two validators (`sigil_policy.testing.validated`), around small applications that
answer, stream, fail, wait and are cancelled. It may refuse what it is sent; what it must not do is break the protocol,
raise, hold an event stream back, lose an error or a cancellation, ask for what nobody has sent, or be changed.
"""

import gc
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any
from weakref import ref

import anyio
import anyio.lowlevel
import anyio.to_thread
from pydantic import SecretStr

from sigil_policy.core.exchange import Exchange
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Reply
from sigil_policy.core.stack import PolicyStack
from sigil_policy.testing.asgi import App, Headers, Message, Sent, connect, drive
from sigil_policy.testing.clock import FrozenClock
from sigil_policy.testing.rules import validated
from sigil_policy.testing.stores import holds, told

PATIENCE = 10.0
"""Seconds that one exchange of a check may take."""

CANARY = "canary-7c1f-of-the-application"

_OK: tuple[Message, ...] = (
    {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"text/plain"), (b"content-length", b"2")],
    },
    {"type": "http.response.body", "body": b"ok", "more_body": False},
)
_EVENTS: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream")],
}


class ApplicationError(Exception):
    """What the applications of the checks raise."""


class _Watch(Policy):
    """Outside of the policy: keeps the exchanges, and counts how often each has ended."""

    seen: Any

    def on_finish(self, ex: Exchange) -> None:
        self.seen.append((ex, ex.outcome, dict(ex._notes)))  # noqa: SLF001


class _Refuse(Policy):
    """Inside of the policy: answers everything itself."""

    def on_request(self, ex: Exchange) -> Reply:
        headers = ((b"content-type", b"text/plain"), (b"content-length", b"2"))
        return Reply(status=403, headers=headers, body=b"no", code=4403)


class PolicyTrial:
    """One policy under one check."""

    def __init__(
        self,
        policy: Policy,
        outside: Sequence[Policy],
        headers: Headers,
        secrets: Iterable[str],
        backends: Sequence[str],
    ) -> None:
        self.policy = policy
        self.outside = tuple(outside)
        self.headers = list(headers.items() if isinstance(headers, Mapping) else headers)
        self.secrets = tuple(secrets)
        self.backends = tuple(backends)
        self.clock = FrozenClock()
        self.seen: list[tuple[Exchange, str, dict[int, Any]]] = []

    def stack(self, app: App, *inside: Policy, times: int = 1) -> App:
        policies = [_Watch(seen=self.seen), *self.outside, *[self.policy] * times, *inside]
        self.placed = PolicyStack(validated(app), policies=policies, clock=self.clock)
        return validated(self.placed)

    async def drive(self, app: App, method: str = "GET", path: str = "/", **options: Any) -> Sent:
        """One exchange, with the headers that the caller of the check gave; it is over in bounded time."""
        headers = [*self.headers, *options.pop("headers", ())]
        with anyio.fail_after(PATIENCE):
            return await drive(app, method, path, headers=headers, **options)

    def over(self, outcome: str | None = None) -> None:
        """Every exchange so far has ended, and each of them once."""
        ended = [id(ex) for ex, *_ in self.seen]
        holds(bool(ended), "on_finish of the policies outside was called")
        holds(len(ended) == len(set(ended)), "on_finish was called once for each exchange")
        if outcome is not None:
            holds(self.seen[-1][1] == outcome, f"the outcome is {self.seen[-1][1]!r}, not {outcome!r}")

    @contextmanager
    def finishes(self) -> Iterator[list[int]]:
        """The exchanges for which the policy's own `on_finish` was called."""
        cls = type(self.policy)
        plain = cls.on_finish
        counted: list[int] = []
        if plain is Policy.on_finish:
            yield counted
            return
        own = "on_finish" in vars(cls)

        def on_finish(policy: Any, ex: Exchange) -> Any:
            counted.append(id(ex))
            return plain(policy, ex)

        cls.on_finish = on_finish  # type: ignore[method-assign, assignment]  # for this block only
        try:
            yield counted
        finally:
            if own:
                cls.on_finish = plain  # type: ignore[method-assign]  # as it was
            else:
                del cls.on_finish


class PolicyCheck:
    """One check: `await check(policy)`; its name says what must hold.

    Options of the call:
        outside: policies that have to stand outside of it, those that give what it needs (default none).
        headers: of every request, for example a credential that it accepts (default none).
        secrets: texts that it was given and must never show (default: those of its `SecretStr` fields).
        backends: the event loops that it promises to work on (default asyncio and trio).

    Raises `AssertionError` with what was promised and what was seen, `ValueError` for a policy that needs a fact that
    nobody outside gives.
    """

    def __init__(self, run: Callable[[PolicyTrial], Awaitable[None]]) -> None:
        self.name = run.__name__
        self._run = run

    def __repr__(self) -> str:
        return self.name

    async def __call__(
        self,
        policy: Policy,
        *,
        outside: Sequence[Policy] = (),
        headers: Headers = (),
        secrets: Iterable[str] = (),
        backends: Sequence[str] = ("asyncio", "trio"),
    ) -> None:
        if not isinstance(policy, Policy):
            raise TypeError(f"a policy is checked, not {type(policy).__name__}")
        missing = PolicyStack(_answers, policies=[*outside, policy]).missing
        if missing:
            facts = " and ".join(sorted(fact.__name__ for fact in missing))
            raise ValueError(
                f"{type(policy).__name__} needs a {facts}: give outside=[...], with a policy that gives it"
            )
        with told(self.name):
            await self._run(PolicyTrial(policy, outside, headers, secrets, backends))


_CHECKS: list[PolicyCheck] = []


def policy_checks() -> list[PolicyCheck]:
    """The checks, to be given to `pytest.mark.parametrize(..., ids=str)`."""
    return list(_CHECKS)


async def check_policy(
    policy: Policy,
    *,
    outside: Sequence[Policy] = (),
    headers: Headers = (),
    secrets: Iterable[str] = (),
    backends: Sequence[str] = ("asyncio", "trio"),
) -> None:
    """Run every check.

        await check_policy(Tenant(), outside=[BearerAuth(...)], headers={"authorization": "Bearer ..."})

    Options as of `PolicyCheck`. Raises `AssertionError` at the first that fails.
    """
    kept = list(secrets)
    for check in _CHECKS:
        try:
            await check(policy, outside=outside, headers=headers, secrets=kept, backends=backends)
        except Exception as error:
            error.add_note(f"check_policy: {check.name}")
            raise


def _check(run: Callable[[PolicyTrial], Awaitable[None]]) -> PolicyCheck:
    check = PolicyCheck(run)
    _CHECKS.append(check)
    return check


# --- applications ----------------------------------------------------------------------------------------------------


async def _answers(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await _echoes(scope, receive, send)
        return
    for message in _OK:
        await send({**message, "body": b""} if scope["method"] == "HEAD" and "body" in message else message)


async def _echoes(scope: Any, receive: Any, send: Any) -> None:
    first = await receive()
    holds(first["type"] == "websocket.connect", f"a WebSocket begins with websocket.connect, not with {first!r}")
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] != "websocket.disconnect":
        await send({"type": "websocket.send", "text": message["text"]})


async def _fails(scope: Any, receive: Any, send: Any) -> None:
    raise ApplicationError(CANARY)


def _status(sent: Sent) -> int:
    return sent.status if sent.messages else 0


# --- the checks ------------------------------------------------------------------------------------------------------


@_check
async def it_is_a_value_and_shows_no_secret(trial: PolicyTrial) -> None:
    policy: Any = trial.policy
    holds(is_dataclass(policy), "a policy is a dataclass; Policy makes its subclasses ones")
    for field in fields(policy):
        try:
            setattr(policy, field.name, None)
        except (FrozenInstanceError, AttributeError):
            continue
        raise AssertionError(f"{field.name} can be set: a policy is frozen")
    holds(copy(policy) == policy, "a copy is equal")
    given = [getattr(policy, field.name) for field in fields(policy)]
    secrets = [*trial.secrets, *(value.get_secret_value() for value in given if isinstance(value, SecretStr))]
    shown = repr(policy) + repr(PolicyStack(_answers, policies=[*trial.outside, policy]))
    for secret in secrets:
        holds(secret not in shown, "a secret is in the repr")


@_check
async def a_request_gets_one_valid_answer(trial: PolicyTrial) -> None:
    with trial.finishes() as finished:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"):
            sent = await trial.drive(trial.stack(_answers), method)
            holds(_status(sent) not in (0, 500), f"{method} is answered, with {_status(sent)}")
            trial.over()
    holds(len(finished) == len(set(finished)), "on_finish of the policy was called once for each exchange")


@_check
async def a_head_has_what_the_get_has(trial: PolicyTrial) -> None:
    """RFC 9110 section 9.3.2: the same fields, and no content of the policy's own."""
    app = trial.stack(_answers)
    got, head = await trial.drive(app), await trial.drive(app, "HEAD")
    if _status(got) >= 400 or _status(head) >= 400:
        holds(head.body == b"", "a refused HEAD has no content")
        return
    holds(_status(head) == _status(got), f"HEAD is {_status(head)}, GET is {_status(got)}")
    holds(head.body == b"", "a HEAD has no content")
    holds(head.header("content-length") in (got.header("content-length"), None), "content-length is that of the GET")


@_check
async def the_request_body_reaches_the_application(trial: PolicyTrial) -> None:
    """Once, whole, and then `receive` is the server's again (AS-20)."""
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            heard.append(message.get("body", b""))
            more = message.get("more_body", False)
        for message in _OK:
            await send(message)
        heard.append((await receive())["type"])

    parts = [b"one", b"two", b""]
    incoming: list[Message] = [
        {"type": "http.request", "body": part, "more_body": place < 2} for place, part in enumerate(parts)
    ]
    sent = await trial.drive(trial.stack(app), "POST", incoming=[*incoming, {"type": "http.disconnect"}])
    if _status(sent) < 400:
        holds(b"".join(heard[:-1]) == b"onetwo", f"the application has heard {heard}")
        holds(heard[-1] == "http.disconnect", "the disconnect arrives after the body")


@_check
async def nothing_is_received_that_nobody_needs(trial: PolicyTrial) -> None:
    """AS-21: a client that waits for 100-continue would be asked for a body that nobody reads."""
    asked = []

    async def receive() -> Message:
        asked.append(1)
        return {"type": "http.request", "body": b"", "more_body": False}

    stack = trial.stack(_answers)

    async def without(scope: Any, _: Any, send: Any) -> None:
        await stack(scope, receive, send)

    await trial.drive(without)
    holds(not asked, "receive was called for a GET whose application does not")


@_check
async def what_the_application_sends_is_not_written_to(trial: PolicyTrial) -> None:
    """AS-28: an application may send one constant message many times."""
    before = repr(_OK)
    app = trial.stack(_answers)
    first, second = await trial.drive(app), await trial.drive(app)
    holds(repr(_OK) == before, "the application's messages were changed in place")
    holds(_status(first) == _status(second) or max(_status(first), _status(second)) >= 400, "both get the same")


@_check
async def an_event_stream_is_not_held_back(trial: PolicyTrial) -> None:
    go = anyio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(_EVENTS)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await go.wait()
        await send({"type": "http.response.body", "body": b"data: 2\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with connect(trial.stack(app), kind="http", headers=trial.headers, timeout=PATIENCE) as stream:
        start = await stream.receive("http.response.start")
        if start["status"] < 400:
            body = await stream.receive_body()
            holds(b"data: 1\n\n" in body, f"the first event has left before the second is made: {body!r}")
            go.set()
            body = (await stream.ended()).body
            holds(b"data: 1\n\n" in body and body.index(b"data: 2") > 0, f"both events leave, in order: {body!r}")
    trial.over()


@_check
async def a_websocket_is_accepted_or_refused(trial: PolicyTrial) -> None:
    """With and without denial responses, on servers that know only the first version too (AS-15, AS-18)."""
    scopes: tuple[dict[str, Any], ...] = (
        {},
        {"extensions": {}},
        {"extensions": None, "asgi": {"version": "3.0", "spec_version": "2.0"}},
    )
    for scope in scopes:
        app = trial.stack(_answers)
        with trial.finishes() as finished:
            async with connect(app, headers=trial.headers, scope=scope) as socket:
                await socket.send({"type": "websocket.connect"})
                if (await socket.receive())["type"] == "websocket.accept":
                    await socket.send_text("hello")
                    await socket.receive()
        holds(len(finished) == len(set(finished)), "on_finish of the policy was called once")
        trial.over()


@_check
async def a_lifespan_passes(trial: PolicyTrial) -> None:
    """AS-03: start and end reach the application, and the server its answers."""
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for phase in ("startup", "shutdown"):
            heard.append((await receive())["type"])
            await send({"type": f"lifespan.{phase}.complete"})

    async with connect(trial.stack(app), kind="lifespan") as lifespan:
        for phase in ("startup", "shutdown"):
            await lifespan.send({"type": f"lifespan.{phase}"})
            await lifespan.receive(f"lifespan.{phase}.complete")
    holds(heard == ["lifespan.startup", "lifespan.shutdown"], f"the application has heard {heard}")


@_check
async def another_kind_of_scope_passes(trial: PolicyTrial) -> None:
    """AS-02."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    scope = {"type": "mqtt"}
    await trial.stack(app)(scope, None, None)
    holds(seen == [{"type": "mqtt"}] and seen[0] is scope, "an unknown scope reaches the application untouched")


@_check
async def an_error_of_the_application_comes_out_and_shows_nothing(trial: PolicyTrial) -> None:
    """AS-23."""
    sent = await trial.drive(trial.stack(_fails), raise_errors=False)
    if sent.error is None:
        holds(bool(sent.messages), "an error is answered, or comes out")
    else:
        holds(isinstance(sent.error, ApplicationError), f"{sent.error!r} came out, not what the application raised")
    holds(CANARY.encode() not in repr(sent.messages).encode(), "what the application raised is shown to the client")
    trial.over()


@_check
async def an_error_after_the_start_is_raised_on(trial: PolicyTrial) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(_EVENTS)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        raise ApplicationError(CANARY)

    sent = await trial.drive(trial.stack(app), raise_errors=False)
    if _status(sent) < 400:
        holds(isinstance(sent.error, ApplicationError), f"{sent.error!r} came out, not what the application raised")
        holds(sent.messages[-1].get("more_body", False), "a response that was cut short is not called complete")
    trial.over()


@_check
async def a_client_that_leaves_is_heard_of(trial: PolicyTrial) -> None:
    """AS-20, AS-22: by `receive`, and by the OSError of a `send`, which is nobody's error."""
    heard = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(_EVENTS)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        while (message := await receive())["type"] != "http.disconnect":
            pass
        heard.append(message["type"])

    async with connect(trial.stack(app), kind="http", headers=trial.headers) as stream:
        started = (await stream.receive("http.response.start"))["status"] < 400
    holds(bool(heard) or not started, "the application hears of the disconnect")
    trial.over()

    def broken(message: Message) -> None:
        raise OSError("the connection is gone")

    with trial.finishes() as finished:
        sent = await trial.drive(trial.stack(_answers), on_send=broken, raise_errors=False)
    holds(isinstance(sent.error, OSError), f"the OSError of send comes out, not {sent.error!r}")
    holds(len(finished) == len(set(finished)), "on_finish of the policy was called once")
    trial.over()


@_check
async def a_cancellation_passes(trial: PolicyTrial) -> None:
    """AS-24: wherever the application is waiting, and what was begun is ended."""
    for place in ("before the start", "in the stream"):
        waiting = anyio.Event()

        async def app(scope: Any, receive: Any, send: Any, place: str = place, waiting: Any = waiting) -> None:
            if place == "in the stream":
                await send(_EVENTS)
                await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            waiting.set()
            await anyio.sleep_forever()

        stack = trial.stack(app)
        reached: list[int] = []

        async def run(stack: App = stack, reached: list[int] = reached, waiting: Any = waiting) -> None:
            await trial.drive(stack)
            waiting.set()
            reached.append(1)

        with trial.finishes() as finished, anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                await waiting.wait()
                await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
        refused = bool(reached)
        holds(len(finished) == len(set(finished)), f"on_finish was called once, cancelled {place}")
        trial.over(None if refused else "cancelled")


@_check
async def what_is_refused_inside_of_it_leaves_in_order(trial: PolicyTrial) -> None:
    for method in ("GET", "HEAD", "POST"):
        sent = await trial.drive(trial.stack(_answers, _Refuse()), method)
        holds(400 <= _status(sent) < 500, f"a refusal stays one: {_status(sent)}")
    async with connect(trial.stack(_answers, _Refuse()), headers=trial.headers) as socket:
        await socket.send({"type": "websocket.connect"})
        message = await socket.receive()
        holds(message["type"] in ("websocket.http.response.start", "websocket.close"), f"refused by {message['type']}")
    trial.over()


@_check
async def twice_in_one_stack_each_has_its_own_notes(trial: PolicyTrial) -> None:
    app = trial.stack(_answers, times=2)
    placed = {id(policy) for policy in trial.placed.policies}
    sent = await trial.drive(app)
    holds(_status(sent) not in (0, 500), f"two of it answer {_status(sent)}")
    async with connect(app, headers=trial.headers) as socket:
        await socket.send({"type": "websocket.connect"})
        await socket.receive()
    for _, _, notes in trial.seen:
        holds(set(notes) <= placed, "a note is kept under the policy that stands in the stack (ex.keep(self, ...))")
    trial.over()


@_check
async def a_scope_with_little_in_it_will_do(trial: PolicyTrial) -> None:
    """AS-08, AS-09, AS-10: keys that are absent or None, header names in mixed case, headers that can be read once."""
    for scope in (
        {"headers": iter([[name.title(), value] for name, value in _pairs(trial.headers)])},
        {"headers": tuple([name, value] for name, value in _pairs(trial.headers)), "client": None, "server": None},
        {"raw_path": None, "state": None, "extensions": None, "root_path": None, "asgi": {"version": "3.0"}},
    ):
        sent = await trial.drive(trial.stack(_answers), scope=scope)
        holds(_status(sent) not in (0, 500), f"answered, with {_status(sent)}")
    bare = {"type": "http", "method": "GET", "path": "/", "headers": _pairs(trial.headers)}
    stack = trial.stack(_answers)

    async def least(scope: Any, receive: Any, send: Any) -> None:
        await stack({**bare}, receive, send)

    sent = await trial.drive(least)
    holds(_status(sent) not in (0, 500), f"answered, with {_status(sent)}")


@_check
async def nothing_from_outside_makes_it_raise(trial: PolicyTrial) -> None:
    names = (
        "authorization", "x-api-key", "x-request-id", "cookie", "if-none-match", "origin", "traceparent", "range",
        "accept-language", "accept", "content-type", "idempotency-key", "x-forwarded-for", "dpop", "forwarded",
    )  # fmt: skip
    values = (
        b"",
        b"\xff\xfe\x80",
        b"a" * 70_000,
        b'"',
        b"," * 3_000,
        b"Bearer ",
        b"[" * 2_000,
        b"%00%ff",
        b"\t \t",
        b"-1",
    )
    app = trial.stack(_answers)
    for value in values:
        for kind in ("http", "websocket"):
            await _hostile(trial, app, kind, [(name, value) for name in names])
    for path in ("", "//", "/%2e%2e/\x00", "/\udcff\udc80", "/" + "a/" * 5_000, "/\u2028", "*"):
        for query in (b"", b"&&=%", b"\xff=\xfe", b"a=" * 2_000):
            await _hostile(trial, app, "http", [], path=path, query=query)
    trial.over()


async def _hostile(trial: PolicyTrial, app: App, kind: str, headers: Any, **options: Any) -> None:
    incoming = [{"type": "websocket.connect"}, {"type": "websocket.disconnect"}] if kind == "websocket" else None
    with anyio.fail_after(PATIENCE):
        sent = await drive(app, headers=headers, kind=kind, incoming=incoming, **options)
    refused = any(message["type"] == "websocket.close" for message in sent.messages)
    holds(
        refused or _status(sent) not in (0, 500), f"{headers[:1]!r:.200} {options!r:.200} is answered {_status(sent)}"
    )


@_check
async def many_exchanges_at_once_stay_apart(trial: PolicyTrial) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await anyio.lowlevel.checkpoint()
        await _answers(scope, receive, send)

    stack = trial.stack(app)
    statuses: list[int] = []

    async def one() -> None:
        statuses.append(_status(await trial.drive(stack)))

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(one)
    holds(len(statuses) == 20 and not {0, 500} & set(statuses), f"each is answered: {statuses}")
    trial.over()


@_check
async def it_leaves_nothing_behind(trial: PolicyTrial) -> None:
    """Neither threads, nor exchanges that are over."""
    app = trial.stack(_answers)
    await trial.drive(app)
    threads = threading.active_count()
    for _ in range(20):
        await trial.drive(app)
    holds(threading.active_count() <= threads + 1, "a thread was started for each exchange")
    ended = [ref(ex) for ex, *_ in trial.seen]
    trial.seen.clear()
    gc.collect()
    alive = sum(exchange() is not None for exchange in ended)
    holds(alive < 10, f"{alive} of {len(ended)} exchanges that are over are still held")


@_check
async def every_event_loop_will_do(trial: PolicyTrial) -> None:
    """One policy in several loops, one after the other, as tests and workers make them."""
    app = trial.stack(_answers)

    async def exchange() -> int:
        await trial.drive(app, "POST", body=b"x")
        return _status(await trial.drive(app))

    for backend in (*trial.backends, *trial.backends):

        def run(backend: str = backend) -> int:
            return anyio.run(exchange, backend=backend)

        status = await anyio.to_thread.run_sync(run)
        holds(status not in (0, 500), f"answered under {backend}, with {status}")


def _pairs(headers: Iterable[tuple[str | bytes, str | bytes]]) -> list[tuple[bytes, bytes]]:
    def raw(text: str | bytes) -> bytes:
        return text.encode("latin-1") if isinstance(text, str) else text

    return [(raw(name).lower(), raw(value)) for name, value in headers]
