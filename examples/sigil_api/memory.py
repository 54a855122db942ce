"""`/memory`: store what should be remembered, find it again by its words."""

from fastapi import APIRouter, Request, Response, status

from examples.sigil_api.agents import existing_agent
from examples.sigil_api.context import Store, last_modified, location
from examples.sigil_api.engine import relevance
from examples.sigil_api.models import FoundMemory, Memory, MemoryList, SearchMemory, StoreMemory
from examples.sigil_api.problems import AgentNotFound, MemoryNotFound
from sigil_policy.frameworks.openapi import problem_responses

router = APIRouter(prefix="/memory", tags=["memory"])


@router.post("", status_code=status.HTTP_201_CREATED, responses=problem_responses(AgentNotFound))
def store_memory(request: Request, response: Response, storage: Store, new: StoreMemory) -> Memory:
    if new.agent_name is not None:
        existing_agent(storage, new.agent_name)
    memory = storage.remember(new)
    location(request, response, f"/memory/{memory.memory_id}")
    return memory


@router.post("/search")
def search_memory(storage: Store, search: SearchMemory) -> MemoryList:
    ranked = [
        FoundMemory(**dict(memory), score=score)
        for memory in storage.memories(search.agent_name)
        if (score := relevance(search.query, memory.content)) > 0
    ]
    ranked.sort(key=lambda memory: -memory.score)
    return MemoryList(results=ranked[: search.limit])


@router.head("/{memory_id}", include_in_schema=False)
@router.get("/{memory_id}", responses=problem_responses(MemoryNotFound))
def get_memory(memory_id: str, response: Response, storage: Store) -> Memory:
    memory = storage.memory(memory_id)
    if memory is None:
        raise MemoryNotFound(detail="There is no memory of this id")
    last_modified(response, memory.created_at)
    return memory
