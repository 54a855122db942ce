"""Keys are shown once, stored as digests, found by their public id, and end when they should."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from sigil_policy.identity.api_keys import (
    MAX_KEY,
    ApiKeyRecord,
    ApiKeyStore,
    FileApiKeyStore,
    MemoryApiKeyStore,
    key_digest,
    key_id,
    new_key,
    pepper_bytes,
)
from sigil_policy.testing import FrozenClock

pytestmark = pytest.mark.anyio

PEPPER = SecretStr("canary-pepper-7d0e-which-is-long-enough")


def make(seed: int = 0, **options):
    options = {"subject": "nightly-job", "scopes": ["agents:read"], "tier": "pro", **options}
    return new_key(pepper=PEPPER, choice=random.Random(seed).choice, **options)


def test_a_key_has_prefix_id_secret_and_checksum():
    plain, record = make()
    text = plain.get_secret_value()
    assert re.fullmatch(r"sk_live_[0-9A-Za-z]{12}_[0-9A-Za-z]{32}_[0-9A-Za-z]{6}", text)
    assert key_id(text.encode()) == record.id
    assert record.digest == key_digest(pepper_bytes(PEPPER), text.encode()).hex()
    assert (record.subject, record.scopes, record.tier, record.expires) == ("nightly-job", {"agents:read"}, "pro", None)
    assert new_key(pepper=PEPPER, subject="a", prefix="acme_test").plain.get_secret_value().startswith("acme_test_")


def test_keys_differ():
    assert len({new_key(pepper=PEPPER, subject="a").plain.get_secret_value() for _ in range(50)}) == 50


def test_neither_key_nor_digest_nor_pepper_is_shown():
    """JW-32."""
    made = make()
    shown = f"{made!r} {made} {made.record} {MemoryApiKeyStore([made.record])!r}"
    for secret in (made.plain.get_secret_value(), made.record.digest, PEPPER.get_secret_value()):
        assert secret not in shown


TEXT = make().plain.get_secret_value().encode()


@given(place=st.integers(0, len(TEXT) - 1), other=st.integers(0, 255))
def test_one_wrong_character_is_found_without_a_look_up(place, other):
    typo = TEXT[:place] + bytes([other]) + TEXT[place + 1 :]
    assert (key_id(typo) is None) == (typo != TEXT)


@given(place=st.integers(0, len(TEXT) - 2))
def test_two_swapped_characters_are_found_too(place):
    typo = TEXT[:place] + TEXT[place + 1 : place + 2] + TEXT[place : place + 1] + TEXT[place + 2 :]
    assert (key_id(typo) is None) == (typo != TEXT)


@given(st.binary(max_size=MAX_KEY + 10))
def test_any_bytes_are_no_key(presented):
    assert key_id(presented) is None


@pytest.mark.parametrize(
    "presented",
    [b"", b"sk_live_abc123", TEXT + b"\n", b" " + TEXT, TEXT + TEXT, b"a" * 100_000, TEXT.replace(b"_", b"-")],
    ids=["nothing", "the guidelines' example", "line feed", "space", "twice", "huge", "dashes"],
)
def test_what_only_resembles_a_key_is_none(presented):
    assert key_id(presented) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pepper": SecretStr("canary-brief")}, "at least 32"),
        ({"scopes": "agents:read"}, "list"),
        ({"scopes": ["a b"]}, "6749"),
        ({"subject": ""}, "subject"),
        ({"subject": "a\nb"}, "subject"),
        ({"prefix": "SK-"}, "prefix"),
        ({"prefix": ""}, "prefix"),
        ({"expires": float("nan")}, "expires"),
        ({"tier": ""}, "tier"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_a_key_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        new_key(**{"pepper": PEPPER, "subject": "job", **options})
    assert "canary" not in str(caught.value)


def test_a_digest_is_a_digest():
    with pytest.raises(ValidationError, match="digest") as caught:
        ApiKeyRecord(id="a" * 12, digest=TEXT.decode(), subject="a")
    assert TEXT.decode() not in str(caught.value)


def test_a_key_expires_in_its_exact_second():
    record = make(expires=100.0).record
    assert not record.is_expired(99.9) and record.is_expired(100.0)
    assert not make().record.is_expired(1e12)


def test_memory_finds_adds_and_forgets():
    first, second = make(1).record, make(2).record
    store = MemoryApiKeyStore([first])
    assert isinstance(store, ApiKeyStore)
    assert store.find(first.id) == first and store.find(second.id) is None
    store.add(second)
    store.remove(first.id)
    assert store.find(second.id) == second and store.find(first.id) is None


async def look(store: FileApiKeyStore, record: ApiKeyRecord) -> ApiKeyRecord | None:
    found = store.find(record.id)
    return found if found is None or isinstance(found, ApiKeyRecord) else await found


async def test_a_file_of_keys_is_read_again_within_a_second(tmp_path):
    path, clock = tmp_path / "keys.jsonl", FrozenClock()
    store = FileApiKeyStore(path, clock=clock)
    first, second = make(1, expires=5e9).record, make(2, tier=None).record
    assert await look(store, first) is None, "no file, no keys"
    FileApiKeyStore(path).append(first)
    assert await look(store, first) is None, "asked at most once a second"
    clock.advance(1)
    assert await look(store, first) == first
    FileApiKeyStore(path).append(second)
    clock.advance(1)
    assert await look(store, second) == second
    assert await look(store, first) == first
    path.unlink()
    clock.advance(1)
    assert await look(store, first) is None


async def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path, clock = tmp_path / "keys.jsonl", FrozenClock()
    record = make().record
    FileApiKeyStore(path).append(record)
    store = FileApiKeyStore(path, clock=clock)
    monkeypatch.setattr(store, "_read", lambda: pytest.fail("read again"))
    for _ in range(5):
        clock.advance(1)
        assert store.find(record.id) == record


async def test_the_last_line_of_an_id_holds(tmp_path):
    path, clock = tmp_path / "keys.jsonl", FrozenClock()
    record = make().record
    store = FileApiKeyStore(path, clock=clock)
    store.append(record)
    ended = ApiKeyRecord(id=record.id, digest=record.digest, subject=record.subject, expires=1.0)
    store.append(ended)
    clock.advance(1)
    assert await look(store, record) == ended


def test_the_file_holds_digests_and_is_the_owners_alone(tmp_path):
    path = tmp_path / "keys.jsonl"
    made = make()
    FileApiKeyStore(path).append(made.record)
    text = path.read_text()
    assert made.plain.get_secret_value() not in text and made.plain.get_secret_value()[21:53] not in text
    assert json.loads(text)["digest"] == made.record.digest
    assert path.stat().st_mode & 0o077 == 0


async def test_a_line_that_an_editor_left_open_is_ended_first(tmp_path):
    path, clock = tmp_path / "keys.jsonl", FrozenClock()
    first, second = make(1).record, make(2).record
    store = FileApiKeyStore(path, clock=clock)
    store.append(first)
    path.write_text(path.read_text().rstrip("\n"))
    store.append(second)
    clock.advance(1)
    assert await look(store, first) == first and await look(store, second) == second


async def test_a_last_line_that_is_not_whole_waits(tmp_path):
    path, clock = tmp_path / "keys.jsonl", FrozenClock()
    first, second = make(1).record, make(2).record
    store = FileApiKeyStore(path, clock=clock)
    store.append(first)
    store.append(second)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    clock.advance(1)
    assert await look(store, first) == first and await look(store, second) is None
    path.write_bytes(whole)
    clock.advance(1)
    assert await look(store, second) == second


async def test_a_line_that_is_no_record_closes_the_store_until_it_is_mended(tmp_path):
    """The line could be the one that ends a key: fail closed."""
    path, clock = tmp_path / "keys.jsonl", FrozenClock()
    record = make().record
    store = FileApiKeyStore(path, clock=clock)
    store.append(record)
    clock.advance(1)
    assert await look(store, record) == record
    good = path.read_bytes()
    path.write_bytes(good + b'{"canary": true}\n')
    clock.advance(1)
    with pytest.raises(ValueError, match="line 2") as caught:
        await look(store, record)
    assert "canary" not in str(caught.value)
    for _ in range(2):
        with pytest.raises(ValueError, match="could not be read"):
            store.find(record.id)
        clock.advance(1)
    with pytest.raises(ValueError, match="line 2"):
        FileApiKeyStore(path)
    path.write_bytes(good)
    clock.advance(1)
    assert await look(store, record) == record
