"""Fixtures for pytest, found by itself where the package is installed.

| fixture | what it is |
|---|---|
| `sigil_clock` | the machine's clock stands still: `sigil_clock.advance(60)` |
| `sigil_mint` | a `Mint`: real tokens and keys, and who accepts them |
| `sigil_issuer`, `sigil_key_store`, `sigil_pepper` | of that mint, for `BearerAuth` and `ApiKeyAuth` |
| `mint_token`, `mint_key`, `auth_headers` | its methods |
| `sigil_faulty` | `Faulty`, which makes any store fail on command |
| `assert_problem` | the assertion of that name |

    def test_writing_takes_the_scope(client, auth_headers, assert_problem):
        response = client.post("/v7/agents", headers=auth_headers(scopes=["agents:read"]))
        assert_problem(response, "AUTH_004", required_scopes=["agents:write"])

Nothing is automatic: a fixture that is not asked for does nothing, and loads nothing. `-p no:sigil_policy` leaves it
all out.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pydantic import SecretStr

    from sigil_policy.identity.api_keys import MemoryApiKeyStore
    from sigil_policy.identity.issuers import Issuer
    from sigil_policy.testing.clock import FrozenClock
    from sigil_policy.testing.credentials import Mint
    from sigil_policy.testing.faults import Faulty


@pytest.fixture
def sigil_clock() -> "Iterator[FrozenClock]":
    """The clock of every stack and store that was given none: it moves with `advance` and `jump` only.

    See `sigil_policy.testing.frozen` for what does not follow: a Redis store counts by its server's clock.
    """
    from sigil_policy.testing.clock import frozen

    with frozen() as clock:
        yield clock


@pytest.fixture
def sigil_mint() -> "Mint":
    """Makes tokens and keys; `sigil_mint.accepted_by(app)` lets an application take them."""
    from sigil_policy.testing.credentials import Mint

    return Mint()


@pytest.fixture
def sigil_issuer(sigil_mint: "Mint") -> "Issuer":
    """For `BearerAuth(issuers=[sigil_issuer])`: accepts what `mint_token` makes."""
    return sigil_mint.issuer


@pytest.fixture
def sigil_key_store(sigil_mint: "Mint") -> "MemoryApiKeyStore":
    """For `ApiKeyAuth(store=sigil_key_store, pepper=sigil_pepper)`: has what `mint_key` makes."""
    return sigil_mint.key_store


@pytest.fixture
def sigil_pepper(sigil_mint: "Mint") -> "SecretStr":
    """The pepper of `sigil_key_store`."""
    return sigil_mint.pepper


@pytest.fixture
def mint_token(sigil_mint: "Mint") -> Callable[..., str]:
    """`mint_token("user_123", scopes=["agents:read"], tier="pro", org="acme")`: see `Mint.mint_token`."""
    return sigil_mint.mint_token


@pytest.fixture
def mint_key(sigil_mint: "Mint") -> Callable[..., str]:
    """`mint_key("nightly-job", scopes=["agents:read"])`: see `Mint.mint_key`."""
    return sigil_mint.mint_key


@pytest.fixture
def auth_headers(sigil_mint: "Mint") -> Callable[..., dict[str, str]]:
    """`auth_headers(scopes=["agents:read"], tier="pro")`: see `Mint.auth_headers`."""
    return sigil_mint.auth_headers


@pytest.fixture
def sigil_faulty() -> "type[Faulty]":
    """`store = sigil_faulty(memory_limits("fixed")); store.away()`: see `Faulty`."""
    from sigil_policy.testing.faults import Faulty

    return Faulty


@pytest.fixture
def assert_problem() -> Callable[..., dict[str, Any]]:
    """`assert_problem(response, "AGT_001", status=404)`: see `sigil_policy.testing.assert_problem`."""
    from sigil_policy.testing.problems import assert_problem

    return assert_problem
