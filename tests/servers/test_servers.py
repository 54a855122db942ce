"""One service on four servers, with real sockets: HTTP/1.1, HTTP/2 where the server has it, WebSockets, lifespan.

Servers run as they are run in production, as processes of their own. What one of them does differently is in
`DIFFERENT`, with its reason.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.servers.service import AUDIENCE, GAP, ISSUER, SECRET

ROOT = Path(__file__).parents[2]
SERVICE = "tests.servers.service:app"
COMMANDS: dict[str, Callable[[int], list[str]]] = {
    "uvicorn": lambda port: ["uvicorn", "--port", str(port), "--log-level", "warning", SERVICE],
    "granian": lambda port: ["granian", "--interface", "asgi", "--port", str(port), "--log-level", "warning", SERVICE],
    "hypercorn": lambda port: ["hypercorn", "--bind", f"127.0.0.1:{port}", SERVICE],
    "daphne": lambda port: ["daphne", "--bind", "127.0.0.1", "--port", str(port), "--verbosity", "0", SERVICE],
}
DIFFERENT = {
    ("daphne", "denial"): "it has no denial responses: who is refused hears a bare 403",
    ("daphne", "lifespan"): "it sends no lifespan; the stack opens what it needs on use",
    ("daphne", "accept"): "it names no version of ASGI, and the first had no headers for `websocket.accept`",
    ("granian", "accept"): "it drops the headers of `websocket.accept`, whoever sends them",
    ("granian-2", "head"): "on HTTP/2 it sends the body that an application has for HEAD, as Starlette's have",
    ("hypercorn-2", "unread"): "on HTTP/2 it ends the connection when data come for what has been answered already",
}
CALLERS = count(1)


class Running:
    """A server with the service: its address, and what has happened in it."""

    def __init__(self, name: str, port: int, log: Path) -> None:
        self.name = name
        self.port = port
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        self.ws = f"ws://127.0.0.1:{port}"

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/", trust_env=False, timeout=5).status_code == 200
        except httpx2.TransportError:
            return False

    def happened(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def waits_for(self, what: Callable[[Any], bool]) -> Any:
        """The first thing of that kind that happens, or has happened."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            for one in self.happened():
                if what(one):
                    return one
            time.sleep(0.02)
        raise AssertionError(f"it did not happen on {self.name}; this did: {self.happened()[-10:]}")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Servers(dict[str, Running]):
    """All of them; they come up, and go down, side by side."""

    def __init__(self, folder: Path) -> None:
        super().__init__({name: Running(name, free_port(), folder / f"{name}.jsonl") for name in COMMANDS})
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for name, here in self.items():
            environment = os.environ | {"HAPPENED": str(here.log), "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", *COMMANDS[name](here.port)]
            with (self._folder / f"{name}.out").open("wb") as out:
                self._processes[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        until = time.monotonic() + 60
        for name, here in self.items():
            while not here.answers():
                if self._processes[name].poll() is not None or time.monotonic() > until:
                    raise AssertionError(f"{name} did not start:\n" + (self._folder / f"{name}.out").read_text())
                time.sleep(0.1)

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    made = Servers(tmp_path_factory.mktemp("servers"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(params=COMMANDS)
def server(request: pytest.FixtureRequest, servers: Servers) -> Running:
    return servers[request.param]


@pytest.fixture(
    params=["uvicorn-1.1", "granian-1.1", "hypercorn-1.1", "daphne-1.1", "granian-2", "hypercorn-2"],
)
def client(request: pytest.FixtureRequest, servers: Servers) -> Iterator[httpx2.Client]:
    name, _, version = request.param.partition("-")
    http2 = version == "2"
    with httpx2.Client(base_url=servers[name].url, http1=not http2, http2=http2, trust_env=False) as made:
        yield made


def version_of(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["client"]).partition("-")[2]


def token(*scopes: str) -> dict[str, str]:
    claims = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": f"caller-{next(CALLERS)}", "scope": " ".join(scopes),
        "exp": int(time.time()) + 600,
    }  # fmt: skip
    return {"authorization": f"Bearer {jwt.encode(claims, SECRET, 'HS256')}"}


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["status"], body["error_code"]) == (status, status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


# --- HTTP ----------------------------------------------------------------------------------------------------------


def test_it_is_the_protocol_that_was_meant(client: httpx2.Client, request: pytest.FixtureRequest) -> None:
    answer = client.get("/about/a%2Fb")
    assert answer.http_version == f"HTTP/{version_of(request)}"
    assert (answer.json()["version"], answer.json()["raw"]) == (version_of(request), "/about/a%2Fb")


def test_id_etag_and_304(client: httpx2.Client) -> None:
    first = client.get("/")
    assert (first.status_code, first.json(), len(first.headers["x-request-id"])) == (200, {"hello": "world"}, 36)
    again = client.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert again.headers["x-request-id"] != first.headers["x-request-id"]


def test_head_is_a_get_without_its_body(client: httpx2.Client, request: pytest.FixtureRequest) -> None:
    if (request.node.callspec.params["client"], "head") not in DIFFERENT:
        got, head = client.get("/"), client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-length", "etag", "content-type"):
            assert head.headers.get(name) == got.headers[name]
    refused = client.head("/items/5")
    assert (refused.status_code, refused.content) == (401, b"")
    assert refused.headers["content-type"] == "application/problem+json"
    assert client.get("/").status_code == 200  # the connection is still in step


def test_auth_scopes_and_limits(client: httpx2.Client) -> None:
    answer = client.get("/items/5")
    problem(answer, 401, "AUTH_001")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    problem(client.get("/items/5", headers=token("other")), 403, "AUTH_004")
    assert client.get("/items/5", headers=token("items:read")).json() == {"number": 5}
    caller = token()
    assert [client.get(f"/limited/{number}", headers=caller).status_code for number in range(2)] == [200, 200]
    answer = client.get("/limited/5", headers=caller)
    problem(answer, 429, "RATE_001")
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_errors_of_the_application(client: httpx2.Client) -> None:
    problem(client.get("/nowhere"), 404, "REQ_404")
    assert "GET" in client.delete("/").headers["allow"]
    answer = client.get("/boom")
    problem(answer, 500, "SRV_500")
    assert b"horse" not in answer.content


def test_a_body_in_parts_arrives_whole(client: httpx2.Client) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b"x" * 5_000

    assert client.post("/echo", content=parts()).text == "100000"


def test_a_refused_body_leaves_the_connection_in_step(client: httpx2.Client, request: pytest.FixtureRequest) -> None:
    # An HTTP/2 server resets a stream that is answered before its body has come; this client does not bear that.
    if (request.node.callspec.params["client"], "unread") in DIFFERENT:
        return
    size = 200_000 if version_of(request) == "1.1" else 1_000
    problem(client.post("/items/5", content=b"x" * size), 401, "AUTH_001")
    assert client.get("/").status_code == 200


def test_a_stream_is_not_held_back(client: httpx2.Client) -> None:
    with client.stream("GET", "/stream") as answer:
        chunks = answer.iter_raw()
        assert next(chunks) == b"one "
        started = time.monotonic()
        assert b"".join(chunks) == b"two"
        assert time.monotonic() - started > GAP / 2
        assert "etag" not in answer.headers


def test_who_leaves_is_noticed(server: Running) -> None:
    with httpx2.Client(base_url=server.url, trust_env=False) as client, client.stream("GET", "/endless") as answer:
        assert next(answer.iter_raw()).startswith(b"data: tick")
    _, _, outcome, status = server.waits_for(lambda one: one[:2] == ["outcome", "/endless"])
    assert (outcome, status) == ("disconnected", 200)


# --- WebSocket ----------------------------------------------------------------------------------------------------


def test_a_websocket_is_accepted_with_headers(server: Running) -> None:
    with connect(f"{server.ws}/ws", additional_headers=token("chat"), open_timeout=5) as talk:
        assert talk.response is not None
        said = talk.response.headers.get("x-request-id")
        assert said is None if (server.name, "accept") in DIFFERENT else len(said or "") == 36
        talk.send("hello")
        assert talk.recv(5) == "hello"
    _, _, outcome, status = server.waits_for(lambda one: one[:2] == ["outcome", "/ws"] and one[3] == 101)
    assert (outcome, status) == ("disconnected", 101)


@pytest.mark.parametrize(("scopes", "status"), [(None, 401), ("other", 403)])
def test_a_websocket_is_refused_before_it_opens(server: Running, scopes: str | None, status: int) -> None:
    headers = token(scopes) if scopes else {}
    with pytest.raises(InvalidStatus) as refused, connect(f"{server.ws}/ws", additional_headers=headers):
        pass
    answer = refused.value.response
    if (server.name, "denial") in DIFFERENT:
        assert answer.status_code == 403
        return
    assert answer.status_code == status
    assert json.loads(answer.body or b"")["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_a_connection_ends_with_its_code_while_nobody_speaks(server: Running) -> None:
    with connect(f"{server.ws}/checked") as talk, pytest.raises(ConnectionClosed) as closed:
        talk.recv(5)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4401


def test_messages_are_judged_one_by_one(server: Running) -> None:
    with connect(f"{server.ws}/ws", additional_headers=token("chat")) as talk:
        talk.send("never")
        refused = json.loads(talk.recv(5))
        assert (refused["type"], refused["data"]["error_code"]) == ("error", "RATE_001")
        talk.send("still here")
        assert talk.recv(5) == "still here"
        talk.send("over")
        with pytest.raises(ConnectionClosed) as closed:
            talk.recv(5)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4000


def test_a_client_that_vanishes_from_a_websocket_is_noticed(server: Running) -> None:
    before = len([one for one in server.happened() if one[:2] == ["outcome", "/ws"]])
    with connect(f"{server.ws}/ws", additional_headers=token("chat"), close_timeout=0.1) as talk:
        talk.send("hello")
        assert talk.recv(5) == "hello"
        talk.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake
    server.waits_for(lambda _: len([one for one in server.happened() if one[:2] == ["outcome", "/ws"]]) > before)


# --- lifespan -----------------------------------------------------------------------------------------------------


def test_the_application_starts_once(server: Running) -> None:
    expected = 0 if (server.name, "lifespan") in DIFFERENT else 1
    assert [one for one in server.happened() if one == ["startup"]] == [["startup"]] * expected


def test_every_difference_has_a_reason() -> None:
    assert {name.partition("-")[0] for name, _ in DIFFERENT} <= set(COMMANDS)
    assert all(len(reason) > 10 for reason in DIFFERENT.values())


def test_the_application_is_shut_down_with_the_server(servers: Servers) -> None:
    """The last one: it stops them."""
    servers.stop()
    for name, here in servers.items():
        expected = [] if (name, "lifespan") in DIFFERENT else [["startup"], ["shutdown"]]
        assert [one for one in here.happened() if one[0] != "outcome"] == expected, name
