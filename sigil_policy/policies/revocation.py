"""Refuses callers whose credential was revoked before it ended: by token, by caller, by issuer, or all at once.

    revocations = RedisRevocations("redis://auth.internal:6379/0")

    app.add_middleware(PolicyStack, policies=[
        RequestID(), Problems(), BearerAuth(...), Revocation(store=revocations), Scopes(...), RateLimit(...),
    ])

    await revocations.revoke(jti="d3f8", until=claims["exp"])            # one token
    await revocations.revoke(subject="user_123", issued_before=now)      # log out everywhere

    HTTP/1.1 401 Unauthorized
    WWW-Authenticate: Bearer realm="api", error="invalid_token"

What it guarantees:

* **A revoked credential gets the answer of a wrong one**: 401 `AUTH_002` for a token, `AUTH_005` for an API key. It
  does not say that it was right once.
* **A bounded delay.** What is revoked is refused in every process at the latest `delay` seconds after `revoke` has
  returned (plus what a refresh takes), and at once with a store of this process. A request is judged once, when it
  comes; an open WebSocket every `recheck` seconds, and closed with code 4401.
* **Hardly any request waits.** Each process has a copy. It is refreshed after a response, when it is older than half of
  `delay`; one trip, however many requests there were. Only a request that finds a copy older than `delay`, because
  nobody came for so long, waits for a trip, and all that come meanwhile for the same one.
* **When the store is away**, the copy decides for `stale_for` seconds after it was last known to be complete. Then, and
  in a process that has never read it, `on_store_loss` says what holds: "closed" answers 503 with `Retry-After`, "open"
  goes on with what is known. That goes for a store that raises anything else, too.

Without `jti` a token cannot be revoked alone, only by its caller, its issuer, or with all others. Without `iat` it
counts as issued before every moment. An API key has neither, and no issuer: it is met by `subject`, and by what is
revoked of everybody. To end one of several keys of a subject, take it out of its own store.

Place it inside the policies that authenticate, outside `Scopes` and whatever works on behalf of the caller. RFC 6750
section 3.1 ("revoked" is `invalid_token`); RFC 7519 sections 4.1.6 and 4.1.7; RFC 7009 for where revocations come from.
"""

from collections.abc import Awaitable, Iterable
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from sigil_policy.core.catalogue import KEY_INVALID, TOKEN_INVALID, http_problem
from sigil_policy.core.exchange import Exchange
from sigil_policy.core.facts import Principal
from sigil_policy.core.operations import Operation
from sigil_policy.core.policy import Answer, Closable, Close, Policy
from sigil_policy.core.problems import Problem
from sigil_policy.identity.challenges import challenge_line, token_scheme
from sigil_policy.identity.endings import close_for
from sigil_policy.identity.fields import Scheme
from sigil_policy.identity.store_failures import StoreFailures
from sigil_policy.stores.revocations import RevocationStore
from sigil_policy.stores.urls import found_by, revocation_store


