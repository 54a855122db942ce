"""Tokens and API keys for tests, and the issuer and the store that an application under test takes them from.

    mint = Mint()
    app = PolicyStack(app, policies=[BearerAuth(issuers=[mint.issuer]),
                                     ApiKeyAuth(store=mint.key_store, pepper=mint.pepper)])
    await drive(app, headers=mint.auth_headers(scopes=["agents:read"], tier="pro"))

    with mint.accepted_by(app) as app:          # or: an application whose stack names other issuers and stores
        ...

The tokens are real ones: signed with a key pair of this mint (Ed25519), verified by the code that verifies all others.
"""

import base64
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from secrets import token_urlsafe
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import SecretStr

from sigil_policy.core.clock import SYSTEM_CLOCK, Clock
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack
from sigil_policy.identity.api_keys import MemoryApiKeyStore, new_key
from sigil_policy.identity.issuers import Issuer
from sigil_policy.identity.keys import Key
from sigil_policy.policies.api_key import ApiKeyAuth
from sigil_policy.policies.bearer import BearerAuth


class Mint:
    """Makes tokens and keys.

        Mint(audience="sigil-api")

    Options:
        url: the `iss` of its tokens (default `"https://mint.test"`).
        audience: the `aud` of its tokens (default `"api"`).
        clock: when they are issued (default: the machine's, which `frozen` and the fixture `sigil_clock` hold still).

    `issuer` is for `BearerAuth`; `key_store` and `pepper` are for `ApiKeyAuth`. Two mints never accept each other's.
    """

    def __init__(self, *, url: str = "https://mint.test", audience: str = "api", clock: Clock = SYSTEM_CLOCK) -> None:
        self.url = url
        self.audience = audience
        self.clock = clock
        self.pepper = SecretStr(token_urlsafe(32))
        self.key_store = MemoryApiKeyStore(clock=clock)
        self._private = Ed25519PrivateKey.generate()
        public = self._private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self._kid = token_urlsafe(8)
        self.issuer = Issuer(
            url=url, audience=audience, keys=[Key(algorithm="EdDSA", pem=public.decode("ascii"), id=self._kid)]
        )

    def __repr__(self) -> str:
        return f"Mint(url={self.url!r}, audience={self.audience!r})"

    def mint_token(
        self,
        subject: str = "user_123",
        *,
        scopes: str | Iterable[str] = (),
        tier: str | None = None,
        lifetime: float = 3_600,
        **claims: Any,
    ) -> str:
        """A signed access token (RFC 9068).

            mint.mint_token(scopes=["agents:read"], tier="pro", org="acme")
            mint.mint_token(lifetime=-60)                   # has ended a minute ago
            mint.mint_token(aud="somebody-else", jti=None)  # claims that are None are left out

        Options:
            scopes: a list, or a text with spaces between (default none).
            lifetime: seconds from now until it ends (default 3600).
            claims: further ones, and others in the place of its own.
        """
        now = int(self.clock.time())
        body = {
            "iss": self.url,
            "aud": self.audience,
            "sub": subject,
            "client_id": "tests",
            "jti": token_urlsafe(12),
            "iat": now,
            "exp": now + lifetime,
            "scope": scopes if isinstance(scopes, str) else " ".join(scopes),
            "tier": tier,
            **claims,
        }
        head = {"alg": "EdDSA", "kid": self._kid, "typ": "at+jwt"}
        signed = _part(head) + b"." + _part({name: value for name, value in body.items() if value is not None})
        return (signed + b"." + _base64(self._private.sign(signed))).decode("ascii")

    def mint_key(
        self,
        subject: str = "user_123",
        *,
        scopes: Iterable[str] = (),
        tier: str | None = None,
        lifetime: float | None = None,
        prefix: str = "sk_test",
    ) -> str:
        """An API key, whose record is in `key_store` from now on.

            mint.mint_key("nightly-job", scopes=["agents:read"], tier="pro")

        `lifetime` is for how many seconds it holds (default None: it does not end).
        """
        now = self.clock.time()
        made = new_key(
            pepper=self.pepper,
            subject=subject,
            scopes=scopes.split() if isinstance(scopes, str) else scopes,
            tier=tier,
            expires=None if lifetime is None else now + lifetime,
            created=now,
            prefix=prefix,
        )
        self.key_store.add(made.record)
        return made.plain.get_secret_value()

    def auth_headers(
        self,
        subject: str = "user_123",
        *,
        scopes: str | Iterable[str] = (),
        tier: str | None = None,
        kind: Literal["token", "key"] = "token",
        **options: Any,
    ) -> dict[str, str]:
        """The header of a caller: `Authorization: Bearer ...`, or with `kind="key"` `X-API-Key: ...`.

            client.get("/v7/agents", headers=mint.auth_headers(scopes=["agents:read"], tier="pro"))

        `options` are those of `mint_token` or `mint_key`.
        """
        if kind == "key":
            return {"x-api-key": self.mint_key(subject, scopes=scopes, tier=tier, **options)}
        return {"authorization": f"Bearer {self.mint_token(subject, scopes=scopes, tier=tier, **options)}"}

    @contextmanager
    def accepted_by(self, app: Any) -> Iterator[Any]:
        """In this block `app` takes the tokens and keys of this mint, and no others.

            with mint.accepted_by(app) as app:
                client = TestClient(app)

        `app` is a `PolicyStack` (a new one is given, around the same application), or a Starlette or FastAPI
        application with `PolicyStack`, `BearerAuthMiddleware` or `ApiKeyAuthMiddleware` among its middlewares (which
        builds them anew, and again after the block). All other options of the stack, of `BearerAuth` and of
        `ApiKeyAuth` stay, but for introspection, which nobody answers here.

        Raises `LookupError` where neither policy is found.
        """
        if isinstance(app, PolicyStack):
            _require(self._changes(app), app)
            accepting = PolicyStack.__new__(PolicyStack)
            self._become(accepting, app)
            yield accepting
            return
        middlewares: Any = getattr(app, "user_middleware", None)
        _require(middlewares is not None, app)
        before, built = list(middlewares), app.middleware_stack
        changed = False
        for place, middleware in enumerate(before):
            kind, given = middleware.cls, (middleware.args, middleware.kwargs)
            if not (isinstance(kind, type) and issubclass(kind, PolicyStack)):
                continue
            if self._changes(kind(_nobody, *given[0], **given[1])):
                changed = True
                middlewares[place] = type(middleware)(self._accepting_class(kind), *given[0], **given[1])
        try:
            _require(changed, app)
            app.middleware_stack = None
            yield app
        finally:
            middlewares[:] = before
            app.middleware_stack = built

    def _changes(self, stack: PolicyStack) -> bool:
        return any(self._taking(policy) is not policy for policy in stack.policies)

    def _become(self, stack: PolicyStack, made: PolicyStack) -> None:
        """Make `stack` as `made` is, with other issuers and keys."""
        PolicyStack.__init__(
            stack,
            made.app,
            [self._taking(policy) for policy in made.policies],
            clock=made.clock,
            tags=made.tags,
            strict_routes=made.strict_routes,
            finish_timeout=made.finish_timeout,
        )

    def _accepting_class(self, kind: type[PolicyStack]) -> type[PolicyStack]:
        """A middleware class as `kind` is, whose stacks take what this mint makes."""

        def init(stack: PolicyStack, app: Any, *args: Any, **options: Any) -> None:
            make: Any = kind
            self._become(stack, make(app, *args, **options))

        return type(kind.__name__, (kind,), {"__init__": init})

    def _taking(self, policy: Policy) -> Policy:
        if isinstance(policy, BearerAuth):
            return replace(policy, issuers=[self.issuer], introspection=None)
        if isinstance(policy, ApiKeyAuth):
            return replace(policy, store=self.key_store, pepper=self.pepper)
        return policy


async def _nobody(scope: Any, receive: Any, send: Any) -> None:
    """For a stack that only shows which policies it has."""


def _require(found: bool, app: Any) -> None:
    if not found:
        raise LookupError(
            f"{type(app).__name__} has no BearerAuth and no ApiKeyAuth among its policies or middlewares; give the "
            "mint's issuer, or its key_store and pepper, to the policies where they are made"
        )


def _part(value: Any) -> bytes:
    return _base64(json.dumps(value, separators=(",", ":")).encode())


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
