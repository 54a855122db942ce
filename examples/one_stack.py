"""One list of policies, for whichever framework: see `litestar_app`, `quart_app`, `django_app`, `falcon_app` and
`blacksheep_app`, which answer the same.

export SECRET=$(python -c "import secrets; print(secrets.token_hex(32))")
"""

import os

from pydantic import SecretStr

from sigil_policy import BearerAuth, Conditional, Issuer, Key, Problems, RateLimit, RequestID, Scopes

ISSUER, AUDIENCE = "https://auth.example.com", "reports"

issuer = Issuer(
    url=ISSUER, audience=AUDIENCE, keys=[Key(algorithm="HS256", secret=SecretStr(os.environ["SECRET"]))]
)  # fmt: skip

POLICIES = [
    RequestID(),
    Problems(),
    BearerAuth(issuers=[issuer]),
    Scopes(routes={"GET /reports/**": "reports:read"}, public=["GET /", "GET /stream"]),
    RateLimit(tiers={"free": "20/minute"}),
    Conditional(),
]
