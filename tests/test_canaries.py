"""The suite's watch over secrets notices them wherever they are shown, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PRELUDE = """
import logging
import pytest, structlog
from pydantic import SecretStr
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import ProblemType, Reply
from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems
from sigil_policy.testing import drive

SHOWN = SecretStr("planted-7d1f0c55-for-the-test-of-the-canaries")
TEXT = SHOWN.get_secret_value()
Refused = ProblemType(code="CAN_001", title="Refused", status=403)

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})

def now(coroutine):
    import asyncio
    return asyncio.run(coroutine)
"""

LEAKS = {
    "a log record": "logging.getLogger('sigil_policy').warning('the secret is %s', TEXT)",
    "a log record's extra": "logging.getLogger('any').error('x', extra={'given': TEXT})",
    "an exception that is logged": """
    try:
        raise RuntimeError(TEXT)
    except RuntimeError:
        logging.getLogger('sigil_policy').exception('failed')
    """,
    "a structlog event": "structlog.get_logger('sigil_policy').warning('failed', reason=TEXT)",
    "a captured structlog event": """
    with structlog.testing.capture_logs():
        structlog.get_logger('sigil_policy').warning('failed', reason=TEXT)
    """,
    "standard output": "print(TEXT)",
    "standard output that the test has read": "print(TEXT); capsys.readouterr()",
    "an expected exception": """
    with pytest.raises(ValueError):
        raise ValueError(TEXT)
    """,
    "the cause of an expected exception": """
    with pytest.raises(ValueError):
        raise ValueError('x') from KeyError(TEXT)
    """,
    "an exception in a group": """
    with pytest.raises(ExceptionGroup):
        raise ExceptionGroup('x', [KeyError(TEXT)])
    """,
    "a problem": """
    class Leaks(Policy):
        def on_request(self, ex):
            return Refused(f'not {TEXT}')
    now(drive(PolicyStack(app, policies=[Leaks()])))
    """,
    "a problem that shows the token": """
    class Leaks(Policy):
        def on_request(self, ex):
            return Refused('no', token=ex.headers[b'authorization'].decode())
    token = 'Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4ifQ.c2lnbmVkLWJ5LW5vYm9keQ'
    now(drive(PolicyStack(app, policies=[Leaks()]), headers={'authorization': token}))
    """,
    "a problem's header": """
    class Leaks(Policy):
        def on_request(self, ex):
            return Refused('no', headers=[(b'www-authenticate', TEXT.encode())])
    now(drive(PolicyStack(app, policies=[Leaks()])))
    """,
    "a response of a policy's own": """
    class Leaks(Policy):
        def on_request(self, ex):
            return Reply(body=ex.headers[b'x-api-key'])
    now(drive(PolicyStack(app, policies=[Leaks()]), headers={'x-api-key': 'sk_live_0123456789abcdef_xyz'}))
    """,
    "a field that a policy adds": """
    class Leaks(Policy):
        def on_response(self, ex, head):
            head.headers.append((b'x-echo', ex.headers[b'x-api-key']))
    now(drive(PolicyStack(app, policies=[Leaks()]), headers={'x-api-key': 'sk_live_0123456789abcdef_xyz'}))
    """,
    "the repr of a stack": """
    class Leaks(Policy):
        secret: str
    PolicyStack(app, policies=[Leaks(secret=TEXT)])
    """,
}

KEPT = {
    "a secret that stays where it is": "assert SHOWN.get_secret_value(); repr(SHOWN); str(SHOWN); print(SHOWN)",
    "words": "SecretStr('secret'); SecretStr('k' * 40); print('secret', 'k' * 40)",
    "a problem that says nothing": """
    class Refuses(Policy):
        def on_request(self, ex):
            return Refused('no')
    now(drive(PolicyStack(app, policies=[Refuses()]), headers={'authorization': f'Bearer {TEXT}'}))
    """,
    "an exception that says nothing": """
    with pytest.raises(ValueError):
        try:
            raise KeyError(TEXT)
        except KeyError:
            raise ValueError('x') from None
    """,
}


def _name(number: int) -> str:
    return f"test_{number:02}"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> str:
    """One run of pytest with the watch, over a file of tests that leak and tests that do not."""
    file = tmp_path_factory.mktemp("canaries") / "test_planted.py"
    bodies = [body if body.startswith("\n") else f"\n    {body}\n" for body in (*LEAKS.values(), *KEPT.values())]
    file.write_text(PRELUDE + "".join(f"\ndef {_name(n)}(capsys):{body}\n" for n, body in enumerate(bodies)))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.canaries", "-p", "no:cacheprovider", "-rA", "-c", os.devnull,
         "--rootdir", file.parent, file.name],
        cwd=file.parent, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return ran.stdout


@pytest.mark.parametrize(("number", "leak"), list(enumerate(LEAKS)))
def test_a_test_during_which_a_secret_is_shown_fails(number, leak, outcome):
    assert f"ERROR test_planted.py::{_name(number)}" in outcome, f"{leak} was not noticed\n{outcome}"


@pytest.mark.parametrize(("number", "kept"), list(enumerate(KEPT, len(LEAKS))))
def test_a_secret_that_nobody_sees_is_no_reason_to_fail(number, kept, outcome):
    assert f"PASSED test_planted.py::{_name(number)}" in outcome, f"{kept}\n{outcome}"
    assert f"ERROR test_planted.py::{_name(number)}" not in outcome, f"{kept}\n{outcome}"


def test_this_run_is_watched(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin("canaries")
