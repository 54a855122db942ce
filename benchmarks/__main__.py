"""`python -m benchmarks`: runs the benchmarks that are named, or all of them, and says which targets were reached."""

import argparse
import json
import operator
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any

NAMES = ("floors", "stack", "policies", "stream", "limits", "auth", "log", "routes", "server", "stores")

TARGETS: dict[str, dict[str, tuple[str, float]]] = {
    "stack": {"ratio_to_base_http": ("<=", 0.25), "ratio_peers": (">=", 15)},
    "stream": {"fused_us": ("<=", 0.4)},
    "limits": {"admit_us": ("<=", 3), "ratio_1000000_to_1000": ("<=", 1.5), "bytes_per_caller": ("<=", 400)},
    "auth": {
        "cached_us": ("<=", 2),
        "forged_80k_us": ("<=", 10),
        "verify_to_pyjwt_most": ("<=", 1.1),
        "refresh_stall_ms": ("<=", 1),
    },
    "log": {"event_us": ("<=", 8)},
    "routes": {"ratio": ("<=", 1.5), "resolve_us": ("<=", 2)},
    "stores": {
        "trips_admit": ("<=", 1),
        "trips_settle": ("<=", 1),
        "admit_us_over_ping": ("<=", 80),
        "ratio_pool": (">=", 3),
        "ratio_limits": (">=", 8),
    },
    "server": {"fastapi_ratio": (">=", 0.75), "asgi_ratio": (">=", 0.50)},
}
"""What is to be reached, by benchmark and key."""

_COMPARE = {"<=": operator.le, ">=": operator.ge}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What the library costs.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"one or more of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, keyed by benchmark")
    parser.add_argument("--smoke", action="store_true", help="run each of them just once; the figures mean nothing")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    results: dict[str, Any] = {}
    for name in given.names or NAMES:
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        started = time.monotonic()
        results[name] = import_module(f"benchmarks.{name}").run(smoke=given.smoke)
        print(f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(results, indent=2) if given.json else table(results))
    return 0


def table(results: dict[str, Any]) -> str:
    """Figure, target, reached; what a figure means is said by the `run` of its benchmark.

    Beside `floors`, a target in microseconds that was missed is compared with the figure at the targets' speed, too.
    """
    machine = results.get("floors", {}).get("machine")
    rows = [("figure", "value", "target", "reached"), ("", "", "", "")]
    notes = []
    for name, result in results.items():
        for key, value in _flat(result):
            if isinstance(value, str):
                notes.append(f"{name}: {value}")
                continue
            sign, wanted = TARGETS.get(name, {}).get(key, ("", None))
            target = "" if wanted is None else f"{sign} {wanted:g}"
            if wanted is None:
                reached = ""
            elif value is None:
                reached = "not measured"
            else:
                reached = "yes" if _COMPARE[sign](value, wanted) else "no"
                if reached == "no" and machine is not None and "us" in key.split("_"):
                    there = value / machine
                    reached += (
                        f"; at the targets' speed {_shown(there)}: {'yes' if _COMPARE[sign](there, wanted) else 'no'}"
                    )
            rows.append((f"{name}.{key}", _shown(value), target, reached))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    rows[1] = tuple("-" * width for width in widths)  # type: ignore[assignment]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _flat(result: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in result.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            for item in value:
                yield f"{prefix}{key}", str(item)
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if value < 10 else f"{value:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
