"""The order of a stack, checked from what its policies say about themselves."""

from collections.abc import Sequence

from sigil_policy.core.policy import Policy


class PolicyOrderError(ValueError):
    """The policies of a stack stand in an order that cannot work; the message says the swap to make."""


def check_order(policies: Sequence[Policy]) -> frozenset[type]:
    """Check `policies` (outermost first); returns the facts that a stack outside this one has to give.

    Raises `PolicyOrderError` when a policy uses a fact that only a policy inside it gives, or stands inside one that it
    has to see from outside.
    """
    missing: set[type] = set()
    for place, policy in enumerate(policies):
        outer, inner = policies[:place], policies[place + 1 :]
        for fact in (*policy.needs, *policy.reads):
            known = {type(other) for other in outer if fact in other.gives}
            late = next((other for other in inner if fact in other.gives and type(other) not in known), None)
            if late is not None and fact not in policy.gives:
                raise PolicyOrderError(
                    f"{_name(policy)} uses the {fact.__name__} that {_name(late)} gives, but stands outside of it; "
                    f"list {_name(late)} before {_name(policy)} (with add_middleware: add it after)"
                )
            if fact in policy.needs and not known:
                missing.add(fact)
        for fact in policy.precedes:
            early = next((other for other in outer if fact in other.gives and type(other) is not type(policy)), None)
            if early is not None:
                raise PolicyOrderError(
                    f"{_name(policy)} has to see what {_name(early)} refuses, but stands inside of it; "
                    f"list {_name(policy)} before {_name(early)} (with add_middleware: add it after)"
                )
    return frozenset(missing)


def missing_text(policies: Sequence[Policy], missing: frozenset[type]) -> str:
    """What to do about facts that nobody outside gives."""
    wanted = [
        f"{_name(policy)} needs a {fact.__name__}" for policy in policies for fact in policy.needs if fact in missing
    ]
    names = " and ".join(sorted(fact.__name__ for fact in missing))
    return f"{'; '.join(wanted)}, and no policy outside gives it; mount a policy that gives {names} before"


def _name(policy: Policy) -> str:
    return type(policy).__name__
