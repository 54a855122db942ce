"""A bare callable has the same policies around it."""

import pytest

from examples.plain_asgi import app
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio


async def test_it_greets_with_an_id_a_budget_and_a_tag(anyio_backend):
    # A second has one request of each.
    one, two = ("198.51.100.1", "198.51.100.2") if anyio_backend == "trio" else ("198.51.100.3", "198.51.100.4")
    sent = await drive(app, client=(one, 1))
    assert (sent.status, sent.body) == (200, b"Hello, world!")
    assert sent.header("x-request-id")
    assert sent.header("x-tokens-used") == "5"
    again = await drive(app, client=(two, 1), headers={"if-none-match": sent.header("etag")})
    assert (again.status, again.body) == (304, b"")


async def test_the_impatient_get_a_problem():
    for _ in range(5):
        sent = await drive(app, client=("198.51.100.5", 1))
        if sent.status == 429:
            break
    assert sent.status == 429
    assert sent.header("content-type") == "application/problem+json"
    assert int(sent.header("retry-after")) >= 1
