"""The folder that the commands share: the development secret that signs tokens, and the digests of the API keys.

    home = Home(".sigil_api")
    token = home.mint_token(subject="alice", tier="pro", scopes=["agents:read"])
    key = home.issue_key(subject="reports", tier="pro", scopes=["agents:read"])     # its only copy

A server and the commands that are given the same folder accept each other's credentials. The folder is made on first
use, for its owner only (0700, files 0600). A real service leaves tokens to its authorization server.
"""

import os
import secrets
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import jwt
from pydantic import SecretStr

from sigil_policy import FileApiKeyStore, new_key
from sigil_policy.core.clock import SYSTEM_CLOCK, Clock

ISSUER = "https://auth.sigil.acti.ai"
AUDIENCE = "sigil-api"
ALGORITHM: Literal["HS256"] = "HS256"

DEFAULT_HOME = Path(__file__).resolve().parents[2] / ".sigil_api"


class Home:
    def __init__(self, folder: str | Path = DEFAULT_HOME, clock: Clock = SYSTEM_CLOCK) -> None:
        self.folder = Path(folder)
        self.clock = clock
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.keys_file = self.folder / "api_keys.jsonl"

    def signing_secret(self) -> SecretStr:
        """What tokens are signed with."""
        return self._secret("signing_secret")

    def pepper(self) -> SecretStr:
        """What API keys are digested with: the key file alone is of no use to anybody."""
        return self._secret("pepper")

    def mint_token(self, *, subject: str, tier: str, scopes: Sequence[str], lifetime: int = 3600) -> str:
        """A JWT as the guidelines describe it, good for `lifetime` seconds (a negative one has expired already)."""
        now = int(self.clock.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "iat": min(now, now + lifetime),
            "exp": now + lifetime,
            "jti": str(uuid.uuid4()),
            "scope": " ".join(scopes),
            "tier": tier,
        }
        token: str = jwt.encode(claims, self.signing_secret().get_secret_value(), algorithm=ALGORITHM)
        return token

    def issue_key(self, *, subject: str, tier: str, scopes: Sequence[str]) -> str:
        """A new API key; its digest goes into the key file, which a running server notices within a second."""
        plain, record = new_key(pepper=self.pepper(), subject=subject, tier=tier, scopes=scopes)
        FileApiKeyStore(self.keys_file).append(record)
        return plain.get_secret_value()

    def _secret(self, name: str) -> SecretStr:
        """Made on first use; two commands that start together get the same one."""
        file = self.folder / name
        if not file.exists():
            draft = self.folder / f"{name}.{uuid.uuid4().hex}"
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
                new.write(secrets.token_hex(32))
            # Unlike a rename, a link never replaces what another process has made in the meantime.
            with suppress(FileExistsError):
                os.link(draft, file)
            draft.unlink()
        return SecretStr(file.read_text().strip())
