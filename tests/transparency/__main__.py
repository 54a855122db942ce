"""Runs the test suites that the sdists of Starlette and FastAPI carry, with and without a stack around each app.

    python -m tests.transparency starlette                                          # some three minutes
    python -m tests.transparency examples starlette fastapi --inject stack headers validated    # half an hour

Each suite runs in its own environment below `build/transparency` (ignored by git), which is made once: the sdist of the
version that is installed here, from PyPI, and what its tests import. Results with and without must be equal but for
`exceptions.py`. Last comes an injection that has to change results, or the comparison compares nothing: on Starlette a
`BaseHTTPMiddleware` that does nothing, elsewhere (none of whose results it changes) one that raises no errors on.
Exits with 1 for a difference that is not explained.
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
CONTROL = {"starlette": "base-http", "fastapi": "swallowing", "examples": "swallowing"}

# What the tests of each import, beside the package itself and what its tests are run with.
NEEDS = {
    "starlette": [
        "starlette[full]", "httpx2[zstd]", "blockbuster", "opentelemetry-sdk", "pytest", "trio", "importlib-metadata",
    ],
    "fastapi": [
        "fastapi[standard]", "a2wsgi<=2.0.0", "anyio[trio]", "dirty-equals", "flask", "httpx", "httpx2",
        "coverage[toml]", "inline-snapshot", "logfire", "opentelemetry-exporter-otlp-proto-http",
        "opentelemetry-instrumentation-fastapi", "opentelemetry-sdk", "orjson", "pwdlib[argon2]", "pyjwt",
        "pydantic-extra-types", "pydantic-settings", "pytest<9.2", "pytest-codspeed", "pytest-timeout", "pytest-xdist",
        "python-slugify", "pyyaml", "sentry-sdk", "sqlmodel", "strawberry-graphql", "typer", "ujson",
    ],
}  # fmt: skip
OPTIONS = {
    "starlette": ["tests"],
    "examples": ["tests/examples"],
    "fastapi": ["tests", "-o", "addopts=--ignore=docs_src", "--timeout=60"],
}


def environment(suite: str) -> tuple[Path, Path]:
    """The interpreter and the folder of the sdist, made unless they are there; of the examples, those that are here."""
    PLACE.mkdir(parents=True, exist_ok=True)
    if suite == "examples":
        return Path(sys.executable), ROOT
    release = version(suite)
    folder, python = PLACE / f"{suite}-{release}", PLACE / f"venv-{suite}-{release}" / "bin" / "python"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", suite, "-d", str(PLACE)]
        subprocess.run([*pip, f"{suite}=={release}"], check=True)
        with tarfile.open(PLACE / f"{suite}-{release}.tar.gz") as sdist:
            sdist.extractall(PLACE, filter="data")
    if not (folder / "tests").is_dir():
        sys.exit(f"the sdist of {suite} {release} carries no tests")
    ready = python.parent.parent / "ready"
    if not ready.exists():
        venv.create(python.parent.parent, with_pip=True)
        pinned = [f"{suite}=={release}", f"starlette=={version('starlette')}"]
        subprocess.run([python, "-m", "pip", "install", "-q", "-e", str(ROOT), *NEEDS[suite], *pinned], check=True)
        ready.touch()
    return python, folder


def run(python: Path, folder: Path, options: list[str], injection: str) -> dict[str, str]:
    """The result of each test."""
    results = PLACE / f"{folder.name}-{injection}.json"
    results.unlink(missing_ok=True)
    given = {
        **os.environ, "INJECT": injection, "RESULTS": str(results),
        "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT}" if folder == ROOT else str(Path(__file__).parent),
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [str(python), "-m", "pytest", "-q", "-p", "injection", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=LONGEST)
    if not results.exists():
        sys.exit(f"{' '.join(command)} did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found: dict[str, str] = json.loads(results.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suites", nargs="+", choices=[*CONTROL])
    parser.add_argument("--inject", nargs="+", default=["stack"], metavar="NAME")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="a part of the suite (default: all of it)")
    chosen = parser.parse_args()
    wrong = False
    for suite in chosen.suites:
        python, folder = environment(suite)
        options = [*(chosen.tests or OPTIONS[suite][:1]), *OPTIONS[suite][1:]]
        plain = run(python, folder, options, "nothing")
        failing = sum(result == "failed" for result in plain.values())
        print(f"{folder.name}: {len(plain)} tests, {failing} fail here anyway")
        for injection in (*chosen.inject, CONTROL[suite]):
            began = time.monotonic()
            injected = run(python, folder, options, injection)
            differing = {test for test in plain.keys() | injected.keys() if plain.get(test) != injected.get(test)}
            took = f"{len(differing)} differ, in {time.monotonic() - began:.0f} s"
            if injection == CONTROL[suite]:
                wrong = wrong or not differing
                print(f"  {injection}: {took} ({'as it must' if differing else 'and must: nothing is compared'})")
                continue
            strangers, unseen = unexplained(suite, injection, differing)
            print(f"  {injection}: {took}, {len(strangers)} of them not explained")
            for test in sorted(strangers):
                print(f"    {test}: {plain.get(test)} without, {injected.get(test)} with")
            if unseen and not chosen.tests:
                print(f"    listed, and not seen any more: {sorted(unseen)}")
            wrong = wrong or bool(strangers) or bool(unseen and not chosen.tests)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
