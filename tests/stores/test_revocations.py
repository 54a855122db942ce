"""The store of revocations in this process: what is revoked, for how long, and that nothing is forgotten for room."""

import inspect
import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.stores.redis.revocations import RedisRevocations
from sigil_policy.stores.revocations import (
    MARGIN,
    MemoryRevocations,
    RevocationsFullError,
    RevocationStore,
    Revoked,
    entry_names,
)
from sigil_policy.stores.urls import revocation_store
from sigil_policy.testing import FrozenClock

pytestmark = pytest.mark.anyio

NOW = 1_700_000_000.0
HERE, THERE = "https://a.example", "https://b.example"


def revoked(store: Any, *, now: float = NOW, **token: Any) -> bool:
    known = {"jti": "t1", "subject": "ann", "issuer": HERE, "issued": NOW - 100, **token}
    return bool(store.revoked(**known, now=now))


def make(**options: Any) -> MemoryRevocations:
    return MemoryRevocations(**{"clock": FrozenClock(NOW), **options})


async def test_nothing_is_revoked_at_first() -> None:
    assert not revoked(make())


@pytest.mark.parametrize(
    ("what", "met", "not_met"),
    [
        ({"jti": "t1"}, [{}, {"issuer": THERE}, {"issuer": None}], [{"jti": "t2"}, {"jti": None}]),
        ({"jti": "t1", "issuer": HERE}, [{}, {"subject": "bob"}], [{"issuer": THERE}, {"issuer": None}]),
        ({"subject": "ann"}, [{}, {"issuer": THERE}, {"jti": None, "issuer": None}], [{"subject": "bob"}]),
        ({"subject": "ann", "issuer": HERE}, [{}, {"jti": None}], [{"issuer": THERE}, {"issuer": None}]),
        ({"issuer": HERE}, [{}, {"subject": "bob"}], [{"issuer": THERE}, {"issuer": None}]),
        ({}, [{}, {"issuer": None, "jti": None}], []),
    ],
)
async def test_what_is_named_is_met_and_nothing_else(what: Any, met: list[Any], not_met: list[Any]) -> None:
    store = make()
    await store.revoke(**what)
    assert all(revoked(store, **token) for token in met)
    assert not any(revoked(store, **token) for token in not_met)
    assert await store.restore(**what)
    assert not any(revoked(store, **token) for token in met)
    assert not await store.restore(**what)


async def test_what_was_issued_before_the_moment_and_nothing_later() -> None:
    store = make()
    await store.revoke(subject="ann", issued_before=NOW - 50)
    assert revoked(store, issued=NOW - 51) and revoked(store, issued=None), "without a date it is old"
    assert not revoked(store, issued=NOW - 50) and not revoked(store, issued=NOW)


async def test_an_entry_ends_a_margin_after_its_token() -> None:
    store = make()
    await store.revoke(jti="t1", until=NOW + 10)
    assert revoked(store, now=NOW + 10 + MARGIN - 0.1)
    assert not revoked(store, now=NOW + 10 + MARGIN)


async def test_revoking_again_takes_nothing_back() -> None:
    store = make()
    await store.revoke(subject="ann", issued_before=NOW - 10, until=NOW + 500)
    await store.revoke(subject="ann", issued_before=NOW - 90, until=NOW + 5)
    assert revoked(store, issued=NOW - 20, now=NOW + 400)
    await store.revoke(subject="ann")
    await store.revoke(subject="ann", issued_before=NOW - 90, until=NOW)
    assert revoked(store, issued=NOW + 9_999, now=NOW + 99_999_999)
    assert await store.restore(subject="ann")
    assert not revoked(store), "both are taken back"


async def test_a_log_out_does_not_prolong_a_suspension() -> None:
    """What is revoked altogether for a while, and what was issued before a moment, end each at its own time."""
    clock = FrozenClock(NOW)
    store = make(clock=clock)
    await store.revoke(subject="ann", until=NOW + 600)
    await store.revoke(subject="ann", issued_before=NOW)
    later = NOW + 600 + MARGIN
    assert revoked(store, issued=NOW + 1, now=later - 1) and not revoked(store, issued=NOW + 1, now=later)
    assert revoked(store, issued=NOW - 1, now=later)


async def test_what_has_ended_is_not_merged_into_what_is_new() -> None:
    clock = FrozenClock(NOW)
    store = make(clock=clock)
    await store.revoke(subject="ann", issued_before=NOW + 50_000, until=NOW)
    clock.advance(MARGIN)
    await store.revoke(subject="ann", issued_before=NOW)
    assert not revoked(store, issued=NOW + 1, now=clock.time())


