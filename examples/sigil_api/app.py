"""The service: its routers under the current and the deprecated version, its policies around all of it.

app = create_app(Home(".sigil_api"), database="agents.db")
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TextIO

from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer

from examples.sigil_api import agents, budget, evolution, memory
from examples.sigil_api.home import Home
from examples.sigil_api.policies import CURRENT, DEPRECATED, policies
from examples.sigil_api.storage import Storage
from sigil_policy import PolicyStack
from sigil_policy.core.clock import SYSTEM_CLOCK, Clock

# These only tell the documentation page where a credential goes: the policies decide, long before a dependency runs.
_DOCUMENTED = [
    Security(HTTPBearer(auto_error=False, description="A token from `python -m examples.sigil_api token`")),
    Security(
        APIKeyHeader(name="X-API-Key", auto_error=False, description="A key from `python -m examples.sigil_api key`")
    ),
]
_PROBLEM: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "description": "A problem (RFC 9457)",
        "content": {
            "application/problem+json": {
                "schema": {
                    "type": "object",
                    "required": ["type", "title", "status", "instance", "error_code", "timestamp", "recovery_hints"],
                }
            }
        },
    }
}


def create_app(
    home: Home,
    *,
    database: str = ":memory:",
    log: TextIO = sys.stdout,
    pace: float = 0.01,
    clock: Clock = SYSTEM_CLOCK,
    store: str | None = None,
    replicas: int = 1,
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
        app.include_router(served, dependencies=_DOCUMENTED, responses=_PROBLEM)
    app.include_router(budget.health)
    app.add_middleware(
        PolicyStack, policies=policies(home, log=log, clock=clock, store=store, replicas=replicas), clock=clock
    )
    return app


def create_worker() -> FastAPI:
    """The application of one of several worker processes, which find their options in the environment."""
    return create_app(
        Home(os.environ["SIGIL_HOME"]),
        database=os.environ["SIGIL_DATABASE"],
        store=os.environ["SIGIL_STORE"] or None,
        replicas=int(os.environ["SIGIL_REPLICAS"]),
    )
