"""Looks for a token that breaks the verifier, guided by the code that each attempt reaches (atheris, libFuzzer).

    python -m tests.fuzz.tokens                       # a minute
    python -m tests.fuzz.tokens --seconds 3600 --corpus ~/corpus

Prints what it did; ends with 1 when the property does not hold for some input, which is then printed, ready to be made
a test of. What has to hold, and where the search starts, is in `tests/fuzz/properties.py`. Needs the extra `fuzz`.
"""

import argparse
import base64
import importlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LONGEST = 9_000  # a little over what a token may be


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.tokens", description="Fuzzes the token verifier.")
    parser.add_argument("--seconds", type=int, default=60, help="for how long (default 60)")
    parser.add_argument("--corpus", type=Path, help="a folder to begin with and to add to (default: none is kept)")
    parser.add_argument("--properties", default="tests.fuzz.properties", help="the module with `check` and `seeds`")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="sigil-fuzz-") as folder:
        return _search(given.seconds, given.corpus or Path(folder) / "corpus", given.properties, Path(folder))


def _search(seconds: int, corpus: Path, properties: str, folder: Path) -> int:
    corpus.mkdir(parents=True, exist_ok=True)
    known = importlib.import_module(properties)
    for number, seed in enumerate(known.seeds()):
        (corpus / f"seed-{number:03}").write_bytes(seed)
    words = folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in known.WORDS))
    started = time.monotonic()
    # A process of its own: libFuzzer ends the one that it runs in.
    ran = subprocess.run(
        [
            sys.executable, "-c", "from tests.fuzz.tokens import fuzz; fuzz()", properties, str(corpus),
            f"-max_total_time={seconds}", f"-max_len={_LONGEST}", f"-dict={words}", f"-artifact_prefix={folder}/",
            "-timeout=5", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=1",
        ],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds + 120, check=False,
    )  # fmt: skip
    told = ran.stdout.decode(errors="replace")
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", told)
    covered = re.findall(r"\bcov: (\d+)", told)
    print(
        f"fuzz: {int(executed[1]) if executed else 0:,} executions in {time.monotonic() - started:.0f} s, "
        f"{covered[-1] if covered else 0} branches, {sum(1 for _ in corpus.iterdir())} inputs"
    )
    if ran.returncode == 0 and executed and int(executed[1]) > 0:
        return 0
    print(told[-6_000:])
    for found in sorted(path for path in folder.iterdir() if re.match("crash|timeout|oom|leak", path.name)):
        print(f"{found.name}: base64.b64decode({base64.b64encode(found.read_bytes()).decode()!r})")
    return 1


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def fuzz() -> None:
    """What runs in the process of its own."""
    import atheris

    properties = sys.argv.pop(1)
    with atheris.instrument_imports(include=["sigil_policy"], enable_loader_override=False):
        check = importlib.import_module(properties).check
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
