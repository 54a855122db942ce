"""Ids in headers. Row ST-18: what is reflected holds no CR, LF, NUL or other control."""

import os
import threading
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire import ids
from sigil_policy.wire.ids import new_id, parse_id

ALLOWED = set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:-")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(b"550e8400-e29b-41d4-a716-446655440000", "550e8400-e29b-41d4-a716-446655440000", id="uuid"),
        pytest.param(b"session_abc123", "session_abc123", id="underscore"),
        pytest.param(b"2.1.0", "2.1.0", id="version"),
        pytest.param(b"urn:uuid:1", "urn:uuid:1", id="colon"),
        pytest.param(b"a", "a", id="one"),
        pytest.param(b"a" * 128, "a" * 128, id="longest"),
        pytest.param(b"", None, id="empty"),
        pytest.param(b"a" * 129, None, id="too-long"),
        pytest.param(b"a" * 10_000, None, id="ST-18-10kB"),
        pytest.param(b"a\r\nb", None, id="ST-18-crlf"),
        pytest.param(b"a\n", None, id="ST-18-trailing-lf"),
        pytest.param(b"a\x00b", None, id="ST-18-nul"),
        pytest.param(b"a\x7f", None, id="ST-18-del"),
        pytest.param(b"caf\xe9", None, id="ST-18-obs-text"),
        pytest.param("日本".encode(), None, id="utf-8"),
        pytest.param(b"a b", None, id="space"),
        pytest.param(b" a", None, id="leading-space"),
        pytest.param(b"a, b", None, id="two-lines-joined"),
        pytest.param(b"a,b", None, id="list"),
        pytest.param(b"{550e8400-e29b-41d4-a716-446655440000}", None, id="braces"),
        pytest.param(b"a%0d%0ab", None, id="ST-18-percent"),
        pytest.param(b"<script>", None, id="markup"),
        pytest.param(b"${jndi:ldap}", None, id="lookup"),
    ],
)
def test_an_id_is_1_to_128_characters_of_a_small_alphabet(value, expected):
    assert parse_id(value) == expected


@given(st.binary(max_size=140))
def test_what_is_accepted_is_what_came_and_nothing_else_is(value):
    accepted = parse_id(value)
    if accepted is None:
        assert not 1 <= len(value) <= 128 or set(value) - ALLOWED
    else:
        assert accepted.encode() == value
        assert 1 <= len(value) <= 128
        assert set(value) <= ALLOWED


def test_new_ids_are_canonical_version_4_uuids_and_never_repeat():
    made = [new_id() for _ in range(5_000)]
    assert len(set(made)) == len(made)
    for text in made:
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert parsed.version == 4
        assert parsed.variant == uuid.RFC_4122


def test_all_random_bits_are_used():
    """122 of the 128 bits take both values; the six others are the version and the variant."""
    ones, zeros = 0, 0
    for _ in range(2_000):
        value = uuid.UUID(new_id()).int
        ones |= value
        zeros |= ~value & (1 << 128) - 1
    both = ones & zeros
    assert both.bit_count() == 122
    assert ones & ~both == 4 << 76 | 2 << 62


def test_a_new_id_would_be_accepted():
    assert parse_id(new_id().encode()) is not None


def test_threads_never_share_an_id():
    made: list[str] = []

    def work():
        made.extend([new_id() for _ in range(2_000)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_makes_ids_of_its_own():
    new_id()
    if not ids._pool:  # that was the last one of a batch
        new_id()
    assert ids._pool
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, "\n".join(new_id() for _ in range(200)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        theirs = set(pipe.read().split())
    os.waitpid(child, 0)
    assert len(theirs) == 200
    assert not theirs & {new_id() for _ in range(200)}
