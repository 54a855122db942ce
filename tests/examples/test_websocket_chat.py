"""The chat as its docstring starts it: tickets from end to end, over real sockets."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.served import held_port

FILE = Path(__file__).resolve().parents[2] / "examples" / "websocket_chat.py"


class Chat:
    """The running example, and two people."""

    def __init__(self, port: int, printed: str) -> None:
        self.origin = f"http://localhost:{port}"
        self.tokens = dict(re.findall(r"^(\w+): http://localhost:\d+/#(\S+)$", printed, re.MULTILINE))
        self.client = httpx2.Client(base_url=self.origin, timeout=60)

    def post(self, who: str = "ada", **headers: str) -> httpx2.Response:
        sent = {"authorization": f"Bearer {self.tokens[who]}", "origin": self.origin, **headers}
        return self.client.post("/ws-ticket", headers=sent)

    def buy(self, who: str = "ada") -> str:
        return str(self.post(who).json()["ticket"])

    def open(self, ticket: str | None = None, *, origin: Any = "", **options: Any) -> ClientConnection:
        query = "" if ticket is None else f"?ticket={ticket}"
        url = self.origin.replace("http", "ws") + "/chat" + query
        return connect(url, origin=self.origin if origin == "" else origin, open_timeout=60, proxy=None, **options)

    def refusal(self, *args: Any, **options: Any) -> tuple[int, Any]:
        with pytest.raises(InvalidStatus) as caught:
            self.open(*args, **options)
        return caught.value.response.status_code, json.loads(caught.value.response.body)["error_code"]


@pytest.fixture(scope="module")
def chat() -> Iterator[Chat]:
    held = ExitStack()
    port = held.enter_context(held_port())
    command = [sys.executable, str(FILE), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        printed = "".join(process.stdout.readline() for _ in range(2))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        running = Chat(port, printed)
        with running.client:
            yield running
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
        held.close()


def test_two_people_talk(chat: Chat) -> None:
    with chat.open(chat.buy("ada")) as ada, chat.open(chat.buy("grace")) as grace:
        ada.send("hello")
        assert (ada.recv(60), grace.recv(60)) == ("ada: hello", "ada: hello")
        grace.send("hi")
        assert (ada.recv(60), grace.recv(60)) == ("grace: hi", "grace: hi")
    with chat.open(chat.buy("ada")) as ada:
        ada.send("still there?")
        assert ada.recv(60) == "ada: still there?"


def test_the_answer_is_for_nobody_to_keep(chat: Chat) -> None:
    answer = chat.post()
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    assert answer.json() == {"ticket": answer.json()["ticket"], "expires_in": 30}


def test_a_ticket_opens_one_socket(chat: Chat) -> None:
    ticket = chat.buy()
    with chat.open(ticket):
        assert chat.refusal(ticket) == (401, "AUTH_009"), "also while the first is open"
    assert chat.refusal(ticket) == (401, "AUTH_009")


def test_a_ticket_travels_as_a_pair_of_subprotocols(chat: Chat) -> None:
    """RFC 6455 section 4.1: the client ends a connection whose answer selects what it has not offered."""
    ticket = chat.buy()
    with chat.open(subprotocols=["chat.ticket", ticket]) as ada:
        assert ada.subprotocol == "chat.ticket"
        assert ada.response is not None and ticket not in str(ada.response.headers)
        ada.send("hello")
        assert ada.recv(60) == "ada: hello"
    assert chat.refusal(subprotocols=["chat.ticket", ticket]) == (401, "AUTH_009")
    assert chat.refusal(subprotocols=["chat.ticket"]) == (400, "AUTH_003")
    with chat.open(chat.buy(), subprotocols=["other"]) as ada:
        assert ada.subprotocol is None


def test_pages_from_elsewhere_are_refused_whatever_they_have(chat: Chat) -> None:
    ticket = chat.buy()
    for origin in ("https://evil.example", "null"):
        assert chat.refusal(ticket, origin=origin) == (403, "REQ_403")
    assert chat.refusal(ticket, origin=None) == (401, "AUTH_009"), "it was bought by a page"


def test_nobody_gets_in_without_one(chat: Chat) -> None:
    assert chat.refusal() == (401, "AUTH_001")
    assert chat.refusal("wst_" + "a" * 43) == (401, "AUTH_009")
    assert chat.client.post("/ws-ticket").status_code == 401
    assert chat.client.get("/ws-ticket").status_code == 401
    headers = {"Authorization": f"Bearer {chat.tokens['ada']}"}
    with chat.open(origin=None, additional_headers=headers) as program:
        program.send("from a program")
        assert program.recv(60) == "ada: from a program"
    assert chat.refusal(chat.buy(), additional_headers=headers) == (400, "AUTH_006")


def test_the_page_is_public_and_buys_a_ticket(chat: Chat) -> None:
    page = chat.client.get("/")
    assert page.status_code == 200 and "/ws-ticket" in page.text and "chat?ticket=" in page.text
