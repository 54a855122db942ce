"""`/evolution`: measure agents, improve them; `/operations`: how far a long-running improvement is."""

from fastapi import APIRouter, BackgroundTasks, Request, Response, status

from examples.sigil_api.agents import existing_agent
from examples.sigil_api.context import Store, last_modified, location
from examples.sigil_api.engine import improved_prompt, scores
from examples.sigil_api.models import (
    EvaluateAgent,
    Evaluation,
    EvaluationList,
    Operation,
    OptimizeAgent,
)
from examples.sigil_api.problems import AgentNotFound, EvaluationNotFound, OperationNotFound
from examples.sigil_api.storage import Storage
from sigil_policy import report_tokens
from sigil_policy.frameworks.openapi import problem_responses

router = APIRouter(tags=["evolution"])


@router.post("/evolution/evaluate", responses=problem_responses(AgentNotFound))
def evaluate_agent(request: Request, storage: Store, wanted: EvaluateAgent) -> Evaluation:
    agent = existing_agent(storage, wanted.agent_name)
    marks, used = scores(agent, wanted.cases)
    report_tokens(request, input_tokens=used.input_tokens, output_tokens=used.output_tokens)
    return storage.add_evaluation(agent, marks, used)


@router.head("/evolution/evaluations", include_in_schema=False)
@router.get("/evolution/evaluations")
def list_evaluations(storage: Store, agent_name: str | None = None) -> EvaluationList:
    return EvaluationList(evaluations=storage.evaluations(agent_name))


@router.head("/evolution/evaluations/{evaluation_id}", include_in_schema=False)
@router.get("/evolution/evaluations/{evaluation_id}", responses=problem_responses(EvaluationNotFound))
def get_evaluation(evaluation_id: str, response: Response, storage: Store) -> Evaluation:
    evaluation = storage.evaluation(evaluation_id)
    if evaluation is None:
        raise EvaluationNotFound(detail="There is no evaluation of this id")
    last_modified(response, evaluation.created_at)
    return evaluation


@router.post("/evolution/optimize", status_code=status.HTTP_202_ACCEPTED, responses=problem_responses(AgentNotFound))
def optimize_agent(
    request: Request, response: Response, storage: Store, background: BackgroundTasks, wanted: OptimizeAgent
) -> Operation:
    """Start improving the agent; poll the `Location` until its `status` is no longer `running`."""
    existing_agent(storage, wanted.agent_name)
    operation = storage.start_operation("optimize")
    background.add_task(_optimize, storage, operation.operation_id, wanted)
    location(request, response, f"/operations/{operation.operation_id}")
    response.headers["Retry-After"] = "1"
    return operation


@router.head("/operations/{operation_id}", include_in_schema=False)
@router.get("/operations/{operation_id}", responses=problem_responses(OperationNotFound))
def get_operation(operation_id: str, response: Response, storage: Store) -> Operation:
    operation = storage.operation(operation_id)
    if operation is None:
        raise OperationNotFound(detail="There is no operation of this id")
    last_modified(response, operation.updated_at)
    if operation.status == "running":
        response.headers["Retry-After"] = "1"
    return operation


def _optimize(storage: Storage, operation_id: str, wanted: OptimizeAgent) -> None:
    """Runs after the 202 has been sent, in the thread pool."""
    agent = storage.agent(wanted.agent_name)
    changed = agent and storage.patch_agent(
        agent.name, {"system_prompt": improved_prompt(agent, wanted.target) or None}
    )
    if agent is None or changed is None:
        storage.end_operation(operation_id, error="the agent was deleted")
        return
    storage.end_operation(
        operation_id,
        result={
            "agent_name": agent.name,
            "target": wanted.target,
            "version_before": agent.version,
            "version_after": changed.version,
        },
    )
