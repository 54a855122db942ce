"""What each policy costs alone: one policy around a bare application, its added µs per request.

`Scopes` takes somebody who calls, and is measured over a stack that only says so.
"""

from typing import Any, ClassVar

from benchmarks.stack import bare, policies, requests
from benchmarks.timing import App, Loop, measure, rounds_for, scopes
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack


class Somebody(Policy):
    """Whoever calls is Ada."""

    gives: ClassVar[tuple[type, ...]] = (Principal,)

    def on_request(self, ex: Exchange) -> None:
        ex.authenticate(_ADA)


class Idle(Policy):
    """Has one hook, and does nothing in it."""

    def on_request(self, ex: Exchange) -> None:
        return None


_ADA = Principal(subject="ada", scopes=frozenset(("agents:read",)), tier="bench")


def run(smoke: bool = False) -> dict[str, Any]:
    """Keys: `pass_us`, what the pass costs around a policy that does nothing (part of all the others), and one for each
    policy, in `alone_us`."""
    loop = Loop()
    given = policies()
    apps: dict[str, App] = {
        "bare": bare,
        "idle": PolicyStack(bare, [Idle()]),
        "somebody": PolicyStack(bare, [Somebody()]),
    }
    for policy in given:
        outside = [Somebody()] if Principal in policy.needs else []
        apps[type(policy).__name__] = PolicyStack(bare, [*outside, policy])
    make = scopes(requests())
    samples = measure({name: loop.requests(app, make) for name, app in apps.items()}, rounds=rounds_for(smoke, 80))
    loop.close()
    pass_us = samples.added("idle", over="bare")
    alone = {}
    for policy in given:
        name = type(policy).__name__
        if Principal in policy.needs:
            alone[name] = samples.added(name, over="somebody") + pass_us
        else:
            alone[name] = samples.added(name, over="bare")
    return {"pass_us": pass_us, "alone_us": alone}
