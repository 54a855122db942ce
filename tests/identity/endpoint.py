"""An introspection endpoint of the tests: it knows tokens, forgets them, and fails in every way."""

from urllib.parse import parse_qs

import anyio
import httpx2
from pydantic import SecretStr

from sigil_policy.identity.introspection import Introspection
from tests.identity.material import AUDIENCE, SECRET, URL, good_claims

ENDPOINT = f"{URL}/introspect"


class Endpoint:
    """Answers for `ENDPOINT`. `hits` are the tokens that were asked about, `requests` the requests."""

    def __init__(self) -> None:
        self.known: dict[str, dict] = {}
        self.hits: list[str] = []
        self.requests: list[httpx2.Request] = []
        self.down = False
        self.answer: httpx2.Response | None = None
        self.failing: dict[str, httpx2.Response] = {}
        self.hold: anyio.Event | None = None
        self.held: set[str] | None = None
        self.flying = self.most = 0
        self.closed = 0

    def issue(self, token: str = "opaque-1", **changes) -> bytes:
        """`token`, from now on known and active."""
        self.known[token] = {"active": True, "token_type": "Bearer", **good_claims(**changes)}
        return token.encode()

    def revoke(self, token: bytes) -> None:
        del self.known[token.decode()]

    async def handle(self, request: httpx2.Request) -> httpx2.Response:
        form = parse_qs(request.content.decode(), keep_blank_values=True, strict_parsing=True)
        token = form["token"][0]
        self.hits.append(token)
        self.requests.append(request)
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            if self.hold is not None and (self.held is None or token in self.held):
                await self.hold.wait()
        finally:
            self.flying -= 1
        if self.down:
            raise httpx2.ConnectError("canary-address-of-the-endpoint is unreachable")
        if token in self.failing:
            return self.failing[token]
        if self.answer is not None:
            return self.answer
        return httpx2.Response(200, json=self.known.get(token, {"active": False}))

    def transport(self) -> httpx2.AsyncBaseTransport:
        endpoint = self

        class Transport(httpx2.MockTransport):
            async def aclose(self) -> None:
                endpoint.closed += 1

        return Transport(self.handle)

    def introspection(self, **options) -> Introspection:
        if "access_token" not in options:
            options = {"client_id": "sigil-api", "client_secret": SecretStr(SECRET), **options}
        defaults = {"url": ENDPOINT, "issuer": URL, "audience": AUDIENCE, "leeway": 0, "transport": self.transport()}
        defaults["deadline"] = 30  # real seconds, that a machine which stands still does not end
        return Introspection(**{**defaults, **options})
