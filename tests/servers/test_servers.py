"""One service on four servers, with real sockets: HTTP/1.1, HTTP/2 where the server has it, in clear and over TLS,
WebSockets, also inside of HTTP/2, lifespan.

Servers run as they are run in production, as processes of their own. What one of them does differently is in
`DIFFERENT`, with its reason.
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from wsproto.events import CloseConnection, TextMessage

from tests.servers.http2 import Http2
from tests.servers.service import AUDIENCE, GAP, ISSUER, LARGEST, SECRET
from tests.stores.redis.servers import free_port

ROOT = Path(__file__).parents[2]
SERVICE = "tests.servers.service:app"
GRANIAN = ["granian", "--interface", "asgi", "--log-level", "warning"]
COMMANDS: dict[str, Callable[[int, Path], list[str]]] = {
    "uvicorn": lambda port, _: ["uvicorn", "--port", str(port), "--log-level", "warning", SERVICE],
    "granian": lambda port, _: [*GRANIAN, "--port", str(port), SERVICE],
    "granian-tls": lambda port, pem: [
        *GRANIAN, "--port", str(port), "--ssl-certificate", str(pem), "--ssl-keyfile", str(pem), SERVICE,
    ],
    "hypercorn": lambda port, _: ["hypercorn", "--bind", f"127.0.0.1:{port}", SERVICE],
    "hypercorn-tls": lambda port, pem: [
        "hypercorn", "--bind", f"127.0.0.1:{port}", "--certfile", str(pem), "--keyfile", str(pem), SERVICE,
    ],
    "daphne": lambda port, _: ["daphne", "--bind", "127.0.0.1", "--port", str(port), "--verbosity", "0", SERVICE],
}  # fmt: skip
IN_CLEAR = [name for name in COMMANDS if not name.endswith("-tls")]
DIFFERENT = {
    ("daphne", "denial"): "it has no denial responses: who is refused hears a bare 403",
    ("daphne", "lifespan"): "it sends no lifespan; the stack opens what it needs on use",
    ("daphne", "accept"): "it names no version of ASGI, and the first had no headers for `websocket.accept`",
    ("granian", "accept"): "it drops the headers of `websocket.accept`, whoever sends them",
    ("granian-1.1", "closes"): "it closes a connection of which a body was not read, and does not say so before",
    ("granian-2", "head"): "on HTTP/2 it sends the body that an application has for HEAD, as Starlette's have",
    ("granian-2", "websocket"): "it has no WebSockets inside of HTTP/2, and does not say that it had",
    ("hypercorn-2", "unread"): "on HTTP/2 it ends the connection when data come for what has been answered already",
}
CALLERS = count(1)


def certificate() -> bytes:
    """A key, and a certificate for this machine that is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return secret + made.public_bytes(Encoding.PEM)


