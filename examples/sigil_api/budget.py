"""`/budget/status`: what the caller has left, and `/health`: whether anybody is there."""

from fastapi import APIRouter

from examples.sigil_api.models import BudgetStatus, Health, Window
from sigil_policy import WindowState
from sigil_policy.frameworks.fastapi import Budget

router = APIRouter(tags=["budget"])
health = APIRouter(tags=["health"])


@router.head("/budget/status", include_in_schema=False)
@router.get("/budget/status")
async def budget_status(quota: Budget) -> BudgetStatus:
    return BudgetStatus(
        tier=quota.tier,
        utilization=max((_used(window) / window.limit for window in quota.tokens), default=0.0),
        tokens=[_window(window) for window in quota.tokens],
        requests=[_window(window) for window in quota.requests],
    )


@health.head("/health", include_in_schema=False)
@health.get("/health")
async def get_health() -> Health:
    return Health()


def _used(window: WindowState) -> int:
    # More may be used than there was: a run is charged for what it took, also when the estimate was lower.
    return min(window.limit, window.limit - window.remaining)


def _window(state: WindowState) -> Window:
    return Window(
        window=state.name,
        unit=state.unit,
        limit=state.limit,
        used=_used(state),
        remaining=max(0, state.remaining),
        reset=state.reset,
    )
