"""A bare callable has the same policies around it."""

from itertools import count

import pytest

from examples.plain_asgi import app
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio

# A second has one request of each.
ADDRESSES = (f"198.51.100.{number}" for number in count(1))


async def test_it_greets_with_an_id_a_budget_and_a_tag():
    sent = await drive(app, client=(next(ADDRESSES), 1))
    assert (sent.status, sent.body) == (200, b"Hello, world!")
    assert sent.header("x-request-id")
    assert sent.header("x-tokens-used") == "5"
    again = await drive(app, client=(next(ADDRESSES), 1), headers={"if-none-match": sent.header("etag")})
    assert (again.status, again.body) == (304, b"")


async def test_the_impatient_get_a_problem():
    address = next(ADDRESSES)
    for _ in range(101):  # more than an hour has, however long each of them takes
        sent = await drive(app, client=(address, 1))
        if sent.status == 429:
            break
    assert sent.status == 429
    assert sent.header("content-type") == "application/problem+json"
    assert int(sent.header("retry-after")) >= 1
