"""For tests of services, policies and stores.

    from sigil_policy.testing import FrozenClock, assert_problem, check_policy, connect, drive, validated

| file | what is in it |
|---|---|
| `asgi` | `drive` one request, `connect` for a conversation, in process, message by message |
| `rules` | `validated`: a middleware that fails on what ASGI forbids |
| `clock` | `FrozenClock`, and `frozen` for whatever goes by the machine's clock |
| `credentials` | `Mint`: tokens and keys for the application under test |
| `problems` | `assert_problem` |
| `faults` | `Faulty`: a store that is away, slow, hangs, or answers nonsense, on command |
| `marks` | `check_app`: whether everything that endpoints say of themselves is heard |
| `policies` | `check_policy`: what every policy holds |
| `stores`, `conformance` | `check_store`, `check_limit_store`: what every store holds |
| `plugin` | fixtures for pytest, found by itself |

Names load on first use: the plugin costs a run of pytest nothing that it does not use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sigil_policy.testing.asgi import Conversation as Conversation
    from sigil_policy.testing.asgi import Sent as Sent
    from sigil_policy.testing.asgi import connect as connect
    from sigil_policy.testing.asgi import drive as drive
    from sigil_policy.testing.clock import FrozenClock as FrozenClock
    from sigil_policy.testing.clock import frozen as frozen
    from sigil_policy.testing.conformance import check_store as check_store
    from sigil_policy.testing.credentials import Mint as Mint
    from sigil_policy.testing.faults import Faulty as Faulty
    from sigil_policy.testing.marks import check_app as check_app
    from sigil_policy.testing.policies import check_policy as check_policy
    from sigil_policy.testing.policies import policy_checks as policy_checks
    from sigil_policy.testing.problems import assert_problem as assert_problem
    from sigil_policy.testing.rules import ProtocolViolation as ProtocolViolation
    from sigil_policy.testing.rules import broken_rules as broken_rules
    from sigil_policy.testing.rules import validated as validated
    from sigil_policy.testing.stores import check_limit_store as check_limit_store
    from sigil_policy.testing.stores import limit_store_checks as limit_store_checks

_HOMES = {
    "asgi": ("Conversation", "Sent", "connect", "drive"),
    "clock": ("FrozenClock", "frozen"),
    "conformance": ("check_store",),
    "credentials": ("Mint",),
    "faults": ("Faulty",),
    "marks": ("check_app",),
    "policies": ("check_policy", "policy_checks"),
    "problems": ("assert_problem",),
    "rules": ("ProtocolViolation", "broken_rules", "validated"),
    "stores": ("check_limit_store", "limit_store_checks"),
}
_NAMES = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    home = _NAMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
