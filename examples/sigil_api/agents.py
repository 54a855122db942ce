"""`/agents`: list, create, read, change, delete, run."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Query, Request, Response, status
from fastapi.responses import StreamingResponse

from examples.sigil_api.context import (
    Store,
    last_modified,
    latency_ms,
    location,
    metadata,
    page_links,
    request_id,
    run_metadata,
)
from examples.sigil_api.engine import Answer, answer, relevance
from examples.sigil_api.models import (
    Agent,
    AgentList,
    AgentQuery,
    AgentStatus,
    ChangedAgent,
    CreateAgent,
    Pagination,
    PatchAgent,
    RunAgent,
    RunResult,
    is_agent_name,
)
from examples.sigil_api.problems import AgentInactive, AgentNameTaken, AgentNotFound
from examples.sigil_api.storage import NameTakenError, Storage
from sigil_policy import Problem, report_tokens
from sigil_policy.frameworks.openapi import problem_responses

router = APIRouter(prefix="/agents", tags=["agents"])

_QUESTIONS = frozenset(AgentQuery.model_fields)
_NO_AGENT = problem_responses(AgentNotFound)
_RUN: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"description": "`token` after `token`, then `complete`"}}}},
    **problem_responses(AgentNotFound, AgentInactive),
}


@router.head("", include_in_schema=False)
@router.get("")
def list_agents(
    request: Request, response: Response, storage: Store, query: Annotated[AgentQuery, Query()]
) -> AgentList:
    agents, total, changed = storage.agents(query)
    pagination = Pagination(
        page=query.page, per_page=query.per_page, total=total, total_pages=-(-total // query.per_page)
    )
    page_links(request, response, pagination, _QUESTIONS)
    last_modified(response, changed)
    return AgentList(agents=agents, pagination=pagination)


@router.post("", status_code=status.HTTP_201_CREATED, responses=problem_responses(AgentNameTaken))
def create_agent(request: Request, response: Response, storage: Store, new: CreateAgent) -> ChangedAgent:
    try:
        agent = storage.create_agent(new)
    except NameTakenError:
        raise AgentNameTaken(detail=f"Agent '{new.name}' already exists") from None
    location(request, response, f"/agents/{agent.name}")
    return ChangedAgent(**dict(agent), metadata=metadata(request))


@router.head("/{name}", include_in_schema=False)
@router.get("/{name}", responses=_NO_AGENT)
def get_agent(name: str, response: Response, storage: Store) -> Agent:
    agent = existing_agent(storage, name)
    last_modified(response, agent.updated_at)
    return agent


@router.patch("/{name}", responses=_NO_AGENT)
def change_agent(name: str, request: Request, storage: Store, patch: PatchAgent) -> ChangedAgent:
    agent = storage.patch_agent(name, patch.changes())
    if agent is None:
        raise no_agent(name)
    return ChangedAgent(**dict(agent), metadata=metadata(request))


@router.delete("/{name}", status_code=status.HTTP_204_NO_CONTENT, responses=_NO_AGENT)
def delete_agent(name: str, storage: Store) -> None:
    if not storage.delete_agent(name):
        raise no_agent(name)


@router.head("/{name}/status", include_in_schema=False)
@router.get("/{name}/status", responses=_NO_AGENT)
def agent_status(name: str, response: Response, storage: Store) -> AgentStatus:
    found = storage.agent_status(name)
    if found is None:
        raise no_agent(name)
    state, changed = found
    last_modified(response, changed)
    return state


@router.post("/{name}/run", response_model=RunResult, responses=_RUN)
def run_agent(name: str, request: Request, storage: Store, run: RunAgent) -> Any:
    """Run the agent. `"stream": true` answers server-sent events: `token` after `token`, then `complete`."""
    agent = existing_agent(storage, name)
    if agent.status != "active":
        raise AgentInactive(detail=f"Agent '{agent.name}' is not active")
    reply = answer(agent, run.input, memories=_recalled(storage, agent, run), max_tokens=run.config.max_tokens)
    storage.record_run(agent.name)
    if run.stream:
        return StreamingResponse(
            _events(request, agent, reply, request.app.state.pace),
            media_type="text/event-stream",
            # What the tokens cost is told in the last event; no proxy should hold the others back until then.
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    report_tokens(request, input_tokens=reply.used.input_tokens, output_tokens=reply.used.output_tokens)
    return RunResult(
        agent_name=agent.name,
        version=agent.version,
        response=reply.text,
        finish_reason=reply.finish_reason,
        metadata=run_metadata(request, reply.used),
    )


async def _events(request: Request, agent: Agent, reply: Answer, pace: float) -> AsyncIterator[bytes]:
    # Reported one by one: a client that leaves half-way is charged for what was produced until then.
    report_tokens(request, input_tokens=reply.input_tokens)
    for index, token in enumerate(reply.tokens):
        report_tokens(request, output_tokens=1)
        yield _event("token", {"content": token, "index": index})
        await anyio.sleep(pace)
    yield _event(
        "complete",
        {
            "agent_name": agent.name,
            "request_id": request_id(request),
            "finish_reason": reply.finish_reason,
            "tokens_used": reply.used.model_dump(),
            "latency_ms": latency_ms(request),
        },
    )


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _recalled(storage: Storage, agent: Agent, run: RunAgent) -> list[str]:
    """What the agent itself remembers about the question, the most relevant first."""
    if not run.config.include_memory or run.config.memory_retrieval_k == 0:
        return []
    ranked = [(relevance(run.input, memory.content), memory.content) for memory in storage.memories(agent.name)]
    ranked.sort(key=lambda pair: -pair[0])
    return [content for score, content in ranked[: run.config.memory_retrieval_k] if score > 0]


def existing_agent(storage: Storage, name: str) -> Agent:
    """The agent, or the problem that there is none."""
    agent = storage.agent(name)
    if agent is None:
        raise no_agent(name)
    return agent


def no_agent(name: str) -> Problem:
    # A name that no agent can have may be anything: it is not repeated.
    return AgentNotFound(detail=f"Agent '{name}' not found" if is_agent_name(name) else "Agent not found")