class Revocation(Policy):
    """Refuses callers whose credential was revoked; the module says what it guarantees.

        Revocation(store="redis://auth.internal:6379/0")
        Revocation(store=MemoryRevocations())

    Options:
        store: what was revoked: a `RevocationStore`, or the URL of a Redis or Valkey server.
        delay: how many seconds may pass until a revocation is known everywhere, 0.05 to 300 (default 1). In this
            process it means nothing.
        stale_for: for how many seconds a copy decides that cannot be refreshed (default 30; at least `delay`).
        on_store_loss: "closed" (default) or "open": what holds after that.
        recheck: after how many seconds an open WebSocket is judged again, 0.05 to 3600 (default 5). While nothing can
            be known and `on_store_loss` is "closed", it is closed with code 1013.
        scheme: the scheme of the second challenge line to API keys, as `ApiKeyAuth` has it (default "ApiKey"; None:
            only `Bearer`).

    Answers 401 `AUTH_002` or `AUTH_005` with `WWW-Authenticate` lines, and 503 `SRV_503` while nothing can be known.
    Raises `ValueError` for a store or numbers that cannot be.
    """

    needs: ClassVar[tuple[type, ...]] = (Principal,)

    store: Annotated[Any, found_by(revocation_store)]
    delay: Annotated[float, Field(ge=0.05, le=300)] = 1.0
    stale_for: Annotated[float, Field(gt=0, le=31_536_000)] = 30.0
    on_store_loss: Literal["closed", "open"] = "closed"
    recheck: Annotated[float, Field(ge=0.05, le=3_600)] = 5.0
    scheme: Scheme | None = "ApiKey"

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        methods = ("revoked", "age", "resting", "refresh")
        if not all(callable(getattr(self.store, method, None)) for method in methods):
            raise ValueError(
                f"store must be a URL or a RevocationStore with {', '.join(methods)}, not {type(self.store).__name__}"
            )
        if self.stale_for < self.delay:
            raise ValueError(f"stale_for {self.stale_for} is below delay {self.delay}: no copy would ever be good")
        if not self._remote:
            # A hook that has nothing to do here is taken out of the pass.
            object.__setattr__(self, "on_finish", None)
        return self

    @cached_property
    def _revocations(self) -> RevocationStore:
        return cast("RevocationStore", self.store)

    @cached_property
    def _failures(self) -> StoreFailures:
        return StoreFailures("revocation_store_failed")

    @cached_property
    def _remote(self) -> bool:
        return bool(getattr(self.store, "remote", False))

    def resources(self) -> Iterable[Closable]:
        return (cast("Closable", self.store),) if hasattr(self.store, "aclose") else ()

    # --- the pass --------------------------------------------------------------------------------------------------

    def describe(self, operation: Operation, rule: Any) -> None:
        operation.answers(TOKEN_INVALID, KEY_INVALID, headers=("WWW-Authenticate",))
        if self._remote and self.on_store_loss == "closed":
            operation.answers(http_problem(503), headers=("Retry-After",))

    def on_request(self, ex: Exchange) -> Answer | Awaitable[Answer]:
        if ex.principal is None:
            return None
        try:
            if self._remote and self._revocations.age(ex.clock.monotonic()) >= self.delay:
                return self._judge_later(ex)
            return self._judge(ex)
        except Exception as error:  # noqa: BLE001  a store is somebody else's, and may raise anything
            return self._lost(ex, error)

    def on_check(self, ex: Exchange) -> float | Close | Awaitable[float | Close]:
        answer = self.on_request(ex)
        return self._go_on_later(answer) if isinstance(answer, Awaitable) else close_for(answer) or self.recheck

    async def _go_on_later(self, judging: Awaitable[Answer]) -> float | Close:
        return close_for(await judging) or self.recheck

    def on_finish(self, ex: Exchange) -> Awaitable[None] | None:
        try:
            store, now = self._revocations, ex.clock.monotonic()
            return None if store.age(now) < self.delay / 2 or store.resting(now) else self._refreshed(ex)
        except Exception as error:  # noqa: BLE001  a store is somebody else's: nobody's response fails with it
            self._failures.report(self.store, error, ex.clock)
            return None

    # --- parts of it -----------------------------------------------------------------------------------------------

    async def _judge_later(self, ex: Exchange) -> Problem | None:
        """Bring an old copy up to date first."""
        store, now = self._revocations, ex.clock.monotonic()
        wait = 1.0
        try:
            await store.refresh(now)
        except Exception as error:  # noqa: BLE001  as above
            wait = self._failures.report(self.store, error, ex.clock)
        try:
            if store.age(now) >= self.stale_for and self.on_store_loss == "closed":
                return _unavailable(wait)
            return self._judge(ex)
        except Exception as error:  # noqa: BLE001  as above
            return self._lost(ex, error)

    def _lost(self, ex: Exchange, error: Exception) -> Problem | None:
        wait = self._failures.report(self.store, error, ex.clock)
        return _unavailable(wait) if self.on_store_loss == "closed" else None

    async def _refreshed(self, ex: Exchange) -> None:
        """Nobody waits for it: who needs it and finds the copy too old asks again."""
        try:
            await self._revocations.refresh(ex.clock.monotonic())
        except Exception as error:  # noqa: BLE001  as above
            self._failures.report(self.store, error, ex.clock)

    def _judge(self, ex: Exchange) -> Problem | None:
        """Every credential that vouches, also one that only cosigns: one that was revoked is a wrong one."""
        for principal in ex.principals:
            problem = self._judge_one(ex, principal)
            if problem is not None:
                return problem
        return None

    def _judge_one(self, ex: Exchange, principal: Principal) -> Problem | None:
        claims = principal.claims
        jti, issued = claims.get("jti"), claims.get("iat")
        if not self._revocations.revoked(
            jti=jti if isinstance(jti, str) and jti else None,
            subject=principal.subject,
            issuer=principal.issuer,
            issued=issued if type(issued) in (int, float) else None,
            now=ex.clock.time(),
        ):
            return None
        invalid = challenge_line(token_scheme(ex), principal.realm, "invalid_token")
        if principal.kind != "api_key":
            return TOKEN_INVALID("The access token is not valid", headers=(invalid,))
        as_bearer = ex.headers.get(b"authorization", b"")[:7].lower() == b"bearer "
        line = invalid if as_bearer else challenge_line("Bearer", principal.realm)
        lines = (line,) if self.scheme is None else (line, challenge_line(self.scheme, principal.realm))
        return KEY_INVALID("The API key is not valid", headers=lines)


def _unavailable(wait: float) -> Problem:
    return http_problem(503)("Credentials cannot be checked at the moment.", retry_after=wait)
