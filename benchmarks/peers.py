"""The same duties assembled from today's usual packages, every part pure ASGI, on Starlette.

asgi-correlation-id, a structlog access log with headers and redaction, PyJWT in Starlette's AuthenticationMiddleware,
slowapi's ASGI middleware with three limits, an ETag middleware, fastapi-problem for the errors. Where no package
exists (log, redaction, ETag, the authentication backend) the part is written as a team would write it.

Importing this module takes the extra `bench`.
"""

import hashlib
import re
import time
from collections.abc import Sequence
from typing import Any, TextIO

import jwt
import orjson
import structlog
from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from fastapi_problem.handler import new_exception_handler
from slowapi import Limiter
from slowapi.middleware import SlowAPIASGIMiddleware
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.routing import BaseRoute

from benchmarks.timing import App, Message

_SECRET_NAMES = frozenset(("authorization", "cookie", "set-cookie", "x-api-key", "password", "secret", "token"))
_SECRET_VALUES = tuple(
    map(
        re.compile,
        (
            r"eyJ[\w-]+\.[\w-]+\.[\w-]+",
            r"(?i)\b(?:bearer|basic)\s+[\w.~+/=-]+",
            r"\bsk_(?:live|test)_\w+",
            r"\bAKIA[0-9A-Z]{16}\b",
        ),
    )
)


def build(
    routes: Sequence[BaseRoute], *, secret: str, issuer: str, audience: str, limits: Sequence[str], log: TextIO
) -> App:
    """A Starlette application with `routes` behind the whole assembly."""
    app = Starlette(
        routes=routes,
        middleware=[
            Middleware(CorrelationIdMiddleware),
            Middleware(AccessLogMiddleware, logger=_json_logger(log)),
            Middleware(AuthenticationMiddleware, backend=TokenBackend(secret, issuer, audience)),
            Middleware(SlowAPIASGIMiddleware),
            Middleware(EtagMiddleware),
        ],
    )
    app.state.limiter = Limiter(key_func=_caller, default_limits=list(limits), headers_enabled=True)
    # The package's own `add_exception_handler` also rewrites OpenAPI, which Starlette does not have.
    problems = new_exception_handler()
    for error in (Exception, HTTPException):
        app.add_exception_handler(error, problems)
    return app


def _caller(request: Request) -> str:
    return str(request.user.display_name)


def _json_logger(log: TextIO) -> Any:
    return structlog.wrap_logger(
        structlog.BytesLogger(log.buffer),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _redact_event,
            structlog.processors.JSONRenderer(serializer=orjson.dumps),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),
        cache_logger_on_first_use=True,
    )


def _redact_event(logger: Any, method: str, event: Any) -> Any:
    return _redact(event)


def _redact(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: "[REDACTED]" if str(name).lower() in _SECRET_NAMES else _redact(item) for name, item in value.items()
        }
    if isinstance(value, list):
        return [_redact(item) for item in value]
    if isinstance(value, str):
        for pattern in _SECRET_VALUES:
            value = pattern.sub("[REDACTED]", value)
    return value


class TokenBackend(AuthenticationBackend):
    """PyJWT behind Starlette's own interface."""

    def __init__(self, secret: str, issuer: str, audience: str) -> None:
        self.secret = secret
        self.issuer = issuer
        self.audience = audience

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser] | None:
        header = conn.headers.get("authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer":
            return None
        try:
            claims = jwt.decode(token, self.secret, ["HS256"], audience=self.audience, issuer=self.issuer)
        except jwt.PyJWTError as error:
            raise AuthenticationError("invalid token") from error
        return AuthCredentials(claims.get("scope", "").split()), SimpleUser(claims["sub"])


class AccessLogMiddleware:
    """One structlog event per request, with its headers."""

    def __init__(self, app: App, logger: Any) -> None:
        self.app = app
        self.logger = logger

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            self.logger.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                duration_ms=round((time.perf_counter() - started) * 1000, 3),
                request_id=correlation_id.get(),
                client=scope["client"][0] if scope["client"] else None,
                headers=dict(Headers(scope=scope)),
            )


class EtagMiddleware:
    """A strong ETag on whole responses, and 304 where the client names it."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        start: Message | None = None

        async def send_tagged(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and message["status"] == 200:
                start = message
                return
            if start is not None:
                held, start = start, None
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    tag = f'"{hashlib.sha256(message["body"]).hexdigest()}"'
                    headers = MutableHeaders(scope=held)
                    headers["etag"] = tag
                    if Headers(scope=scope).get("if-none-match") == tag:
                        held["status"] = 304
                        del headers["content-length"]
                        message["body"] = b""
                await send(held)
            await send(message)

        await self.app(scope, receive, send_tagged)
