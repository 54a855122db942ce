"""Used names of a process: each passes once, nothing is forgotten too early, and everything in the end."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.stores.limits import StoreUnavailableError
from sigil_policy.stores.replays import MemoryReplays, ReplaysFullError
from sigil_policy.stores.urls import replay_store


def test_a_name_passes_once_until_its_time_is_over():
    replays = MemoryReplays()
    assert replays.claim(b"a", 10.0, 1_000.0)
    assert replays.claim(b"b", 10.0, 1_000.0)
    for now in (1_000.0, 1_009.999):
        assert not replays.claim(b"a", 10.0, now)
    assert replays.claim(b"a", 10.0, 1_010.0)
    assert not replays.claim(b"a", 10.0, 1_010.0)


def test_a_refused_claim_prolongs_nothing():
    replays = MemoryReplays()
    assert replays.claim(b"a", 10.0, 0.0)
    assert not replays.claim(b"a", 10.0, 9.0)
    assert replays.claim(b"a", 10.0, 10.0)


def test_nothing_is_forgotten_to_make_room():
    replays = MemoryReplays(max_entries=3)
    for number in range(3):
        assert replays.claim(b"%d" % number, 60.0, float(number))
    with pytest.raises(ReplaysFullError) as full:
        replays.claim(b"new", 60.0, 10.0)
    assert isinstance(full.value, StoreUnavailableError)
    assert full.value.retry_after == 50.0, "then the first one ends"
    assert not any(replays.claim(b"%d" % number, 60.0, 10.0) for number in range(3)), (
        "what is used is known all the same"
    )
    assert replays.claim(b"new", 60.0, 60.0)
    assert len(replays) == 3


def test_what_has_ended_is_forgotten():
    replays = MemoryReplays()
    for number in range(1_000):
        assert replays.claim(b"%d" % number, 5.0, number / 100)
    assert len(replays) <= 501
    for number in range(150):
        assert replays.claim(b"later %d" % number, 5.0, 1_000.0)
    assert len(replays) == 150
    assert len(replays._line) == 150


def test_many_threads_that_claim_one_name_have_it_once():
    replays = MemoryReplays()
    ready = threading.Barrier(8)
    won: list[int] = []

    def claim() -> None:
        ready.wait()
        won.extend(number for number in range(500) if replays.claim(b"%d" % number, 60.0, 0.0))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(500))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, 5.0]), st.sampled_from([0.0, 0.5, 3.0])), max_size=60)
)
def test_a_name_never_passes_twice_within_its_time(claims):
    replays, now, until = MemoryReplays(), 0.0, {}
    for name, seconds, later in claims:
        now += later
        passed = replays.claim(b"%d" % name, seconds, now)
        if passed:
            assert until.get(name, 0.0) <= now
            until[name] = now + seconds
        assert len(replays) == len(replays._line) <= 5


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="at least 1"):
        MemoryReplays(max_entries=0)
    with pytest.raises(ValueError, match="scheme"):
        replay_store("https://replays.example")


def test_a_repr_says_how_many():
    replays = MemoryReplays()
    replays.claim(b"canary-name", 1.0, 0.0)
    assert repr(replays) == "MemoryReplays(1 entries)"


def test_policies_that_name_one_url_share_a_store():
    url = "redis://replays.invalid:6379/0"
    assert replay_store(url) is replay_store(url)
