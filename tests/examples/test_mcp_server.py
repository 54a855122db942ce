"""The MCP example as its docstring starts it, over a real socket."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest

from tests.served import held_port

FILE = Path(__file__).resolve().parents[2] / "examples" / "mcp_server.py"
VERSION = "2026-07-28"


pytestmark = pytest.mark.skipif(
    find_spec("fastmcp") is None and not os.environ.get("CI"), reason="the extra `mcp` is not installed"
)


class Example:
    """The running example: what it printed, and a client to it."""

    def __init__(self, port: int, printed: str) -> None:
        self.printed = printed
        self.base = f"http://localhost:{port}"
        self.resource = f"{self.base}/mcp"
        self.token, self.writer = re.findall(r"^(?:TOKEN|WRITER)=(\S+)$", printed, re.MULTILINE)
        self.client = httpx2.Client(base_url=self.base, timeout=60)

    def call(self, tool: str, token: str | None = None, *, body_tool: str | None = None, headers=(), **arguments):
        meta = {
            "io.modelcontextprotocol/protocolVersion": VERSION,
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        params = {"name": body_tool or tool, "arguments": arguments, "_meta": meta}
        sent = {
            "accept": "application/json, text/event-stream",
            "mcp-protocol-version": VERSION,
            "mcp-method": "tools/call",
            "mcp-name": tool,
            **dict(headers),
        }
        if token is not None:
            sent["authorization"] = f"Bearer {token}"
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
        return self.client.post("/mcp", json=message, headers=sent)


@pytest.fixture(scope="module")
def example():
    held = ExitStack()
    port = held.enter_context(held_port())
    command = [sys.executable, str(FILE), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed = ""
        while "Mcp-Name: delete" not in printed:
            line = process.stdout.readline()
            assert line, f"the example ended: {printed}"
            printed += line
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        running = Example(port, printed)
        with running.client:
            yield running
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
        held.close()


def test_a_client_without_a_token_is_led_to_the_issuer(example):
    refused = example.call("search", text="engine")
    assert refused.status_code == 401
    challenge = refused.headers["www-authenticate"]
    assert 'scope="documents:read"' in challenge
    url = re.search(r'resource_metadata="([^"]+)"', challenge)[1]
    document = example.client.get(url)
    assert document.headers["access-control-allow-origin"] == "*"
    assert document.json()["resource"] == example.resource
    assert document.json()["authorization_servers"] == ["https://auth.example.com"]


def test_a_tool_is_called_with_its_scope(example):
    answer = example.call("search", example.token, text="engine")
    assert answer.status_code == 200
    assert answer.json()["result"]["structuredContent"] == {"result": ["ada"]}


def test_without_the_scope_it_is_forbidden_and_with_a_broader_one_it_is_not(example):
    refused = example.call("delete", example.token, name="nobody")
    assert refused.status_code == 403
    assert 'error="insufficient_scope", scope="documents:write"' in refused.headers["www-authenticate"]
    assert "resource_metadata=" in refused.headers["www-authenticate"]
    assert example.call("delete", example.writer, name="nobody").status_code == 200
    assert example.call("search", example.writer, text="x").status_code == 200


def test_a_tool_behind_the_name_of_another_is_not_reached(example):
    refused = example.call("search", example.token, body_tool="delete", name="ada")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, -32020)


def test_a_tool_that_nobody_has_listed_is_closed(example):
    assert example.call("format_disk", example.writer).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:8000"])
def test_a_foreign_web_page_is_refused(example, origin):
    headers = {"origin": origin}
    assert example.call("search", example.token, text="engine", headers=headers).status_code == 403
    headers = {"origin": "https://app.example.com"}
    assert example.call("search", example.token, text="engine", headers=headers).status_code == 200


def test_a_tool_has_its_budget_of_tokens(example):
    """100 an hour; each call reports the 40 that it has used, whatever was reserved."""
    if time.time() % 3_600 > 3_570:
        time.sleep(31)  # all of them in one hour
    answers = [example.call("summarize", example.token, name="ada") for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-tokens-remaining"] for answer in answers[:2]] == ["60", "20"]
    assert answers[0].headers["x-tokens-used"] == "40"
    assert answers[2].json()["violated_policies"] == ["tool-tokens-hour"]
    assert example.call("search", example.token, text="engine").status_code == 200
    assert example.call("summarize", example.writer, name="ada").status_code == 200


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_the_clients_of_today_and_of_yesterday_both_work(example, mode):
    """In a process of its own: what the library warns of while it is imported is none of this suite's business."""
    program = f"""
import asyncio
from fastmcp import Client
from fastmcp.client.transports import StreamableHttpTransport

async def main():
    async with Client(StreamableHttpTransport({example.resource!r}, auth={example.token!r}), mode={mode!r}) as client:
        print(sorted(tool.name for tool in await client.list_tools()))
        print((await client.call_tool("search", {{"text": "engine"}})).data)

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=240)
    assert done.stdout.splitlines() == ["['delete', 'search', 'summarize']", "['ada']"], done.stderr[-2_000:]


def test_the_printed_calls_are_calls(example):
    """What the example prints can be pasted: the body of each is the message that its headers mirror."""
    bodies = [json.loads(text) for text in re.findall(r"-d '(\{.*\})'", example.printed)]
    assert [body["params"]["name"] for body in bodies] == re.findall(r"Mcp-Name: (\w+)", example.printed)
