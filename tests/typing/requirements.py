"""What pyright (strict) must accept, and refuse, of people who write who has to vouch for a caller."""

from typing import assert_type

from sigil_policy.identity.requirements import AllOf, AnyOf, Both, Either, FromApiKey, FromIssuer
from sigil_policy.policies.scopes import Scopes

a = FromIssuer("https://auth.example.com", scopes="agents:read")
assert_type(a | FromApiKey("agents:read"), Either)
assert_type(a & FromApiKey(), Both)
assert_type("agents:read" & FromApiKey(), Both)
assert_type(AllOf("x") | AnyOf("y", "z") | "w", Either)
_ = a & 5  # pyright: ignore[reportOperatorIssue, reportUnknownVariableType]  a number is no requirement
_ = FromIssuer(["https://a", "https://b"])  # pyright: ignore[reportArgumentType]  one issuer

Scopes(routes={"GET /a": a & FromApiKey(), "GET /b": "agents:read", "GET /c": ["x", "y"], "GET /d": AnyOf("x")})
Scopes(routes={"GET /a": 5})  # pyright: ignore[reportArgumentType]  no requirement
