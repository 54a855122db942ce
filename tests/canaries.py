"""No secret that a test uses may be seen anywhere: the plugin that watches over the whole suite.

What counts as a secret, wherever in the suite it appears: the value of every `SecretStr`, and the credentials of every
request that a test makes (tokens and their parts, API keys, cookies). Where it must not be: in a log record, a
structlog event that is about to be written, a problem, a response, the repr of a stack, an exception that a test
expects or one that it logs, and what is printed. The test during which one is seen fails when it ends.

Short and simple values ("secret", "k" * 32) are no canaries: they are found everywhere.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pydantic
import pytest
import structlog
import structlog.testing
from _pytest.capture import CaptureFixture
from _pytest.raises import RaisesExc

from sigil_policy.core.problems import ProblemStyle
from sigil_policy.core.stack import PolicyStack
from sigil_policy.testing import asgi

SHOWN = (
    # What makes a key prints it: that is the one time it can be seen.
    ("tests/test_cli.py", "what is printed"),
    # The caller's own id goes back to the caller, whatever he has written into it.
    ("tests/policies/test_access_log.py::test_an_id_that_is_a_credential_is_hidden", "a response"),
    # The test puts a secret into a policy of its own.
    ("tests/policies/test_access_log.py::test_no_credential_reaches_the_log", "the repr of a stack"),
    ("tests/testing/test_policies.py::test_secrets_are_found_in_fields_without_being_named", "the repr of a stack"),
)
"""Tests that show secrets, by the beginning of their ids, and where they do: there nobody looks."""

_LEAST, _LONGEST = 16, 1_000
_LEAST_LETTERS = 7
_MOST = 2_000
_RECENT = 32
_CREDENTIALS = frozenset((b"authorization", b"x-api-key", b"cookie", b"dpop", b"sec-websocket-protocol"))
_DIGIT = re.compile(rb"[0-9]")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class Canaries(logging.Handler):
    """The secrets that were seen being used, and where one was seen that should not be."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, None] = {}
        self.found: list[tuple[str, str]] = []

    def plant(self, secret: str | bytes) -> None:
        text = secret.decode("latin-1") if isinstance(secret, bytes) else secret
        # Of what is huge its beginning will do, and of what has many parts the first.
        for part in {text[:_LONGEST], *(part[:_LONGEST] for part in text.split(".", 3)[1:])}:
            if len(part) >= _LEAST and len(set(part)) >= _LEAST_LETTERS:
                self._known.pop(part, None)
                self._known[part] = None
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]

    def look(self, where: str, text: str, *, recent: bool = False) -> None:
        """Remember it when `text` holds a secret; `recent`: one of those that were used last."""
        known: Iterable[str] = self._known
        if recent:
            known = [secret for secret, _ in zip(reversed(self._known), range(_RECENT), strict=False)]
        for secret in known:
            if secret in text:
                self.found.append((where, f"{secret[:24]}... in {text[max(0, text.index(secret) - 80) :][:240]}"))

    def look_at_error(self, where: str, error: BaseException | None) -> None:
        """What a traceback of `error` would say, its own lines of code aside."""
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            self.look(where, f"{error}\n{error!r}\n{getattr(error, '__notes__', '')}")
            if isinstance(error, BaseExceptionGroup):
                for inner in error.exceptions:
                    self.look_at_error(where, inner)
            error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

    def emit(self, record: logging.LogRecord) -> None:
        extras = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        self.look("a log record", f"{record.getMessage()} {extras}")
        if record.exc_info:
            self.look_at_error("an exception that was logged", record.exc_info[1])

    # --- where the suite is listened to --------------------------------------------------------------------------

    def install(self, patch: pytest.MonkeyPatch) -> None:
        logging.getLogger().addHandler(self)
        self._watch_secrets(patch)
        self._watch_library(patch)
        self._watch_tests(patch)

    def _watch_secrets(self, patch: pytest.MonkeyPatch) -> None:
        made, pairs = pydantic.SecretStr.__init__, asgi._pairs

        def secret(this: pydantic.SecretStr, secret_value: str) -> None:
            made(this, secret_value)
            if isinstance(secret_value, str):
                self.plant(secret_value)

        def headers(given: asgi.Headers) -> list[tuple[bytes, bytes]]:
            found = pairs(given)
            for name, value in found:
                if name in _CREDENTIALS:
                    for word in value.replace(b";", b" ").replace(b",", b" ").split()[:8]:
                        # A test's arbitrary text may be a word of ours: a credential has digits.
                        if _DIGIT.search(word):
                            self.plant(word.partition(b"=")[2] if name == b"cookie" else word)
            return found

        patch.setattr(pydantic.SecretStr, "__init__", secret)
        patch.setattr(asgi, "_pairs", headers)

    def _watch_library(self, patch: pytest.MonkeyPatch) -> None:
        render, message, built = ProblemStyle.render, ProblemStyle.message, PolicyStack.__init__

        def rendered(this: ProblemStyle, *arguments: Any, **options: Any) -> Any:
            reply = render(this, *arguments, **options)
            self.look("a problem", f"{reply.headers} {reply.body.decode('latin-1')}", recent=True)
            return reply

        def messaged(this: ProblemStyle, *arguments: Any) -> str:
            text = message(this, *arguments)
            self.look("a problem on a WebSocket", text, recent=True)
            return text

        def stacked(this: PolicyStack, *arguments: Any, **options: Any) -> None:
            built(this, *arguments, **options)
            self.look("the repr of a stack", repr(this), recent=True)

        patch.setattr(ProblemStyle, "render", rendered)
        patch.setattr(ProblemStyle, "message", messaged)
        patch.setattr(PolicyStack, "__init__", stacked)

        class Messages(list[asgi.Message]):
            def append(messages, message: asgi.Message) -> None:  # noqa: N805  `self` is the watch
                if message.get("headers") or message.get("body"):
                    shown = f"{message.get('headers', '')} {bytes(message.get('body', b'')).decode('latin-1')}"
                    self.look("a response", shown, recent=True)
                super().append(message)

        def sent(this: asgi.Sent) -> None:
            this.messages, this.error = Messages(), None

        patch.setattr(asgi.Sent, "__init__", sent)

    def _watch_tests(self, patch: pytest.MonkeyPatch) -> None:
        left, read, captured = RaisesExc.__exit__, CaptureFixture.readouterr, structlog.testing.LogCapture.__call__

        def raised(this: Any, kind: Any, error: BaseException | None, trace: Any) -> bool:
            self.look_at_error("an exception", error)
            return left(this, kind, error, trace)

        def readouterr(this: Any) -> Any:
            result = read(this)
            self.look("what is printed", f"{result.out}\n{result.err}")
            return result

        def event(this: Any, logger: Any, method: str, event_dict: Any) -> Any:
            self.look("an event", repr(event_dict))
            self.look_at_error("an exception that was logged", _error_of(event_dict))
            return captured(this, logger, method, event_dict)

        patch.setattr(RaisesExc, "__exit__", raised)
        patch.setattr(CaptureFixture, "readouterr", readouterr)
        patch.setattr(structlog.testing.LogCapture, "__call__", event)

    # --- pytest's hooks ------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report: pytest.TestReport = yield  # type: ignore[misc, assignment]
        if report.when != "teardown":
            return report  # type: ignore[return-value]
        for _, text in report.sections:
            self.look("what is printed", text)
        found, self.found = self.found, []
        shown = {where for start, where in SHOWN if item.nodeid.startswith(start)}
        lines = [f"{where}: {text}" for where, text in found if where not in shown]
        if lines and report.passed:
            report.outcome = "failed"
            report.longrepr = "\n".join(["A secret is shown (tests/canaries.py):", *dict.fromkeys(lines)])
        return report  # type: ignore[return-value]


def _error_of(event: Mapping[str, Any]) -> BaseException | None:
    error = event.get("exc_info")
    return error if isinstance(error, BaseException) else None


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.has_plugin("canaries"):
        return
    canaries, patch = Canaries(), pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    config.add_cleanup(lambda: logging.getLogger().removeHandler(canaries))
    config.pluginmanager.register(canaries, "canaries")
    canaries.install(patch)
