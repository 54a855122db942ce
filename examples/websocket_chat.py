"""A chat in the browser: a page buys a one-time ticket with its token, and opens a WebSocket with it.

    pip install "sigil-policy[demo]"
    python examples/websocket_chat.py [--port 8000]

It prints a link for each of two people; open both. The keys are made at the start: a real service is given its
issuer's, and its pages have their tokens from a sign-in.
"""

import argparse
import secrets
import time
from contextlib import suppress

import anyio
import jwt
import uvicorn
from anyio.streams.memory import MemoryObjectSendStream
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from sigil_policy import BearerAuth, Issuer, Key, PolicyStack, Problems, RateLimit, RequestID, Scopes
from sigil_policy.policies.origins import AllowedOrigins
from sigil_policy.policies.websocket_tickets import WebSocketTicketAuth, WebSocketTickets
from sigil_policy.stores.tickets import MemoryTickets

ISSUER, AUDIENCE = "https://auth.example.com", "chat"

# The token stays behind the "#": browsers send that to nobody.
PAGE = """<!doctype html><title>Chat</title><form><input id=text autofocus></form><pre id=seen></pre><script>
async function connect() {
  const headers = {authorization: "Bearer " + location.hash.slice(1)};
  const {ticket} = await (await fetch("/ws-ticket", {method: "POST", headers})).json();
  const socket = new WebSocket(`ws://${location.host}/chat?ticket=${ticket}`);
  socket.onmessage = ({data}) => seen.append(data + "\\n");
  document.forms[0].onsubmit = (event) => { event.preventDefault(); socket.send(text.value); text.value = ""; };
}
connect();
</script>"""


class Room:
    """Everybody hears everybody; who is 32 messages behind misses the next."""

    def __init__(self) -> None:
        self.members: set[MemoryObjectSendStream[str]] = set()

    def say(self, text: str) -> None:
        for member in self.members:
            with suppress(anyio.WouldBlock):
                member.send_nowait(text)

    async def join(self, socket: WebSocket) -> None:
        await socket.accept()
        name = socket.user.subject
        mouth, ear = anyio.create_memory_object_stream[str](32)

        async def listen() -> None:
            async for text in ear:
                await socket.send_text(text)

        self.members.add(mouth)
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(listen)
                async for text in socket.iter_text():
                    self.say(f"{name}: {text}")
                group.cancel_scope.cancel()
        finally:
            self.members.discard(mouth)
            mouth.close()
            ear.close()


async def page(request: Request) -> HTMLResponse:
    return HTMLResponse(PAGE)


def make_app(secret: SecretStr, origin: str) -> PolicyStack:
    """The chat behind its policies; `origin` is that of its page."""
    tickets = MemoryTickets()  # with several processes: "redis://..." in both places
    issuer = Issuer(url=ISSUER, audience=AUDIENCE, keys=[Key(algorithm="HS256", secret=secret)])
    return PolicyStack(
        Starlette(routes=[Route("/", page), WebSocketRoute("/chat", Room().join)]),
        policies=[
            RequestID(),
            Problems(),
            AllowedOrigins(origins=[origin]),
            WebSocketTicketAuth(store=tickets, websocket_protocol="chat.ticket"),
            BearerAuth(issuers=[issuer]),
            Scopes(routes={"WEBSOCKET /chat": "chat:join"}, public=["GET /"]),
            RateLimit(tiers={"free": "60/second;2000/hour"}),
            WebSocketTickets(store=tickets),
        ],
    )


def mint(secret: SecretStr, subject: str, scope: str = "chat:join") -> str:
    """What the issuer would do once somebody has signed in."""
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": subject, "scope": scope, "exp": int(time.time()) + 3_600}
    return jwt.encode(claims, secret.get_secret_value(), "HS256")


def main() -> None:
    options = argparse.ArgumentParser(description="A chat with tickets.")
    options.add_argument("--port", type=int, default=8000)
    port = options.parse_args().port
    secret, origin = SecretStr(secrets.token_hex(32)), f"http://localhost:{port}"
    for subject in ("ada", "grace"):
        print(f"{subject}: {origin}/#{mint(secret, subject)}")
    print(flush=True)
    uvicorn.run(make_app(secret, origin), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
