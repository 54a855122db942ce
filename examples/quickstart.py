"""A protected service in fifteen lines.

export SECRET=$(python -c "import secrets; print(secrets.token_hex(32))")
uvicorn examples.quickstart:app &
curl -i localhost:8000/hello                                     # 401, and how to do better
TOKEN=$(python -c "import jwt, os, time; print(jwt.encode({
    'iss': 'https://auth.example.com', 'aud': 'hello', 'sub': 'ada', 'scope': 'hello:read',
    'exp': int(time.time()) + 3600}, os.environ['SECRET'], 'HS256'))")
curl -i localhost:8000/hello -H "Authorization: Bearer $TOKEN"   # 200, with an id, limits and an ETag
"""
# ruff: noqa: I001
# fmt: off

import os
from fastapi import FastAPI, Request
from pydantic import SecretStr
import sigil_policy as sigil

key = sigil.Key(algorithm="HS256", secret=SecretStr(os.environ["SECRET"]))
issuer = sigil.Issuer(url="https://auth.example.com", audience="hello", keys=[key])

app = FastAPI()
app.add_middleware(sigil.PolicyStack, policies=[
    sigil.RequestID(), sigil.AccessLog(), sigil.Problems(),
    sigil.BearerAuth(issuers=[issuer]), sigil.Scopes(routes={"GET /hello": "hello:read"}),
    sigil.RateLimit(), sigil.CacheControl(), sigil.Conditional(),
])

@app.get("/hello")
async def hello(request: Request) -> dict[str, str]:
    return {"hello": request.user.subject}
