"""The service: its routers under the current and the deprecated version, its policies around all of it.

app = create_app(Home(".sigil_api"), database="agents.db")
"""

import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TextIO

from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI

from examples.sigil_api import agents, budget, evolution, memory
from examples.sigil_api.home import Home
from examples.sigil_api.policies import CURRENT, DEPRECATED, policies
from examples.sigil_api.storage import Storage
from sigil_policy import PolicyStack
from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.frameworks.openapi import enrich_openapi
from sigil_policy.policies.rate_limit import Tier


def create_app(
    home: Home,
    *,
    database: str = ":memory:",
    log: TextIO = sys.stdout,
    pace: float = 0.01,
    clock: Clock = SYSTEM_CLOCK,
    store: str | None = None,
    replicas: int = 1,
    tiers: Mapping[str, Tier | str] | None = None,
) -> FastAPI:
    """The application.

    Options:
        home: where the development secret and the API keys are.
        database: an SQLite file, or `:memory:` (default).
        log: where one JSON line per exchange goes (default: standard output).
        pace: seconds between two tokens of a streamed answer (default 0.01: slow enough to watch).
        clock: where time comes from (default: the machine's).
        store: URL of the store in which limits are counted (default None: in this process).
        replicas: how many processes serve the API together (default 1).
        tiers: what callers of each tier may do (default None: what the guidelines give them).
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Storage]]:
        storage = await run_sync(partial(Storage, database, clock, shared=replicas > 1))
        try:
            yield {"storage": storage}
        finally:
            storage.close()

    app = FastAPI(title="Sigil API", version="7.0.0", lifespan=lifespan, redoc_url=None)
    app.state.pace = pace
    for version in (CURRENT, DEPRECATED):
        served = APIRouter(prefix=f"/{version}", deprecated=version == DEPRECATED or None)
        for router in (agents.router, memory.router, evolution.router, budget.router):
            served.include_router(router)
        app.include_router(served)
    app.include_router(budget.health)
    stack = policies(home, log=log, clock=clock, store=store, replicas=replicas, tiers=tiers)
    app.add_middleware(PolicyStack, policies=stack, clock=clock)
    return enrich_openapi(app)


def create_worker() -> FastAPI:
    """The application of one of several worker processes, which find their options in the environment."""
    return create_app(
        Home(os.environ["SIGIL_HOME"]),
        database=os.environ["SIGIL_DATABASE"],
        store=os.environ["SIGIL_STORE"] or None,
        replicas=int(os.environ["SIGIL_REPLICAS"]),
    )
