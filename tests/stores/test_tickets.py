"""Tickets: what a record keeps of a caller, and the store in this process."""

import json
import sys
import threading
import time
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from sigil_policy.core.facts import Principal
from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.tickets import (
    MAX_RECORD,
    MemoryTickets,
    Ticket,
    is_ticket,
    new_ticket,
    ticket_digest,
)
from sigil_policy.stores.urls import ticket_store

CLAIMS = MappingProxyType(
    {
        "jti": "t1",
        "iat": 1_700_000_000,
        "aud": ("a", "b"),
        "cnf": MappingProxyType({"jkt": "x"}),
        "n": [1.5, None, True],
    }
)
ANN = Principal(
    subject="ann",
    scopes=frozenset(("read", "write")),
    tier="pro",
    kind="bearer",
    issuer="https://a.example",
    realm="api",
    claims=CLAIMS,
    expires=1_700_000_300.5,
)
KEPT = ("subject", "scopes", "tier", "kind", "issuer", "realm", "expires", "key")


def issue(
    store: MemoryTickets, name: str, *, holder: str = "ann", most: int = 10, ttl: float = 30, now: float = 0
) -> Any:
    return store.issue(ticket_digest(name), name.encode(), holder=holder, most=most, ttl=ttl, now=now)


def redeem(store: MemoryTickets, name: str, now: float = 0) -> Any:
    return store.redeem(ticket_digest(name), now)


# --- tickets and records ----------------------------------------------------------------------------------------------


def test_a_ticket_is_256_random_bits_in_characters_that_need_no_encoding() -> None:
    tickets = {new_ticket() for _ in range(100)}
    assert len(tickets) == 100
    assert all(is_ticket(text.encode()) and len(text) == len("wst_") + 43 for text in tickets)


@pytest.mark.parametrize("text", [b"", b"wst_", b"wst_" + b"a" * 42, b"wst_" + b"a" * 44, b"wst_" + b"a" * 42 + b"=",
                                  b"sk__" + b"a" * 43, b"wst_" + b"a" * 43 + b"\n", b"\xff" * 47])  # fmt: skip
def test_other_texts_are_no_tickets(text: bytes) -> None:
    assert not is_ticket(text)


def test_a_record_keeps_the_caller_and_its_claims_cannot_be_changed() -> None:
    ticket = Ticket.decode(Ticket(ANN, "https://app.example", "admin").encode())
    assert ticket is not None
    assert (ticket.origin, ticket.audience) == ("https://app.example", "admin")
    found = ticket.principal
    assert [getattr(found, name) for name in KEPT] == [getattr(ANN, name) for name in KEPT]
    assert found.claims == {**CLAIMS, "n": (1.5, None, True)}
    for claims in (found.claims, found.claims["cnf"]):
        with pytest.raises(TypeError):
            claims["x"] = 1
    assert found.claims["aud"] == ("a", "b")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


def plain(value: Any) -> Any:
    if isinstance(value, MappingProxyType):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


# Small enough that every one of them may be written: no more than 32 doubles, and no more than 4 KiB.
@given(
    st.dictionaries(st.text(max_size=8), JSON, max_size=2),
    st.none() | st.floats(0, 4e9),
    st.sets(st.text(max_size=9), max_size=9),
)
def test_any_claims_come_back_as_they_were(claims: Any, expires: Any, scopes: Any) -> None:
    caller = Principal(subject="ann", scopes=frozenset(scopes), claims=claims, expires=expires, kind="api_key")
    ticket = Ticket.decode(Ticket(caller).encode())
    assert ticket is not None
    assert plain(ticket.principal.claims) == claims
    assert (ticket.principal.expires, ticket.principal.scopes, ticket.principal.kind) == (expires, scopes, "api_key")


