"""An identity provider of the tests: it signs, publishes its keys, rotates them, and fails in every way."""

import json

import anyio
import httpx2
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.key_sets import KeySet
from tests.identity.material import AUDIENCE, URL, b64, good_claims

JWKS_URL = f"{URL}/jwks.json"
_ES256 = ECAlgorithm(ECAlgorithm.SHA256)


class Pair:
    """A key pair for ES256."""

    def __init__(self, kid: str) -> None:
        self.kid = kid
        self.private = ec.generate_private_key(ec.SECP256R1())
        self._signed: dict[bytes, bytes] = {}

    def jwk(self, **members) -> dict:
        return {**ECAlgorithm.to_jwk(self.private.public_key(), as_dict=True), "kid": self.kid, **members}

    def token(self, *, header: dict | None = None, **changes) -> bytes:
        """The same for the same, as a client presents it: an ECDSA signature is another one each time."""
        head = {"alg": "ES256", "kid": self.kid, **(header or {})}
        signed = b64(json.dumps(head)) + b"." + b64(json.dumps(good_claims(**changes)))
        if signed not in self._signed:
            self._signed[signed] = signed + b"." + b64(_ES256.sign(signed, self.private))
        return self._signed[signed]


class Provider:
    """Answers for `JWKS_URL` and the metadata. `hits` are the paths that were asked for."""

    def __init__(self, *pairs: Pair, url: str = URL) -> None:
        self.url = url
        self.published: list[dict] = [pair.jwk() for pair in pairs]
        self.metadata = {"issuer": url, "jwks_uri": f"{url}/jwks.json"}
        self.headers: dict[str, str] = {}
        self.hits: list[str] = []
        self.down = False
        self.answer: httpx2.Response | None = None
        self.hold: anyio.Event | None = None
        self.closed = 0
        self.missing: frozenset[str] = frozenset()

    def publish(self, *pairs: Pair) -> None:
        self.published = [pair.jwk() for pair in pairs]

    @property
    def fetches(self) -> int:
        """How often the key set was asked for."""
        return sum(path.endswith("jwks.json") for path in self.hits)

    async def handle(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.hits.append(path)
        body = self.metadata if ".well-known" in path else {"keys": self.published}
        if self.hold is not None:
            await self.hold.wait()
        if self.down:
            raise httpx2.ConnectError("canary-address-of-the-provider is unreachable")
        if path in self.missing:
            return httpx2.Response(404)
        if self.answer is not None:
            return self.answer
        return httpx2.Response(200, json=body, headers=self.headers)

    def transport(self) -> httpx2.AsyncBaseTransport:
        provider = self

        class Transport(httpx2.MockTransport):
            async def aclose(self) -> None:
                provider.closed += 1

        return Transport(self.handle)

    def keys(self, url: str | None = JWKS_URL, **options) -> KeySet:
        # The deadline is of real seconds: a machine that stands still does not end a fetch.
        defaults = {"transport": self.transport(), "lifetime": 600, "cool_down": 30, "burst": 3, "deadline": 30}
        return KeySet(url, **{**defaults, **options})

    def issuer(self, url: str | None = JWKS_URL, *, issuer: dict | None = None, **options) -> Issuer:
        return Issuer(url=self.url, audience=AUDIENCE, keys=self.keys(url, **options), leeway=0, **(issuer or {}))
