"""What goes in and what comes out, as JSON.

The guidelines call an agent's name `agent_name` in one place and `name` in another: both are sent, `name` is read.
Times are RFC 3339 in UTC. A GET carries no per-request metadata in its body: the request id is in the header, so the
same state gives the same bytes and an ETag can match.
"""

import re
from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    WithJsonSchema,
    computed_field,
    field_validator,
)
from pydantic_core import PydanticCustomError

STRATA = ("RTI", "RAI", "ZACS", "EEI", "IGE")
STATUSES = ("active", "inactive")
RESERVED_NAMES = frozenset(("admin", "system", "root", "api"))
SORTABLE = ("name", "stratum", "status", "version", "created_at", "updated_at")

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_INSTANT = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:[Zz]|[+-]\d\d:\d\d)")
_INJECTIONS = (
    re.compile(r"ignore\s+(previous|above)\s+instructions", re.IGNORECASE),
    re.compile(r"system:\s*", re.IGNORECASE),
    re.compile(r"<\|im_start\|>", re.IGNORECASE),
)


def is_agent_name(text: str) -> bool:
    """Whether an agent could have this name: anything else need not be looked up, nor repeated to the caller."""
    return 3 <= len(text) <= 64 and _NAME.fullmatch(text) is not None and text not in RESERVED_NAMES


def _agent_name(name: str) -> str:
    if not 3 <= len(name) <= 64:
        raise PydanticCustomError("agent_name", "Agent name must be 3-64 characters")
    if not _NAME.fullmatch(name):
        raise PydanticCustomError(
            "agent_name", "Agent name must start with a lower-case letter and hold only a-z, 0-9 and _"
        )
    if name in RESERVED_NAMES:
        raise PydanticCustomError("agent_name", "Agent name is reserved")
    return name


def _one_of(what: str, allowed: tuple[str, ...]) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            raise PydanticCustomError("choice", f"Invalid {what}, must be one of: {', '.join(allowed)}")
        return value

    return AfterValidator(check)


def _harmless(prompt: str) -> str:
    if any(pattern.search(prompt) for pattern in _INJECTIONS):
        raise PydanticCustomError("system_prompt", "Invalid content in system prompt")
    return prompt


def _instant(value: Any) -> Any:
    """A day means its midnight in UTC; a time needs an offset, for without one nobody knows which instant is meant."""
    if isinstance(value, str):
        try:
            if _DAY.fullmatch(value):
                return datetime.combine(date.fromisoformat(value), time(), UTC)
            if _INSTANT.fullmatch(value):
                return datetime.fromisoformat(value.upper()).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
        raise PydanticCustomError(
            "instant", "Must be a date (2026-01-31) or a time with an offset (2026-01-31T12:00:00Z; write + as %2B)"
        )
    return value


def _sort(text: str) -> str:
    fields = [part.removeprefix("-") for part in text.split(",")]
    if not set(fields) <= set(SORTABLE) or len(set(fields)) != len(fields):
        raise PydanticCustomError(
            "sort", f"Must name each field once, '-' before it for descending, out of: {', '.join(SORTABLE)}"
        )
    return text


