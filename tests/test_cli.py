"""The command `sigil-policy key`, as a process of its own: what it prints, what it says when it cannot, how it ends."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
from pydantic import SecretStr

from sigil_policy.cli import main
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import new_key
from sigil_policy.identity.api_keys.sqlite import SqliteApiKeyStore
from sigil_policy.identity.api_keys.urls import open_key_store
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.testing import drive
from tests.stores.redis.servers import Server

ROOT = Path(__file__).parent.parent
PEPPER = "canary-pepper-7d0e-which-is-long-enough"
KEY = re.compile(r"sk_[a-z]+_([0-9A-Za-z]{12})_[0-9A-Za-z]{32}_[0-9A-Za-z]{6}")


class Shell:
    """Runs the command in a folder: `shell("new", "--owner", "job")`. It does so in this process, which is quicker."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.said = ""
        self.environment: dict[str, str] = {}
        self.run = self.here
        monkeypatch.chdir(folder)
        for name in ("SIGIL_PEPPER", "SIGIL_KEY_STORE"):
            monkeypatch.delenv(name, raising=False)

    def here(self, arguments: list[str]) -> tuple[int, str, str]:
        with pytest.MonkeyPatch.context() as patch, structlog.testing.capture_logs():
            for name, value in self.environment.items():
                patch.setenv(name, value)
            try:
                code: Any = main(["key", *arguments])
            except SystemExit as usage:
                code = usage.code
        return (code, *self.capsys.readouterr())

    def __call__(self, *arguments: str, code: int = 0) -> str:
        ended, answer, self.said = self.run(list(arguments))
        assert ended == code, answer + self.said
        assert "Traceback" not in self.said
        assert PEPPER not in answer + self.said
        assert bool(self.said) == (code != 0)
        if code:
            assert answer == ""
        return answer

    def json(self, *arguments: str) -> Any:
        answer = self(*arguments, "--json")
        assert answer.count("\n") == 1
        return json.loads(answer)

    def as_people_do(self, arguments: list[str]) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "sigil_policy.cli", "key", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    made = Shell(tmp_path, monkeypatch, capsys)
    made.environment = {"SIGIL_PEPPER": PEPPER, "SIGIL_KEY_STORE": "sqlite:///keys.db"}
    return made


async def whoami(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["user"].display_name.encode()})


def ask(store: str, *keys: str) -> list[str]:
    """What a server answers that has just been started."""

    async def answers() -> list[str]:
        stack = PolicyStack(
            whoami,
            policies=[ApiKeyAuth(store=open_key_store(store, deadline=60), pepper=SecretStr(PEPPER), deadline=60)],
        )
        sent = [await drive(stack, headers={"x-api-key": key}) for key in keys]
        await stack.aclose()
        return [one.body.decode() if one.status == 200 else str(one.status) for one in sent]

    return anyio.run(answers)


@pytest.mark.parametrize("kind", ["sqlite", "file", "redis"])
def test_a_key_is_made_rotated_listed_and_revoked(tmp_path: Path, shell: Shell, kind: str) -> None:
    with Server() as server:
        store = {"sqlite": "sqlite:///keys.db", "file": f"file:{tmp_path}/keys.jsonl", "redis": server.url}[kind]
        shell.environment["SIGIL_KEY_STORE"] = store
        if kind == "sqlite":
            shell.run = shell.as_people_do
        printed = shell("new", "--owner", "job", "--tier", "pro", "--scope", "b:write a:read", "--expires", "90d")
        old = printed.splitlines()[-1]
        found = KEY.fullmatch(old)
        assert found and printed.count(old) == 1
        new = shell.json("rotate", found[1], "--overlap", "2h")
        assert KEY.fullmatch(new["key"]) and new["replaces"] == found[1]
        assert (new["owner"], new["tier"], new["scopes"]) == ("job", "pro", ["a:read", "b:write"])
        assert ask(store, old, new["key"]) == ["job", "job"]
        shell("revoke", found[1])
        assert ask(store, old, new["key"]) == ["401", "job"]
        table = shell("list")
        assert [line.split()[-1] for line in table.splitlines()] == ["STATE", "ended", "active"]
        for key in (old, new["key"]):
            assert key not in table and key.split("_")[3] not in table
        if kind != "file":
            assert shell.json("list", "--owner", "job")[1]["last_used"] is not None