@pytest.mark.parametrize(
    "claims",
    [
        {"x": "a" * MAX_RECORD}, {"x": object()}, {"x": float("nan")}, {"x": float("inf")}, {"x": b"secret"},
        {"x": "\ud800"}, {"x": [[]] * 600}, {"x": "[" * 600}, {"x": [1.5] * 33}, {"x": [1] * 400},
        {1: "x", "1": "y"}, {"x": set()},
    ],
)  # fmt: skip
def test_what_cannot_be_read_back_is_not_written(claims: Any) -> None:
    with pytest.raises(ValueError, match="no JSON, or has more than") as caught:
        Ticket(Principal(subject="ann", claims=claims)).encode()
    assert "secret" not in str(caught.value)


def nested(depth: int) -> Any:
    return {"x": nested(depth - 1)} if depth else {}


def test_claims_that_are_nested_too_deeply_are_not_written() -> None:
    with pytest.raises(ValueError, match="no JSON"):
        Ticket(Principal(subject="ann", claims=nested(sys.getrecursionlimit() - 200))).encode()


GOOD = json.loads(Ticket(ANN).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2}, {"version": None}, {"subject": ""}, {"subject": None}, {"subject": 5}, {"scopes": "read"},
        {"scopes": [1]}, {"tier": 5}, {"kind": None}, {"issuer": []}, {"realm": None}, {"claims": []},
        {"claims": None}, {"expires": "soon"}, {"expires": True}, {"origin": 1}, {"audience": {}}, {"more": 1},
    ],
)  # fmt: skip
def test_a_record_of_another_shape_is_none(changes: Any) -> None:
    assert Ticket.decode(json.dumps(GOOD).encode()) is not None
    assert Ticket.decode(json.dumps({**GOOD, **changes}).encode()) is None


@pytest.mark.parametrize(
    "record", [b"", b"{}", b"[]", b"null", b"\xff", b"{", json.dumps(GOOD).encode()[:-1] + b',"subject":"bob"}',
               json.dumps(GOOD).encode() + b" " * MAX_RECORD, b"[" * 5_000],
)  # fmt: skip
def test_what_is_no_record_is_none(record: bytes) -> None:
    assert Ticket.decode(record) is None


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.text(max_size=5), st.lists, max_leaves=5).map(repr).map(str.encode)
)
def test_no_record_is_an_error(record: bytes) -> None:
    assert Ticket.decode(record) is None


# --- the store in this process ----------------------------------------------------------------------------------------


def test_a_ticket_holds_once_and_not_after_its_time() -> None:
    store = MemoryTickets()
    assert issue(store, "a") == 0
    assert redeem(store, "a", 29.9) == b"a"
    assert redeem(store, "a", 29.9) is None
    assert issue(store, "b") == 0
    assert redeem(store, "b", 30) is None
    assert redeem(store, "b", 1) is None, "it is gone"
    assert redeem(store, "never was") is None


def test_a_caller_has_so_many_and_no_one_elses_count() -> None:
    store = MemoryTickets()
    assert [issue(store, f"a{number}", most=3, ttl=30 + number) for number in range(3)] == [0, 0, 0]
    assert issue(store, "a3", most=3, now=10) == 20, "until the first of them ends"
    assert issue(store, "b", holder="bob", most=1) == 0
    assert redeem(store, "a3") is None, "what was refused is no ticket"
    assert redeem(store, "a1", 10) == b"a1"
    assert issue(store, "a4", most=3, now=10) == 0
    assert issue(store, "a5", most=3, now=10) == 20
    assert issue(store, "a6", most=3, now=30) == 0, "the first has ended"


def test_a_full_store_forgets_nothing_to_make_room() -> None:
    store = MemoryTickets(max_tickets=2)
    issue(store, "a"), issue(store, "b", holder="bob", ttl=300)
    with pytest.raises(StoreUnavailableError) as caught:
        issue(store, "c", holder="cleo", now=10)
    assert caught.value.retry_after == 20
    assert redeem(store, "a", 10) == b"a"
    assert issue(store, "c", holder="cleo", now=10) == 0
    assert redeem(store, "b", 10) == b"b"