def _integer(value: Any) -> Any:
    """JSON's integers: `10` and `10.0`, but no text and no truth value that could be read as one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("integer", "Must be an integer")
    return value


def _not_null(schema: dict[str, Any]) -> None:
    """What may be left out, but not be null: the default of the model is none of the document."""
    schema.pop("default", None)
    schema.update(schema.pop("anyOf")[0])


AgentName = Annotated[
    str,
    AfterValidator(_agent_name),
    WithJsonSchema(
        {
            "type": "string",
            "minLength": 3,
            "maxLength": 64,
            "pattern": "^[a-z][a-z0-9_]*$",
            "not": {"enum": sorted(RESERVED_NAMES)},
        }
    ),
]
Stratum = Annotated[str, _one_of("stratum", STRATA), WithJsonSchema({"type": "string", "enum": [*STRATA]})]
Status = Annotated[str, _one_of("status", STATUSES), WithJsonSchema({"type": "string", "enum": [*STATUSES]})]
_FIELDS = "|".join(SORTABLE)
Sort = Annotated[
    str,
    AfterValidator(_sort),
    WithJsonSchema(
        {
            "type": "string",
            # In front, that no field comes twice.
            "pattern": rf"^(?!.*\b({_FIELDS})\b.*\b\1\b)-?({_FIELDS})(,-?({_FIELDS})){{0,5}}$",
            "description": "Each field once, '-' before it for descending",
        }
    ),
]
Integer = Annotated[int, BeforeValidator(_integer)]
SystemPrompt = Annotated[str, Field(max_length=50_000), AfterValidator(_harmless)]
Instant = Annotated[datetime, BeforeValidator(_instant)]
Tags = Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], Field(max_length=20)]


class Body(BaseModel):
    """A request body: a member that nobody knows is a mistake worth telling."""

    model_config = ConfigDict(extra="forbid")


# --- agents -------------------------------------------------------------------------------------------------


class CreateAgent(Body):
    name: AgentName
    stratum: Stratum
    description: str = Field(max_length=500)
    system_prompt: SystemPrompt | None = None


class PatchAgent(Body):
    """Only what is to change: read `changes()`. Of these only the prompt may be null, which removes it."""

    stratum: Stratum | None = Field(default=None, json_schema_extra=_not_null)
    description: Annotated[str, Field(max_length=500)] | None = Field(default=None, json_schema_extra=_not_null)
    system_prompt: SystemPrompt | None = None
    status: Status | None = Field(default=None, json_schema_extra=_not_null)

    @field_validator("stratum", "description", "status", mode="before")
    @classmethod
    def _is_something(cls, value: Any) -> Any:
        if value is None:
            raise PydanticCustomError("null", "May be left out, but not be null")
        return value

    def changes(self) -> dict[str, str | None]:
        return self.model_dump(exclude_unset=True)


class AgentQuery(BaseModel):
    """Which agents, in which order, and which page of them. The range is half-open: after <= created < before."""

    page: int = Field(default=1, ge=1, le=1_000_000)
    per_page: int = Field(default=20, ge=1, le=100)
    stratum: Stratum | None = None
    status: Status | None = None
    q: str | None = Field(default=None, min_length=1, max_length=100, description="Search in name and description")
    created_after: Instant | None = None
    created_before: Instant | None = None
    sort: Sort = "created_at"


class AgentSummary(BaseModel):
    name: str
    stratum: str
    description: str
    status: str
    version: str
    created_at: datetime
    updated_at: datetime

    @computed_field
    def agent_name(self) -> str:
        return self.name


class Agent(AgentSummary):
    system_prompt: str | None = None


class Pagination(BaseModel):
    page: int
    per_page: int
    total: int
    total_pages: int


class AgentList(BaseModel):
    agents: list[AgentSummary]
    pagination: Pagination


class AgentStatus(BaseModel):
    agent_name: str
    status: str
    version: str
    runs: int
    last_run_at: datetime | None


class TokensUsed(BaseModel):
    input_tokens: int
    output_tokens: int
    total_tokens: int


class Metadata(BaseModel):
    request_id: str
    latency_ms: int


class RunMetadata(Metadata):
    tokens_used: TokensUsed


class ChangedAgent(Agent):
    metadata: Metadata


class RunConfig(BaseModel):
    """Settings of one run; those of other engines are accepted and have no effect here."""

    max_tokens: Integer = Field(default=256, ge=1, le=4_000, description="Upper bound of the answer")
    include_memory: StrictBool = True
    memory_retrieval_k: Integer = Field(default=10, ge=0, le=50)


class RunAgent(Body):
    input: str = Field(min_length=1, max_length=100_000)
    stream: StrictBool = False
    config: RunConfig = RunConfig()


class RunResult(BaseModel):
    agent_name: str
    version: str
    status: Literal["completed"] = "completed"
    response: str
    finish_reason: Literal["stop", "length"]
    metadata: RunMetadata


# --- memory -------------------------------------------------------------------------------------------------


class StoreMemory(Body):
    content: str = Field(min_length=1, max_length=10_000)
    agent_name: AgentName | None = None
    tags: Tags = []


class SearchMemory(Body):
    query: str = Field(min_length=1, max_length=1_000)
    agent_name: AgentName | None = None
    limit: Integer = Field(default=10, ge=1, le=50)


class Memory(BaseModel):
    memory_id: str
    agent_name: str | None
    content: str
    tags: list[str]
    created_at: datetime


class FoundMemory(Memory):
    score: float


class MemoryList(BaseModel):
    results: list[FoundMemory]


# --- evolution ----------------------------------------------------------------------------------------------


class EvaluateAgent(Body):
    agent_name: AgentName
    cases: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=2_000)]], Field(min_length=1, max_length=20)
    ] = [
        "Who are you?",
        "What can you do for me?",
    ]


TARGETS = ("accuracy", "brevity")
Target = Annotated[str, _one_of("target", TARGETS), WithJsonSchema({"type": "string", "enum": [*TARGETS]})]


class OptimizeAgent(Body):
    agent_name: AgentName
    target: Target = "accuracy"


class Evaluation(BaseModel):
    evaluation_id: str
    agent_name: str
    agent_version: str
    scores: dict[str, float]
    tokens_used: TokensUsed
    created_at: datetime


class EvaluationList(BaseModel):
    evaluations: list[Evaluation]


class Operation(BaseModel):
    """A long-running operation. The guidelines poll `status` in one place and `state` in another: both are sent."""

    operation_id: str
    kind: str
    status: Literal["running", "completed", "failed"]
    result: dict[str, Any] | None = None
    error: str | None = None
    created_at: datetime
    updated_at: datetime

    @computed_field
    def state(self) -> str:
        return self.status


# --- the caller's budget ------------------------------------------------------------------------------------


class Window(BaseModel):
    window: str
    unit: str
    limit: int
    used: int
    remaining: int
    reset: Annotated[float, PlainSerializer(int)]


class BudgetStatus(BaseModel):
    """`utilization` is the share of the token budget that is used, from 0 to 1."""

    tier: str
    utilization: float
    tokens: list[Window]
    requests: list[Window]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
