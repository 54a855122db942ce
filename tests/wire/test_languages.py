"""Accept-Language: weights (RFC 9110 section 12.4.2) and lookup (RFC 4647 section 3.4)."""

import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.languages import is_language, look_up, weighted


@pytest.mark.parametrize(
    ("field", "available", "found"),
    [
        (b"de", ("en", "de"), "de"),
        (b"de-CH", ("en", "de"), "de"),
        (b"DE-ch", ("en", "de"), "de"),
        (b"en;q=0.5, de", ("en", "de"), "de"),
        (b"en;q=0.5, de;q=0.4", ("en", "de"), "en"),
        (b"fr, de;q=0.1", ("en", "de"), "de"),
        (b"fr", ("en", "de"), None),
        (b"*", ("en", "de"), None),
        (b"", ("en", "de"), None),
        (b"de;q=0", ("en", "de"), None),
        (b"de-CH, de;q=0", ("en", "de"), None),
        (b"de;q=2, en;q=0.1", ("en", "de"), "en"),
        (b"zh-Hant-CN-x-private1-private2", ("zh-Hant",), "zh-Hant"),
        (b"zh-Hant-CN-x-private1-private2", ("zh-Hant-CN-x",), None),
        (b"de", ("de-CH",), None),
        (b"pt-BR", ("pt", "pt-BR"), "pt-BR"),
    ],
)
def test_the_best_tag_that_there_is(field: bytes, available: tuple[str, ...], found: str | None) -> None:
    """RFC 4647 section 3.4: shortened from the end, a single letter with what it introduces."""
    assert look_up(field, available) == found


def test_members_come_in_the_order_of_their_weights() -> None:
    assert weighted(b"text/html;level=1;q=0.5, */*;q=0.1 , application/json") == (
        ("application/json", 1.0),
        ("text/html", 0.5),
        ("*/*", 0.1),
    )


@pytest.mark.parametrize("tag", ["de", "pt-BR", "zh-Hant-TW", "x-own"])
def test_what_is_a_tag(tag: str) -> None:
    assert is_language(tag)


@pytest.mark.parametrize("tag", ["", "de_CH", "german-", "-de", "toolonglanguage", "de\r\nx: y", "a" * 65])
def test_what_is_no_tag(tag: str) -> None:
    """RFC 5646 section 2.1; nothing of it could break a header."""
    assert not is_language(tag)


@given(st.binary(max_size=80))
def test_no_field_is_an_error(field: bytes) -> None:
    assert look_up(field, ("de", "en")) in (None, "de", "en")


def test_a_huge_field_is_cheap() -> None:
    taken = []
    for number in range(5):  # what was looked up before is remembered
        field = b"x%d," % number + b"de-" * 100_000 + b"," * 100_000
        started = time.thread_time()
        look_up(field, ("en",))
        taken.append(time.thread_time() - started)
    assert min(taken) < 0.02, "the quickest: what else the machine does is not counted"


def test_a_member_that_is_cut_off_is_not_another_one() -> None:
    """Of a long field the first 1,024 bytes count, whole members of them."""
    ranges = b",".join(b"x%d;q=0.1" % number for number in range(31))
    padding = b" " * (1_024 - len(ranges) - 3)
    assert look_up(ranges + b"," + padding + b"de", ("de",)) == "de"
    assert look_up(ranges + b"," + padding + b"de-CH-1996", ("de",)) is None
    assert weighted(b"de" + b"x" * 2_000) == ()


def test_what_clients_send_is_not_kept_as_it_is() -> None:
    """A cache of fields as long as servers take them would hold 16 MB of what anybody likes."""
    tracemalloc.start()
    try:
        for number in range(300):
            field = b"de, " + b"%05d" % number + b"," * 60_000
            assert look_up(field, ("de", "en")) == "de" and weighted(field)
        assert tracemalloc.get_traced_memory()[0] < 4_000_000
    finally:
        tracemalloc.stop()