def test_a_toml_file_is_printed_for_people_to_add(tmp_path: Path, shell: Shell) -> None:
    shell.environment["SIGIL_KEY_STORE"] = "file:keys.toml"
    made = shell.json("new", "--owner", "job", "--prefix", "sk_test")
    assert made["key"].startswith("sk_test_")
    (tmp_path / "keys.toml").write_text(made["toml"])
    assert [key["id"] for key in shell.json("list")] == [made["id"]]
    assert ask(f"file:{tmp_path}/keys.toml", made["key"]) == ["job"]
    shell("revoke", made["id"], code=1)
    assert "write expires in [keys." in shell.said


WRONG = {
    "no store": (["list", "--store", ""], 1, "SIGIL_KEY_STORE"),
    "no such scheme": (["list", "--store", "http://canary@x"], 1, "sqlite:///keys.db"),
    "no file yet": (["list"], 1, "key new"),
    "no such time": (["new", "--owner", "a", "--expires", "soon"], 2, "90d, 12h"),
    "no owner": (["new"], 2, "--owner"),
    "a pepper as an argument": (["new", "--owner", "a", "--pepper", "x"], 2, "pepper"),
    "no pepper": (["new", "--owner", "a", "--pepper-env", "NONE"], 1, "set NONE"),
    "no pepper file": (["new", "--owner", "a", "--pepper-file", "none"], 1, "pepper file"),
    "a pepper that is short": (["new", "--owner", "a", "--pepper-env", "SHORT"], 1, "at least 32"),
    "a scope that is none": (["new", "--owner", "a", "--scope", 'a"b'], 1, "6749"),
    "a store that is away": (["list", "--store", "redis://:canary@127.0.0.1:1"], 3, "away"),
}


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_says_what_to_do(
    tmp_path: Path, shell: Shell, arguments: list[str], code: int, message: str
) -> None:
    shell.environment["SHORT"] = "short"
    shell(*arguments, code=code)
    assert message in shell.said and "canary" not in shell.said
    assert not (tmp_path / "keys.db").exists()


def test_an_id_that_is_unknown_or_none(tmp_path: Path, shell: Shell) -> None:
    shell.environment = {"SIGIL_KEY_STORE": "file:keys.jsonl"}
    (tmp_path / "keys.jsonl").touch()
    (tmp_path / "pepper").write_text(f"{PEPPER}\n")
    assert shell("list") == "There are no keys.\n"
    shell("rotate", "a" * 12, "--pepper-file", "pepper", code=1)
    assert "there is no key aaaa" in shell.said
    plain, record = new_key(pepper=SecretStr(PEPPER), subject="a")
    shell("revoke", plain.get_secret_value(), code=1)
    assert f"Its id is {record.id}" in shell.said and plain.get_secret_value() not in shell.said


def test_a_process_keeps_its_messages_out_of_the_answer(tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "keys.jsonl").write_text("canary\n")
    shell.environment["SIGIL_KEY_STORE"] = "file:keys.jsonl"
    code, answer, said = shell.as_people_do(["list", "--json"])
    assert (code, json.loads(answer)) == (0, [])
    assert "line 1" in said and "canary" not in said


def test_a_rotation_that_was_stored_prints_its_key_whatever_comes_then(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = shell.json("new", "--owner", "job")["id"]
    get, asked = SqliteApiKeyStore.get, []

    async def away(self: SqliteApiKeyStore, key_id: str) -> Any:
        asked.append(key_id)
        if len(asked) > 1:
            raise StoreUnavailableError("gone in between")
        return await get(self, key_id)

    monkeypatch.setattr(SqliteApiKeyStore, "get", away)
    assert KEY.fullmatch(shell("rotate", old).splitlines()[-1])
    assert len(asked) == 2
