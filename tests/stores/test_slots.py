"""A store of slots keeps its promise, against a model that is exact, naive and slow."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Barrier, Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.stores.slots import Claim, MemorySlots, Refusal, Slot, SlotStore

TTL = 15.0
NOW = 1_700_000_000.0


def take(store: MemorySlots, *claims: tuple[str, int]) -> Slot | Refusal:
    return store.take(tuple(Claim(*claim) for claim in claims), TTL, NOW)


def taken(store: MemorySlots, *claims: tuple[str, int]) -> Slot:
    slot = take(store, *claims)
    assert isinstance(slot, Slot)
    return slot


@contextmanager
def impatient_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


KEYS = ("a", "b", "c")
CLAIMS = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 4)), min_size=1, max_size=3, unique_by=lambda c: c[0])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), CLAIMS),
        st.tuples(st.just("hold"), CLAIMS),
        st.tuples(st.just("give back"), st.integers(0, 30)),
    ),
    max_size=60,
)


@given(STEPS)
def test_any_interleaving_agrees_with_a_list_of_what_is_in_flight(steps: list[tuple[str, Any]]) -> None:
    store: SlotStore = MemorySlots()
    flying: list[tuple[str, ...]] = []
    slots: list[tuple[Slot, tuple[str, ...]]] = []
    for step, detail in steps:
        if step == "give back":
            if slots:
                slot, keys = slots[detail % len(slots)]
                if slot.open:
                    flying.remove(keys)
                # Also a second time.
                assert store.give_back(slot) is None
                assert not slot.open
        else:
            claims = tuple(Claim(*claim) for claim in detail)
            keys = tuple(claim.key for claim in claims)
            counts = tuple(sum(key in others for others in flying) for key in keys)
            full = tuple(i for i, claim in enumerate(claims) if counts[i] >= claim.limit)
            answer = store.take(claims, TTL, NOW) if step == "take" else store.hold(claims, TTL)
            if full and step == "take":
                assert answer == Refusal(counts, full)
            else:
                assert isinstance(answer, Slot)
                assert answer.in_flight == tuple(count + 1 for count in counts)
                flying.append(keys)
                slots.append((answer, keys))
        for key in KEYS:
            assert isinstance(store, MemorySlots) and store.in_flight(key) == sum(key in keys for keys in flying)
    for slot, _ in slots:
        store.give_back(slot)
    assert len(store) == 0


def test_what_one_claim_refuses_takes_no_place_under_any() -> None:
    store = MemorySlots()
    taken(store, ("route", 1))
    for _ in range(3):
        assert take(store, ("alice", 2), ("route", 1)) == Refusal((0, 1), (1,))
    assert store.in_flight("alice") == 0
    assert take(store, ("route", 1), ("route-2", 1), ("alice", 2)) == Refusal((1, 0, 0), (0,))
    assert len(store) == 1


def test_a_lower_limit_ends_nothing_and_refuses_until_enough_has_ended() -> None:
    store = MemorySlots()
    slots = [taken(store, ("alice", 5)) for _ in range(5)]
    assert take(store, ("alice", 2)) == Refusal((5,), (0,))
    for slot in slots[:4]:
        assert not isinstance(take(store, ("alice", 2)), Slot)
        store.give_back(slot)
    assert taken(store, ("alice", 2)).in_flight == (2,)


def test_what_is_held_counts_over_the_limit() -> None:
    store = MemorySlots()
    taken(store, ("alice", 1))
    held = store.hold((Claim("alice", 1),), TTL)
    assert held.in_flight == (2,)
    store.give_back(held)
    assert store.in_flight("alice") == 1


def test_a_key_is_known_while_something_is_in_flight_under_it() -> None:
    """A million names that came by leave nothing."""
    store = MemorySlots()
    for number in range(10_000):
        store.give_back(taken(store, (f"caller {number}", 2), ("route", 9)))
    assert len(store) == 0
    slots = [taken(store, (f"caller {number}", 2)) for number in range(1_000)]
    assert len(store) == 1_000
    for slot in slots:
        store.give_back(slot)
    assert len(store) == 0


def test_a_repr_names_no_caller() -> None:
    store = MemorySlots()
    slot = taken(store, ("alice@example.com", 2))
    assert "alice" not in repr(slot) + repr(store)
    assert repr(slot) == "Slot(1 claims, in_flight=(1,), open=True)"


@pytest.mark.parametrize("twice", [False, True], ids=["once", "given back twice"])
def test_several_threads_never_exceed_the_limit_and_lose_no_place(twice: bool) -> None:
    store = MemorySlots()
    start = Barrier(4)
    most: list[int] = []
    inside: list[int] = []

    def hammer(number: int) -> None:
        start.wait()
        seen = 0
        for _ in range(3_000):
            slot = take(store, ("shared", 3), (f"own {number}", 1))
            if isinstance(slot, Slot):
                inside.append(number)
                seen = max(seen, len(inside))
                inside.remove(number)
                store.give_back(slot)
                if twice:
                    store.give_back(slot)
        most.append(seen)

    with impatient_threads():
        threads = [Thread(target=hammer, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
    assert len(most) == 4
    assert 1 <= max(most) <= 3
    assert len(store) == 0