def test_a_full_store_has_room_once_tickets_have_ended() -> None:
    store = MemoryTickets(max_tickets=500)
    for number in range(500):
        issue(store, f"x{number}", holder=str(number))
    assert issue(store, "late", holder="late", now=31) == 0
    for number in range(10):
        redeem(store, "nothing", 31 + number)
    assert len(store) == 1
    redeem(store, "nothing", 100)
    assert (len(store), store._holders, store._ends) == (0, {}, {})


def test_of_many_threads_one_gets_the_ticket() -> None:
    store = MemoryTickets()
    for number in range(50):
        issue(store, str(number), holder=str(number))
    got: list[Any] = []
    start = threading.Barrier(8)

    def take() -> None:
        start.wait()
        got.extend(found for number in range(50) if (found := redeem(store, str(number), 1)))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted(str(number).encode() for number in range(50))


def test_ten_thousand_tickets_that_end_at_once_stall_nobody() -> None:
    store = MemoryTickets()
    usual, costs = [], []
    for number in range(10_000):
        begin = time.thread_time()
        issue(store, f"x{number}", holder=str(number))
        usual.append(time.thread_time() - begin)
    for number in range(50):
        before, begin = len(store), time.thread_time()
        issue(store, f"y{number}", holder=f"y{number}", now=31)
        costs.append(time.thread_time() - begin)
        assert 0 < before - len(store) < 100, "some are forgotten each time, and never all at once"
    # Each forgets as many: what the quicker ones cost is the work, and the rest is a machine that is busy.
    assert sorted(costs)[10] < 200 * sorted(usual)[2_000]


def test_nothing_is_shown_and_wrong_options_are_refused() -> None:
    store = MemoryTickets()
    issue(store, "canary")
    assert repr(store) == "MemoryTickets(1 tickets)"
    with pytest.raises(ValueError, match="max_tickets"):
        MemoryTickets(max_tickets=0)


def test_one_url_is_one_store() -> None:
    one, other = ticket_store("redis://tickets.example:6379/3"), ticket_store("redis://tickets.example:6379/3")
    assert one is other
    with pytest.raises(ValueError, match=r"URL|redis"):
        ticket_store("nothing://x")


class Tickets(RuleBasedStateMachine):
    """The store beside a plain list of what was issued."""

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryTickets(max_tickets=6)
        self.now = 0.0
        self.known: dict[str, tuple[str, float]] = {}
        self.count = 0

    @property
    def living(self) -> dict[str, tuple[str, float]]:
        return {name: entry for name, entry in self.known.items() if entry[1] > self.now}

    @rule(holder=st.sampled_from("abc"), most=st.integers(1, 3), ttl=st.sampled_from([0.0, 0.5, 1.0, 2.5, 30.0]))
    def issue(self, holder: str, most: int, ttl: float) -> None:
        self.count += 1
        name = str(self.count)
        ends = [end for owner, end in self.living.values() if owner == holder]
        if len(ends) >= most:
            assert issue(self.store, name, holder=holder, most=most, ttl=ttl, now=self.now) == min(ends) - self.now
        elif len(self.living) < 6:
            try:
                assert issue(self.store, name, holder=holder, most=most, ttl=ttl, now=self.now) == 0
            except StoreUnavailableError:
                # What has ended within this second may take room until it is over.
                assert len(self.store) == 6
            else:
                self.known[name] = (holder, self.now + ttl)

    @rule(pick=st.integers(0, 20))
    def redeem(self, pick: int) -> None:
        name = str(pick)
        expected = name.encode() if name in self.living else None
        assert redeem(self.store, name, self.now) == expected
        self.known.pop(name, None)

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def bounded_and_consistent(self) -> None:
        store = self.store
        assert len(self.living) <= len(store) <= 6
        assert sorted(digest for own in store._holders.values() for digest in own) == sorted(store._entries)
        assert sorted(digest for own in store._ends.values() for digest in own) == sorted(store._entries)
        assert all(store._holders.values()) and all(store._ends.values())


def test_it_does_what_a_plain_list_would() -> None:
    run_state_machine_as_test(Tickets, settings=settings(max_examples=60, stateful_step_count=40))
