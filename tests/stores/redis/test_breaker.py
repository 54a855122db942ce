"""The breaker by itself: when it opens, and how long it waits."""

from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.stores.redis.breaker import Breaker


def longest_wait(low: float, high: float) -> float:
    assert low == high / 2
    return high


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    breaker = Breaker(threshold=3)
    assert [breaker.failed(), breaker.failed()] == [False, False]
    breaker.failures = 0
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [False, False, True]
    breaker.open(10)
    assert breaker.is_open
    assert not breaker.failed()
    assert breaker.close(12.5) == 2.5
    assert not breaker.is_open
    assert not breaker.failed(2)
    assert breaker.failed(64)


def test_waits_double_up_to_the_longest() -> None:
    breaker = Breaker(uniform=longest_wait)
    breaker.open(0)
    assert [round(breaker.wait(0), 3) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert breaker.until == 5.0


def test_one_that_opens_again_soon_goes_on_waiting_longer_and_later_starts_anew() -> None:
    breaker = Breaker(uniform=longest_wait)
    breaker.open(0)
    assert [breaker.wait(0) for _ in range(2)] == [0.1, 0.2]
    breaker.close(1)
    breaker.open(5)
    assert breaker.wait(5) == 0.4
    breaker.close(6)
    breaker.open(12)
    assert breaker.wait(12) == 0.1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0, 1e9))
def test_every_wait_is_within_its_bounds(draws: list[float], now: float) -> None:
    random = iter(draws)
    breaker = Breaker(uniform=lambda low, high: low + (high - low) * next(random))
    breaker.open(now)
    for number in range(len(draws)):
        most = min(5.0, 0.1 * 2**number)
        assert most / 2 <= breaker.wait(now) <= most
        assert breaker.until >= now
