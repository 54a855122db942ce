"""The service does what its document says, and nothing else: Schemathesis asks it, with every check that it has.

No check is switched off. Credentials are those of the run, not made up by the generator: OpenAPI has no words for what
a bearer token looks like, so that a made-up one is "valid data" that is refused with 400. What is made of absent, wrong
and expired credentials is asked all the same, by the check `ignored_auth`.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from examples.sigil_api.app import create_app
from examples.sigil_api.home import Home
from examples.sigil_api.policies import SCOPES
from sigil_policy import Tier

EVERYTHING = sorted(set(SCOPES.values()))
# Nobody is refused for being as fast as a test is.
GENEROUS = {tier: Tier(requests="1000000/minute", tokens=10**9) for tier in ("free", "standard", "pro", "enterprise")}
EVERY_PHASE: dict[str, Any] = {}
WITHOUT_TABLES = {"coverage": {"enabled": False}}


@dataclass
class Report:
    """What a run has met."""

    cases: int = 0
    operations: set[str] = field(default_factory=set)
    statuses: Counter[int] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, event: Any) -> None:
        if isinstance(event, events.NonFatalError | events.FatalError):
            self.problems.append(repr(getattr(event, "value", None) or getattr(event, "exception", event)))
        if not isinstance(event, events.ScenarioFinished):
            return
        recorder = event.recorder
        self.cases += len(recorder.interactions)
        self.operations.update(node.value.operation.label for node in recorder.cases.values())
        for interaction in recorder.interactions.values():
            if interaction.response is not None:
                self.statuses[interaction.response.status_code] += 1
        for checks in recorder.checks.values():
            for check in checks:
                self.checks[check.name] += 1
                if check.failure_info is not None:
                    failure = check.failure_info.failure
                    self.problems.append(
                        f"{check.name} of {event.label}: {failure.title}. {failure.message}\n"
                        f"{check.failure_info.code_sample}"
                    )


def ask(home: Home, headers: dict[str, str], *, examples: int, tiers: Any, phases: dict[str, Any]) -> Report:
    app = create_app(home, log=io.StringIO(), pace=0, tiers=tiers)
    config = SchemathesisConfig.from_dict(
        {
            "seed": 20_261_123,
            "headers": headers,
            "phases": phases,
            "generation": {
                "deterministic": True,
                "database": "none",
                "max-examples": examples,
                "with-security-parameters": False,
            },
        }
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    report = Report()
    for event in from_schema(schema).execute():
        report.add(event)
    return report


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    return Home(tmp_path / "home")


def token(home: Home, tier: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {home.mint_token(subject='ada', tier=tier, scopes=EVERYTHING)}"}


def test_anonymous_callers_meet_what_is_documented(home: Home) -> None:
    report = ask(home, {}, examples=3, tiers=GENEROUS, phases=WITHOUT_TABLES)
    assert report.problems == []
    assert len(report.operations) == 33
    assert report.statuses[401] > 30 and report.statuses[200] > 0


def test_every_operation_keeps_to_its_document_in_every_case_that_a_schema_suggests(home: Home) -> None:
    report = ask(home, token(home, "pro"), examples=3, tiers=GENEROUS, phases=EVERY_PHASE)
    assert report.problems == []
    assert len(report.operations) == 33
    assert {200, 201, 202, 204, 400, 401, 404, 405, 409} <= set(report.statuses)
    assert {
        "allow_header_conformance",
        "content_type_conformance",
        "ensure_resource_availability",
        "ignored_auth",
        "missing_required_header",
        "negative_data_rejection",
        "not_a_server_error",
        "object_level_authorization",
        "positive_data_acceptance",
        "response_headers_conformance",
        "response_schema_conformance",
        "status_code_conformance",
        "unsupported_method",
        "use_after_free",
    } <= set(report.checks)


@pytest.mark.parametrize("tier", ["free", "standard", "enterprise"])
def test_every_tier_meets_what_is_documented(home: Home, tier: str) -> None:
    report = ask(home, token(home, tier), examples=3, tiers=GENEROUS, phases=WITHOUT_TABLES)
    assert report.problems == []
    assert len(report.operations) == 33
    assert report.statuses[200] > 0


def test_a_key_is_as_good_as_a_token(home: Home) -> None:
    key = home.issue_key(subject="reports", tier="pro", scopes=EVERYTHING)
    report = ask(home, {"X-API-Key": key}, examples=2, tiers=GENEROUS, phases=WITHOUT_TABLES)
    assert report.problems == []
    assert report.statuses[200] > 0


def test_who_is_over_the_limit_gets_the_answer_that_is_documented(home: Home) -> None:
    """The guidelines' own tiers: one request in a second."""
    report = ask(home, token(home, "free"), examples=2, tiers=None, phases=WITHOUT_TABLES)
    assert report.problems == []
    assert report.statuses[429] > 0
