"""Tiered limits on requests and language-model tokens; see `sigil_policy.policies.rate_limit.policy`."""

from sigil_policy.identity.callers import by_address, by_claim, by_principal, by_subject
from sigil_policy.policies.rate_limit.policy import RateLimit
from sigil_policy.policies.rate_limit.tiers import GUIDELINE_TIERS, Level, Tier
from sigil_policy.policies.rate_limit.tokens import TokenRule

__all__ = [
    "GUIDELINE_TIERS",
    "Level",
    "RateLimit",
    "Tier",
    "TokenRule",
    "by_address",
    "by_claim",
    "by_principal",
    "by_subject",
]