async def test_a_full_store_refuses_and_forgets_nothing_that_holds() -> None:
    clock = FrozenClock(NOW)
    store = make(max_entries=50, clock=clock)
    for number in range(50):
        await store.revoke(jti=f"t{number}", until=NOW + 10 * number)
    with pytest.raises(RevocationsFullError):
        await store.revoke(jti="one more", until=NOW + 5)
    assert all(revoked(store, jti=f"t{number}") for number in range(50))
    await store.revoke(jti="t7", until=NOW + 999)  # known already
    clock.advance(100 + MARGIN)
    await store.revoke(jti="one more", until=clock.time() + 5)
    assert revoked(store, jti="one more", now=clock.time()) and len(store) <= 50


async def test_what_has_ended_is_forgotten_as_others_come() -> None:
    clock = FrozenClock(NOW)
    store = make(clock=clock)
    for number in range(20_000):
        await store.revoke(jti=f"t{number}", until=clock.time() + 10)
        clock.advance(1)
    assert len(store) < 1_000


@given(st.lists(st.tuples(*[st.none() | st.text(alphabet="a:1*", min_size=1, max_size=3)] * 3), max_size=6))
def test_no_name_is_anothers(whats: list[Any]) -> None:
    """Whatever texts hold: lengths, colons, the words of other kinds."""
    whats = [(jti, None if jti else subject, issuer) for jti, subject, issuer in whats]
    for one, other in itertools.combinations(whats, 2):
        names = entry_names(*one) + entry_names(*other)
        assert (entry_names(*one) == entry_names(*other)) == (one == other)
        assert len(set(names)) == len(names) / (2 if one == other else 1)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ({"jti": ""}, "jti"),
        ({"jti": "x" * 9_000}, "jti"),
        ({"subject": 5}, "subject"),
        ({"jti": "a", "subject": "b"}, "one of them"),
        ({"jti": "a", "issued_before": NOW}, "one token"),
        ({"subject": "a", "issued_before": float("nan")}, "moment"),
        ({"subject": "a", "until": -1}, "moment"),
        ({"subject": "a", "until": float("inf")}, "moment"),
    ],
)
async def test_what_names_nothing_is_refused(what: Any, words: str) -> None:
    store = make()
    with pytest.raises(ValueError, match=words):
        await store.revoke(**what)
    assert len(store) == 0


def test_others_may_look_while_entries_change() -> None:
    """A look-up takes no lock: what is revoked is found at every moment of a change."""
    entries = Revoked()
    from sigil_policy.stores.revocations import Entry

    seen = []

    class Watching(dict[Any, Any]):
        def __setitem__(self, name: Any, entry: Any) -> None:
            super().__setitem__(name, entry)
            seen.append("Sann" in self)

        def pop(self, name: Any, *default: Any) -> Any:
            found = super().pop(name, *default)
            seen.append("Sann" in self)
            return found

    entries._entries = Watching()
    entries.put("Sann", Entry(NOW, NOW + 9_999), NOW)
    for number in range(20):
        entries.put("Sann", Entry(NOW, NOW + 9_999), NOW, instead=bool(number % 2))
        entries.put(f"S{number}", Entry(NOW, NOW + number), NOW + number)
        entries.sweep(NOW + number / 3, 3)
    assert all(seen) and len(seen) > 40


def test_both_stores_have_all_of_the_protocol() -> None:
    for name, wanted in inspect.getmembers(RevocationStore, inspect.isfunction):
        if name.startswith("_"):
            continue
        for kind in (MemoryRevocations(), RedisRevocations("redis://localhost:1")):
            given = inspect.signature(getattr(kind, name)).parameters
            assert set(inspect.signature(wanted).parameters) - {"self"} == set(given), name


def test_stores_are_found_by_url_and_share_a_connection() -> None:
    from sigil_policy.stores.urls import slot_store

    url = "redis://:hunter2@localhost:1/4"
    store = revocation_store(url)
    assert store is revocation_store(url)
    assert store.link is slot_store(url).link  # type: ignore[attr-defined]
    assert "hunter2" not in repr(store)
    with pytest.raises(ValueError, match=r"(?i)url|scheme"):
        revocation_store("http://localhost")


def test_options_that_cannot_be() -> None:
    for options in ({"max_entries": 0}, {"page": 0}, {"page": 9_999}, {"prefix": "a b"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            RedisRevocations("redis://localhost:1", **options)
    with pytest.raises(ValueError, match="max_entries"):
        MemoryRevocations(max_entries=0)
