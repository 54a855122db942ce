"""An MCP server whose tools are opened by scopes, one by one, and have budgets of their own.

    pip install "sigil-policy[mcp]"
    python examples/mcp_server.py [--port 8000]

It prints a token and calls to try. The keys are made at the start: a real server is given its issuer's.
"""

import argparse
import json
import time
from typing import Any

import jwt
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastmcp import FastMCP
from fastmcp.server.dependencies import get_http_request

from sigil_policy import Issuer, Key, PolicyStack, Tier, report_tokens
from sigil_policy.presets import Tool, mcp_server

ISSUER = "https://auth.example.com"
DOCUMENTS = {"ada": "Notes on the Analytical Engine", "grace": "The education of a computer"}

mcp: FastMCP[Any] = FastMCP("documents")


@mcp.tool
def search(text: str) -> list[str]:
    """Names of the documents that have the text."""
    return [name for name, title in DOCUMENTS.items() if text.lower() in title.lower()]


@mcp.tool
def summarize(name: str) -> str:
    """A summary, by a language model that takes 40 tokens for any."""
    report_tokens(get_http_request(), input_tokens=30, output_tokens=10)
    return f"{name} wrote: {DOCUMENTS.get(name, 'nothing')}"


@mcp.tool
def delete(name: str) -> bool:
    """Deletes a document for good."""
    return DOCUMENTS.pop(name, None) is not None


def protected(resource: str, key: Ed25519PrivateKey) -> PolicyStack:
    """The server behind its policies; `resource` is its public URL."""
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return PolicyStack(
        mcp.http_app(path="/mcp", stateless_http=True, json_response=True),
        policies=mcp_server(
            resource=resource,
            issuers=[Issuer(url=ISSUER, audience=resource, keys=[Key(algorithm="EdDSA", pem=pem)])],
            tools={
                "search": "documents:read",
                "summarize": Tool(scopes="documents:read", limits=Tier(tokens="100/hour"), estimate=40),
                "delete": "documents:write",
            },
            implies={"documents:write": ["documents:read"]},
            origins=["https://app.example.com"],
            limits={"tiers": {"free": Tier(requests="10/second;600/minute", tokens="10000/hour")}},
            metadata={"resource_name": "Documents"},
            allow_loopback=resource.startswith("http://"),
        ),
    )


def mint(key: Ed25519PrivateKey, resource: str, scope: str, *, subject: str = "ada") -> str:
    """What the issuer would do once somebody has signed in."""
    claims = {"iss": ISSUER, "aud": resource, "sub": subject, "scope": scope, "exp": int(time.time()) + 3_600}
    return jwt.encode(claims, key, "EdDSA")


def call(tool: str, **arguments: str) -> str:
    """A call as MCP 2026-07-28 has it: one POST, with no handshake before."""
    meta = {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientCapabilities": {},
    }
    params = {"name": tool, "arguments": arguments, "_meta": meta}
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})


def main() -> None:
    options = argparse.ArgumentParser(description="A protected MCP server.")
    options.add_argument("--port", type=int, default=8000)
    port = options.parse_args().port
    resource = f"http://localhost:{port}/mcp"
    key = Ed25519PrivateKey.generate()
    print(f"TOKEN={mint(key, resource, 'documents:read')}")
    print(f"WRITER={mint(key, resource, 'documents:write', subject='grace')}")
    print("\n# who issues tokens:")
    print(f"curl {resource.replace('/mcp', '/.well-known/oauth-protected-resource/mcp')}")
    for tool, arguments in (("search", {"text": "engine"}), ("summarize", {"name": "ada"}), ("delete", {"name": "x"})):
        print(f"\n# {tool}:")
        print(f"curl -i {resource} -H \"Authorization: Bearer $TOKEN\" -H 'Content-Type: application/json' \\")
        print("  -H 'Accept: application/json, text/event-stream' -H 'MCP-Protocol-Version: 2026-07-28' \\")
        print(f"  -H 'Mcp-Method: tools/call' -H 'Mcp-Name: {tool}' -d '{call(tool, **arguments)}'")
    print(flush=True)
    uvicorn.run(protected(resource, key), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
