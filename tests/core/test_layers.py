"""The house keeps its shape: imports run downwards only, wire does no IO, policies know no event loop."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sigil_policy

PACKAGE = Path(sigil_policy.__file__).parent
PYPROJECT = PACKAGE.parent / "pyproject.toml"


def imports_of(file: Path) -> Iterator[str]:
    """The modules that `file` imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def files_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def test_imports_run_downwards_only() -> None:
    """In a process of its own: the linter configures logging for the whole one that it runs in."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=PYPROJECT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_has_its_floor() -> None:
    """A room that no contract names is a room in which everything is allowed."""
    contracts = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    named = {
        name.strip(" ()")
        for contract in contracts
        if contract["type"] == "layers"
        for layer in contract["layers"]
        for name in layer.replace("|", ":").split(":")
    }
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert rooms <= named


@pytest.mark.parametrize("room", ["core", "policies", "stores", "telemetry", "identity"])
def test_nothing_that_runs_in_an_exchange_knows_which_event_loop_it_runs_on(room: str) -> None:
    """asyncio and trio alike: what must wait, waits with anyio. A store that talks to a server says what it needs."""
    remote = (PACKAGE / "stores" / "redis", PACKAGE / "stores" / "adapter.py", PACKAGE / "identity" / "flights.py")
    files = [file for file in files_of(room) if not any(file.is_relative_to(place) for place in remote)]
    found = {file.name: name for file in files for name in imports_of(file) if name in ("asyncio", "trio")}
    assert not found


IMPURE = {
    "anyio", "asyncio", "http.client", "io", "logging", "pathlib", "random", "secrets", "socket", "ssl", "sqlite3",
    "starlette", "subprocess", "tempfile", "threading", "time", "trio", "urllib.request",
}  # fmt: skip


def test_wire_is_pure_and_names_its_sources() -> None:
    """No IO, no ASGI, no clock; each file names the RFC (or the standard) that it speaks."""
    for file in files_of("wire"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert not {name for name in imports_of(file) if name in IMPURE or name.partition(".")[0] in IMPURE}, file.name
        # The one thing that is taken from the system: random bytes for new ids.
        system = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
        }
        assert system <= {"urandom", "register_at_fork"}, file.name
        if file.name != "__init__.py":
            docstring = ast.get_docstring(tree) or ""
            assert any(word in docstring for word in ("RFC", "W3C", "ISO")), f"{file.name} names no standard"


def test_only_the_engine_wraps_receive_and_send() -> None:
    """A policy never touches ASGI: only the stack in `core` and the test driver define `send` or `receive`."""
    for file in [*files_of("policies"), *files_of("identity"), *files_of("stores"), *files_of("telemetry")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = {argument.arg for argument in node.args.args}
                assert not {"receive", "send"} & names, f"{file.name}: {node.name}"
