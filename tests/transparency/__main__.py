"""Runs the test suites that the sdists of Starlette and FastAPI carry, with and without a stack around each app.

    python -m tests.transparency starlette                                          # some three minutes
    python -m tests.transparency examples starlette fastapi --inject stack headers validated    # half an hour
    python -m tests.transparency quart litestar --checkouts ~/src    # ~/src/quart and ~/src/litestar: git checkouts
    python -m tests.transparency starlette --here --tests tests/test_testclient.py    # half a minute

Each suite runs in its own environment below `build/transparency` (ignored by git), which is made once: the sdist of the
version that is installed here, from PyPI, and what its tests import. The sdists of Quart and Litestar carry no tests,
so that theirs come from a checkout, whose version is installed. With `--here` the tests run in the environment of this
interpreter, as it is: those that lack something fail without and with. Results with and without must be equal but for
`exceptions.py`. Last comes an injection that has to change results, or the comparison compares nothing: what changes
some of the suite's results and looks harmless, such as a `BaseHTTPMiddleware` that does nothing on Starlette's.
The files of what is not listed there are run once more, without and with: what does not differ again (a busy machine
was too slow for a test) is told, and is no difference. Exits with 1 for one that is not explained.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
import venv
from importlib.metadata import version
from pathlib import Path

from tests.transparency.exceptions import unexplained

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "build" / "transparency"
LONGEST = 1_800  # seconds that one run may take
MOST_AGAIN = 100  # tests that are run once more: beyond, something is wrong with all of them
CONTROL = {
    "starlette": "base-http", "fastapi": "swallowing", "examples": "teapot", "quart": "base-http",
    "litestar": "swallowing",
}  # fmt: skip

# What the tests of each import, beside the package itself and what its tests are run with.
NEEDS = {
    "starlette": [
        "starlette[full]", "httpx2[zstd]", "blockbuster", "opentelemetry-sdk", "pytest", "pytest-xdist", "trio",
        "importlib-metadata",
    ],
    "fastapi": [
        "fastapi[standard]", "a2wsgi<=2.0.0", "anyio[trio]", "dirty-equals", "flask", "httpx", "httpx2",
        "coverage[toml]", "inline-snapshot", "logfire", "opentelemetry-exporter-otlp-proto-http",
        "opentelemetry-instrumentation-fastapi", "opentelemetry-sdk", "orjson", "pwdlib[argon2]", "pyjwt",
        "pydantic-extra-types", "pydantic-settings", "pytest<9.2", "pytest-codspeed", "pytest-timeout", "pytest-xdist",
        "python-slugify", "pyyaml", "sentry-sdk", "sqlmodel", "strawberry-graphql", "typer", "ujson",
    ],
    "quart": [
        "hypothesis", "pytest", "pytest-asyncio", "pytest-cov", "pytest-timeout", "pytest-xdist", "python-dotenv",
    ],
    "litestar": [
        "aiosqlite", "asyncpg", "beanie", "beautifulsoup4", "covdefaults", "daphne", "fsspec", "greenlet", "httpx-sse",
        "hypercorn", "hypothesis", "opentelemetry-sdk", "psutil", "psycopg[binary,pool]", "psycopg2-binary",
        "pytest==8.3.4", "pytest-asyncio>0.24.0", "pytest-cov", "pytest-lazy-fixtures", "pytest-mock",
        "pytest-rerunfailures", "pytest-timeout", "pytest-xdist", "python-dotenv", "sqlalchemy<2.1", "time-machine<3",
        "trio",
    ],
}  # fmt: skip
EXAMPLES = (ROOT / "tests" / "examples").glob("test_*.py")
TESTS = {
    "starlette": ["tests"],
    # The others do not use `TestClient`: nothing would be injected.
    "examples": [str(test.relative_to(ROOT)) for test in sorted(EXAMPLES) if "TestClient" in test.read_text()],
    "fastapi": ["tests"],
    "quart": ["tests"],
    # What has an application; the rest takes Docker, or is about types, stores and commands.
    "litestar": [
        "tests/unit/test_app.py", "tests/unit/test_asgi", "tests/unit/test_background_tasks.py",
        "tests/unit/test_connection", "tests/unit/test_events.py", "tests/unit/test_exceptions.py",
        "tests/unit/test_guards.py", "tests/unit/test_handlers", "tests/unit/test_middleware",
        "tests/unit/test_security", "tests/unit/test_static_files", "tests/unit/test_testing/test_test_client.py",
    ],
}  # fmt: skip
OPTIONS = {
    "fastapi": ["-o", "addopts=--ignore=docs_src", "--timeout=60"],
    "quart": ["--timeout=60"],
    "litestar": ["--timeout=60", "-W", "ignore::DeprecationWarning", "-k", "not redis_store and not valkey_store"],
}


def environment(suite: str, checkouts: Path | None = None, *, here: bool = False) -> tuple[Path, Path]:
    """The interpreter and the folder of the sdist, made unless they are there; of the examples, those that are here."""
    PLACE.mkdir(parents=True, exist_ok=True)
    if suite == "examples":
        return Path(sys.executable), ROOT
    if suite in ("quart", "litestar"):
        if checkouts is None:
            sys.exit(f"the sdist of {suite} carries no tests: say with --checkouts where its repository is")
        folder, python = checkouts.resolve() / suite, PLACE / f"venv-{suite}" / "bin" / "python"
        extras = "[full]" if suite == "litestar" else ""
        prepare(python, suite, f"{suite}{extras} @ {folder.as_uri()}")
        return python, folder
    release = version(suite)
    folder, python = PLACE / f"{suite}-{release}", PLACE / f"venv-{suite}-{release}" / "bin" / "python"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", suite, "-d", str(PLACE)]
        subprocess.run([*pip, f"{suite}=={release}"], check=True)
        with tarfile.open(PLACE / f"{suite}-{release}.tar.gz") as sdist:
            sdist.extractall(PLACE, filter="data")
    if not (folder / "tests").is_dir():
        sys.exit(f"the sdist of {suite} {release} carries no tests")
    if here:
        return Path(sys.executable), folder
    prepare(python, suite, f"{suite}=={release}", f"starlette=={version('starlette')}")
    return python, folder


def prepare(python: Path, suite: str, *pinned: str) -> None:
    """Make the environment of `python` unless it is there."""
    ready = python.parent.parent / "ready"
    if not ready.exists():
        venv.create(python.parent.parent, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-e", str(ROOT), *NEEDS[suite], *pinned], check=True)
        ready.touch()


def run(suite: str, python: Path, folder: Path, options: list[str], injection: str) -> dict[str, str]:
    """The result of each test."""
    results = PLACE / f"{suite}-{injection}.json"
    results.unlink(missing_ok=True)
    given = {
        **os.environ, "INJECT": injection, "RESULTS": str(results),
        "INTO": suite if suite in ("quart", "litestar") else "starlette",
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT}" if folder == ROOT else str(Path(__file__).parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [str(python), "-m", "pytest", "-q", "-p", "injection", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=LONGEST)
    whole = done.returncode in (
        0,
        1,
    )  # else pytest broke off, and not all have a result: a difference, but for the first
    if not results.exists() or (injection == "nothing" and not whole):
        sys.exit(f"{' '.join(command)} did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found: dict[str, str] = json.loads(results.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suites", nargs="+", choices=[*CONTROL])
    parser.add_argument("--inject", nargs="+", default=["stack"], metavar="NAME")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="a part of the suite (default: all of it)")
    parser.add_argument("--here", action="store_true", help="make no environment: use this one, with no other plugins")
    parser.add_argument("--checkouts", type=Path, metavar="FOLDER", help="where `quart` and `litestar` are checked out")
    parser.add_argument("--workers", type=int, metavar="NUMBER", help="of pytest-xdist (default: none)")
    chosen = parser.parse_args()
    wrong = False
    for suite in chosen.suites:
        python, folder = environment(suite, chosen.checkouts, here=chosen.here)
        more = OPTIONS.get(suite, [])
        if chosen.here:
            os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
            more = [*more, "-p", "anyio"]
        if chosen.workers:
            more = [*more, "-n", str(chosen.workers), "--dist", "loadfile"]
        options = [*(chosen.tests or TESTS[suite]), *more]
        plain = run(suite, python, folder, options, "nothing")
        failing = sum(result == "failed" for result in plain.values())
        print(f"{suite if folder == ROOT else folder.name}: {len(plain)} tests, {failing} fail here anyway")
        for injection in (*chosen.inject, CONTROL[suite]):
            began = time.monotonic()
            injected = run(suite, python, folder, options, injection)
            differing = {test for test in plain.keys() | injected.keys() if plain.get(test) != injected.get(test)}
            took = f"{len(differing)} differ, in {time.monotonic() - began:.0f} s"
            if injection == CONTROL[suite]:
                wrong = wrong or not differing
                print(f"  {injection}: {took} ({'as it must' if differing else 'and must: nothing is compared'})")
                continue
            strangers, unseen = unexplained(suite, injection, differing)
            again = strangers if len(strangers) <= MOST_AGAIN else set()
            once: set[str] = set()
            if again:
                files = [*sorted({test.partition("::")[0] for test in again}), *more]
                without, within = (run(suite, python, folder, files, name) for name in ("nothing", injection))
                once = {test for test in again if without.get(test) == within.get(test)}
                strangers -= once
            print(f"  {injection}: {took}, {len(strangers)} of them not explained")
            if once:
                print(f"    differed once, and not again: {sorted(once)}")
            for test in sorted(strangers):
                print(f"    {test}: {plain.get(test)} without, {injected.get(test)} with")
            if unseen and not chosen.tests:
                print(f"    listed, and not seen any more: {sorted(unseen)}")
            wrong = wrong or bool(strangers) or bool(unseen and not chosen.tests)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