class Running:
    """A server with the service: its address, and what has happened in it."""

    def __init__(self, name: str, port: int, log: Path, certificate: Path) -> None:
        self.name = name
        self.log = log
        self.certificate = certificate
        self.trusts = ssl.create_default_context(cafile=str(certificate))
        self.listens_on(port)

    def listens_on(self, port: int) -> None:
        self.port = port
        self.url = f"https://localhost:{port}" if self.name.endswith("-tls") else f"http://127.0.0.1:{port}"
        self.ws = f"ws://127.0.0.1:{port}"

    def answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/", trust_env=False, timeout=5, verify=self.trusts).status_code == 200
        except httpx2.TransportError:
            return False

    def happened(self) -> list[Any]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def waits_for(self, what: Callable[[Any], bool]) -> Any:
        """The first thing of that kind that happens, or has happened."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for one in self.happened():
                if what(one):
                    return one
            time.sleep(0.02)
        raise AssertionError(f"it did not happen on {self.name}; this did: {self.happened()[-10:]}")


class Servers(dict[str, Running]):
    """All of them; they come up, and go down, side by side."""

    def __init__(self, folder: Path) -> None:
        pem = folder / "server.pem"
        pem.write_bytes(certificate())
        super().__init__({name: Running(name, free_port(), folder / f"{name}.jsonl", pem) for name in COMMANDS})
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def _launch(self, name: str) -> None:
        here = self[name]
        environment = os.environ | {"HAPPENED": str(here.log), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *COMMANDS[name](here.port, here.certificate)]
        with (self._folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)

    def start(self) -> None:
        for name in self:
            self._launch(name)
        until = time.monotonic() + 120
        for name, here in self.items():
            again = 3
            while not here.answers():
                if self._processes[name].poll() is not None and again:
                    # Somebody else took the port before the server had it: on another one.
                    again -= 1
                    here.listens_on(free_port())
                    self._launch(name)
                if self._processes[name].poll() is not None or time.monotonic() > until:
                    raise AssertionError(f"{name} did not start:\n" + (self._folder / f"{name}.out").read_text())
                time.sleep(0.1)

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(60)
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


@pytest.fixture(params=IN_CLEAR)
def server(request: pytest.FixtureRequest, servers: Servers) -> Running:
    return servers[request.param]


@pytest.fixture(
    params=[
        "uvicorn-1.1", "granian-1.1", "hypercorn-1.1", "daphne-1.1", "granian-2", "hypercorn-2", "granian-tls-2",
        "hypercorn-tls-2",
    ],
)  # fmt: skip
def client(request: pytest.FixtureRequest, servers: Servers) -> Iterator[httpx2.Client]:
    name, _, version = request.param.rpartition("-")
    here, http2 = servers[name], version == "2"
    with httpx2.Client(
        base_url=here.url, http1=not http2, http2=http2, trust_env=False, verify=here.trusts, timeout=60
    ) as made:
        yield made


def version_of(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["client"]).rpartition("-")[2]


def differs(request: pytest.FixtureRequest, how: str) -> bool:
    return (request.node.callspec.params["client"].replace("-tls", ""), how) in DIFFERENT


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


@pytest.mark.parametrize("name", ["granian-tls", "hypercorn-tls"])
def test_over_tls_it_is_the_server_that_chooses_http_2(name: str, servers: Servers) -> None:
    here = servers[name]
    for http2, version in ((True, "HTTP/2"), (False, "HTTP/1.1")):
        with httpx2.Client(base_url=here.url, http2=http2, trust_env=False, verify=here.trusts, timeout=60) as both:
            answer = both.get("/")
            assert (answer.status_code, answer.http_version) == (200, version)
            assert len(answer.headers["x-request-id"]) == 36


def test_id_etag_and_304(client: httpx2.Client) -> None:
    first = client.get("/")
    assert (first.status_code, first.json(), len(first.headers["x-request-id"])) == (200, {"hello": "world"}, 36)
    again = client.get("/", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert again.headers["x-request-id"] != first.headers["x-request-id"]


def test_head_is_a_get_without_its_body(client: httpx2.Client, request: pytest.FixtureRequest) -> None:
    if not differs(request, "head"):
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
    assert 1 <= int(answer.headers["retry-after"]) <= 86_400


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
    if differs(request, "unread"):
        return
    size = 200_000 if version_of(request) == "1.1" else 1_000
    problem(client.post("/items/5", content=b"x" * size), 401, "AUTH_001")
    try:
        answer = client.get("/")
    except httpx2.RemoteProtocolError:
        assert differs(request, "closes")
        answer = client.get("/")
    assert answer.status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused(
    client: httpx2.Client, request: pytest.FixtureRequest, announced: bool
) -> None:
    if announced and version_of(request) == "2":
        return  # refused unread, as above
    content = b"x" * 2 * LARGEST if announced else iter([b"x" * 1_000] * (LARGEST // 1_000 + 1))
    answer = client.post("/echo", content=content)
    assert problem(answer, 413, "REQ_003")["max_bytes"] == LARGEST
    assert answer.headers.get("connection") == (None if version_of(request) == "2" else "close")
    assert client.get("/").status_code == 200


def test_a_stream_is_not_held_back(client: httpx2.Client) -> None:
    waited = []
    # Who is held up after the first part finds the other one waiting, once or twice.
    while not waited or (max(waited) <= GAP / 2 and len(waited) < 5):
        with client.stream("GET", "/stream") as answer:
            chunks = answer.iter_raw()
            assert next(chunks) == b"one "
            started = time.monotonic()
            assert b"".join(chunks) == b"two"
            waited.append(time.monotonic() - started)
            assert "etag" not in answer.headers
    assert max(waited) > GAP / 2


def test_who_leaves_is_noticed(server: Running) -> None:
    with (
        httpx2.Client(base_url=server.url, trust_env=False, timeout=60) as client,
        client.stream("GET", "/endless") as answer,
    ):
        assert next(answer.iter_raw()).startswith(b"data: tick")
    _, _, outcome, status = server.waits_for(lambda one: one[:2] == ["outcome", "/endless"])
    assert (outcome, status) == ("disconnected", 200)


# --- WebSocket ----------------------------------------------------------------------------------------------------


def test_a_websocket_is_accepted_with_headers(server: Running) -> None:
    with connect(f"{server.ws}/ws", additional_headers=token("chat"), open_timeout=60) as talk:
        assert talk.response is not None
        said = talk.response.headers.get("x-request-id")
        assert said is None if (server.name, "accept") in DIFFERENT else len(said or "") == 36
        talk.send("hello")
        assert talk.recv(60) == "hello"
    _, _, outcome, status = server.waits_for(lambda one: one[:2] == ["outcome", "/ws"] and one[3] == 101)
    assert (outcome, status) == ("disconnected", 101)


@pytest.mark.parametrize(("scopes", "status"), [(None, 401), ("other", 403)])
def test_a_websocket_is_refused_before_it_opens(server: Running, scopes: str | None, status: int) -> None:
    headers = token(scopes) if scopes else {}
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(f"{server.ws}/ws", additional_headers=headers, open_timeout=60),
    ):
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
    with connect(f"{server.ws}/checked", open_timeout=60) as talk, pytest.raises(ConnectionClosed) as closed:
        talk.recv(60)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4401


def test_messages_are_judged_one_by_one(server: Running) -> None:
    with connect(f"{server.ws}/ws", additional_headers=token("chat"), open_timeout=60) as talk:
        talk.send("never")
        refused = json.loads(talk.recv(60))
        assert (refused["type"], refused["data"]["error_code"]) == ("error", "RATE_001")
        talk.send("still here")
        assert talk.recv(60) == "still here"
        talk.send("over")
        with pytest.raises(ConnectionClosed) as closed:
            talk.recv(60)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4000


def test_a_client_that_vanishes_from_a_websocket_is_noticed(server: Running) -> None:
    before = len([one for one in server.happened() if one[:2] == ["outcome", "/ws"]])
    with connect(f"{server.ws}/ws", additional_headers=token("chat"), open_timeout=60, close_timeout=0.1) as talk:
        talk.send("hello")
        assert talk.recv(60) == "hello"
        talk.socket.shutdown(socket.SHUT_RDWR)  # no closing handshake
    server.waits_for(lambda _: len([one for one in server.happened() if one[:2] == ["outcome", "/ws"]]) > before)


# --- WebSocket inside of HTTP/2 (RFC 8441) --------------------------------------------------------------------------


@pytest.fixture
def http2(servers: Servers) -> Iterator[Http2]:
    here = servers["hypercorn-tls"]
    with Http2(here.port, here.certificate) as made:
        yield made


@pytest.mark.parametrize("name", ["granian", "hypercorn"])
def test_a_server_says_whether_http_2_carries_websockets(name: str, servers: Servers) -> None:
    here = servers[f"{name}-tls"]
    with Http2(here.port, here.certificate) as made:
        assert made.chosen == "h2"
        assert made.has_websockets == ((f"{name}-2", "websocket") not in DIFFERENT)


@pytest.mark.parametrize(("scopes", "status", "code"), [(None, 401, "AUTH_001"), ("other", 403, "AUTH_004")])
def test_a_websocket_over_http_2_is_refused_before_it_opens(
    http2: Http2, scopes: str | None, status: int, code: str
) -> None:
    refused = http2.connect("/ws", **(token(scopes) if scopes else {}))
    body = json.loads(refused.body())
    assert (refused.status, body["status"], body["error_code"]) == (status, status, code)
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["www-authenticate"].startswith("Bearer")
    assert body["request_id"] == refused.headers["x-request-id"]
    opened = http2.connect("/ws", **token("chat"))  # the connection is still in step
    assert opened.status == 200


def test_a_websocket_over_http_2_is_judged_message_by_message(http2: Http2) -> None:
    talk = http2.connect("/ws", **token("chat"))
    assert (talk.status, len(talk.headers["x-request-id"])) == (200, 36)
    talk.say("hello")
    assert talk.hear() == TextMessage("hello")
    talk.say("never")
    refused = talk.hear()
    assert isinstance(refused, TextMessage)
    assert json.loads(refused.data)["data"]["error_code"] == "RATE_001"
    talk.say("over")
    closed = talk.hear()
    assert isinstance(closed, CloseConnection)
    assert (closed.code, closed.reason) == (4000, "over")


def test_a_connection_over_http_2_ends_with_its_code_while_nobody_speaks(http2: Http2) -> None:
    closed = http2.connect("/checked").hear()
    assert isinstance(closed, CloseConnection)
    assert closed.code == 4401


# --- lifespan -----------------------------------------------------------------------------------------------------


def test_the_application_starts_once(server: Running) -> None:
    expected = 0 if (server.name, "lifespan") in DIFFERENT else 1
    assert [one for one in server.happened() if one == ["startup"]] == [["startup"]] * expected


def test_every_difference_has_a_reason() -> None:
    assert {name.partition("-")[0] for name, _ in DIFFERENT} <= set(IN_CLEAR)
    assert all(len(reason) > 10 for reason in DIFFERENT.values())


def test_the_application_is_shut_down_with_the_server(servers: Servers) -> None:
    """The last one: it stops them."""
    servers.stop()
    for name, here in servers.items():
        expected = [] if (name, "lifespan") in DIFFERENT else [["startup"], ["shutdown"]]
        assert [one for one in here.happened() if one[0] != "outcome"] == expected, name
