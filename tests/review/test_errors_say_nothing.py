"""What went wrong is said, what was sent is not; and an answer to an error is an answer, whatever follows it."""

import logging
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, field_validator, model_validator
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from sigil_policy.core.stack import PolicyStack
from sigil_policy.policies.problems import Problems, from_validation_errors
from sigil_policy.telemetry.redaction import Redaction
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "text",
    [
        "page=1&password[]=canary",
        "user[password][0]=canary",
        "password%5B%5D=canary",
        "%2574oken=canary",
        "%252574oken=canary",
        "{'password': ['canary']}",
    ],
)
def test_lists_and_names_that_were_encoded_twice_hide_no_secret(text: str) -> None:
    assert "canary" not in Redaction().text(text)


@pytest.mark.parametrize("text", ["page[]=1", "a[0]=b", "tokens[]=12", "see [1]: the tokens", "100%25 = all"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redaction().text(text) == text


class Card(BaseModel):
    number: int = 0
    owner: str = ""

    @field_validator("number")
    @classmethod
    def _number(cls, number: int) -> int:
        if number:
            raise ValueError(f"card {number} is not accepted")
        return number

    @field_validator("owner")
    @classmethod
    def _owner(cls, owner: str) -> str:
        if owner.startswith("C"):
            raise ValueError(f"{owner.strip().lower()} is on the list, {owner!r}!")
        return owner


class Pair(BaseModel):
    first: str
    rest: list[dict[str, str]] = []

    @model_validator(mode="after")
    def _fits(self) -> "Pair":
        raise ValueError(f"{self.first} does not fit {self.rest}")


def cards() -> FastAPI:
    app = FastAPI()

    @app.post("/card")
    def card(body: Card) -> None: ...

    @app.post("/pair")
    def pair(body: Pair) -> None: ...

    app.add_middleware(PolicyStack, policies=[Problems()])
    return app


@pytest.mark.parametrize(
    ("path", "body", "secrets"),
    [
        ("/card", b'{"number": 4111111111111111}', ["4111111111111111"]),
        ("/card", b'{"owner": "Canary\\u0007 "}', ["anary"]),
        ("/pair", b'{"first": "canary-1", "rest": [{"canary-2": "canary-3"}]}', ["canary"]),
    ],
    ids=["number", "other-case-and-escaped", "a-whole-object"],
)
async def test_validators_texts_lose_every_value_that_was_sent(path: str, body: bytes, secrets: list[str]) -> None:
    sent = await drive(cards(), "POST", path, headers={"content-type": "application/json"}, body=body)
    assert sent.status == 400
    assert not [secret for secret in secrets if secret.lower() in sent.body.decode().lower()]


def test_a_text_that_is_too_much_to_look_through_is_not_shown() -> None:
    long, many = "x" * 2_000_000, [f"v{number}" for number in range(10_000)]
    for given, text in ((long, f"Value error, {long}"), (many, f"Value error, {many[7]} is bad")):
        error = {"type": "value_error", "loc": ("body",), "msg": text, "input": given}
        problem = from_validation_errors([error], 400)
        assert problem.extensions["errors"] == [{"detail": "Invalid value", "pointer": "#"}]


async def boom(request: Request) -> None:
    raise RuntimeError("hunter2")


async def boom_on_websocket(websocket: WebSocket) -> None:
    raise RuntimeError("hunter2")


async def own_answer(request: Request, error: Exception) -> PlainTextResponse:
    async def fail() -> None:
        raise LookupError("the background failed")

    return PlainTextResponse("own", 500, background=BackgroundTask(fail))


def application() -> Any:
    app = Starlette(
        routes=[Route("/boom", boom), WebSocketRoute("/ws", boom_on_websocket)], exception_handlers={500: own_answer}
    )
    app.add_middleware(PolicyStack, policies=[Problems()])
    return app


async def test_a_background_task_that_fails_does_not_take_the_answer_with_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "sigil_policy"):
        sent = await drive(application(), path="/boom", raise_errors=False)
    assert (sent.status, sent.body, type(sent.error)) == (500, b"own", RuntimeError)
    assert "LookupError" in caplog.text


async def test_a_handler_for_requests_is_not_asked_about_a_websocket() -> None:
    sent = await drive(application(), path="/ws", kind="websocket", raise_errors=False)
    assert isinstance(sent.error, RuntimeError)
    assert (sent.status, sent.json()["error_code"]) == (500, "SRV_500")
