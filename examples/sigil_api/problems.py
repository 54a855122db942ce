"""What can go wrong in this service: each cause declared once, with what helps against it.

    raise AgentNotFound(detail="Agent 'sales_qualifier' not found")

The library answers for everything in front of the endpoints (AUTH, RATE, CTX, REQ, API, SRV); the codes below belong to
this application.
"""

from sigil_policy import ProblemType

AgentNotFound = ProblemType(
    code="AGT_001",
    title="AgentNotFoundError",
    status=404,
    hints=[
        "Verify agent name is correct",
        "Create the agent if it doesn't exist",
        "List available agents with GET /v7/agents",
    ],
)
AgentNameTaken = ProblemType(
    code="AGT_002",
    title="AgentCreationError",
    status=409,
    hints=["Choose another name", "Change the existing agent with PATCH /v7/agents/{name}"],
)
AgentInactive = ProblemType(
    code="AGT_003",
    title="AgentInactiveError",
    status=409,
    hints=['Activate the agent with PATCH /v7/agents/{name} and {"status": "active"}'],
)
MemoryNotFound = ProblemType(
    code="MEM_001",
    title="MemoryNotFoundError",
    status=404,
    hints=["Search memory with POST /v7/memory/search"],
)
EvaluationNotFound = ProblemType(
    code="EVO_001",
    title="EvaluationNotFoundError",
    status=404,
    hints=["List evaluations with GET /v7/evolution/evaluations"],
)
OrchestratorNotReady = ProblemType(
    code="ORCH_001",
    title="OrchestratorNotInitializedError",
    status=503,
    hints=["Try again in a few seconds"],
)
OperationNotFound = ProblemType(
    code="ORCH_002",
    title="OperationNotFoundError",
    status=404,
    hints=["Use the Location that starting the operation returned"],
)
