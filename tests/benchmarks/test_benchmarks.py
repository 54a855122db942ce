"""Every benchmark runs, and prints the figures it is known for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES, TARGETS, table

ROOT = Path(__file__).parents[2]

KEYS = {
    "floors": {"machine", "factors"},
    "stack": {"stack_us", "base_http_us", "ratio_to_base_http", "peers_us", "ratio_peers", "per_policy_us", "notes"},
    "policies": {"pass_us", "alone_us"},
    "stream": {"fused_us", "nested_us"},
    "limits": set(TARGETS["limits"]),
    "auth": {*TARGETS["auth"], "api_key_us", "verify_us", "pyjwt_us", "verify_to_pyjwt", "refresh_gap_ms"},
    "log": set(TARGETS["log"]),
    "routes": {"us_10", "us_1000", "us_10000", "ratio", "uniform_ratio", "resolve_us", "resolve_ratio"},
    "stores": {*TARGETS["stores"], "checks_per_s", "pool_checks_per_s", "flood_us", "flood_uncached_us"},
    "server": {"fastapi_ratio", "asgi_ratio", "cpu_us_per_request", "generator"},
}


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_prints_one_json_object_with_its_keys(name: str) -> None:
    done = run(name, "--smoke", "--json")

    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert list(printed) == [name]
    assert printed[name].keys() >= KEYS[name]


def test_every_target_is_a_documented_key() -> None:
    for name, targets in TARGETS.items():
        assert targets.keys() <= KEYS[name]


def test_an_unknown_benchmark_is_an_error_that_names_the_known_ones() -> None:
    done = run("velocity")

    assert done.returncode == 2
    assert "velocity" in done.stderr
    assert "stack" in done.stderr


@pytest.mark.parametrize(
    ("ratio", "answer"), [(0.2, "yes"), (0.25, "yes"), (0.3, "no"), (None, "not measured")], ids=str
)
def test_the_table_says_whether_a_target_was_reached(ratio: float | None, answer: str) -> None:
    line = table({"stack": {"ratio_to_base_http": ratio, "notes": ["peers skipped"]}}).splitlines()[2]

    assert line.split("  ")[-1] == answer


def test_the_table_keeps_what_a_benchmark_has_to_say() -> None:
    assert table({"stack": {"stack_us": 12.5, "notes": ["peers skipped"]}}).endswith("stack: peers skipped")


@pytest.mark.parametrize(
    ("cached", "answer"),
    [(3.0, "no; at the targets' speed 1.500: yes"), (6.0, "no; at the targets' speed 3.000: no")],
    ids=str,
)
def test_beside_the_floors_a_figure_that_misses_its_target_is_shown_at_the_speed_of_the_targets(
    cached: float, answer: str
) -> None:
    results = {"floors": {"machine": 2.0}, "auth": {"cached_us": cached}, "stack": {"ratio_to_base_http": 0.3}}
    lines = table(results).splitlines()

    assert lines[3].endswith(answer)
    # A ratio is the same everywhere.
    assert lines[4].endswith("  no")
