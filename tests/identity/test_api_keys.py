"""Keys are shown once, stored as digests, found by their public id, and end when they should."""

import json
import random
import re
import string
import tempfile
import zlib
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from sigil_policy.identity.api_keys import (
    MAX_KEY,
    ApiKeyRecord,
    ApiKeyStore,
    FileApiKeyStore,
    MemoryApiKeyStore,
    ReadOnlyStoreError,
    TomlApiKeyStore,
    is_issued_id,
    key_digest,
    key_id,
    new_key,
    pepper_bytes,
)
from sigil_policy.identity.api_keys.files import as_toml
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


KEYS = st.builds(
    lambda seed, prefix: make(seed, prefix=prefix).plain.get_secret_value().encode(),
    st.integers(0, 2**32),
    st.sampled_from(["sk_live", "sk_test", "acme"]),
)
CHARACTERS = st.one_of(st.sampled_from(list(b"0aAzZ_9bB")), st.integers(0, 255)).map(lambda number: bytes([number]))


@given(key=KEYS, place=st.floats(0, 1, exclude_max=True), other=CHARACTERS)
def test_one_wrong_character_is_found_without_a_look_up(key, place, other):
    at = int(place * len(key))
    typo = key[:at] + other + key[at + 1 :]
    assert (key_id(typo) is None) == (typo != key)


@given(key=KEYS, place=st.floats(0, 1, exclude_max=True), other=CHARACTERS)
def test_one_character_too_many_or_too_few_is_found_too(key, place, other):
    at = int(place * len(key))
    for typo in (key[:at] + other + key[at:], key[:at] + key[at + 1 :]):
        assert key_id(typo) is None


@given(key=KEYS, place=st.floats(0, 1, exclude_max=True))
def test_two_swapped_characters_are_found_too(key, place):
    at = int(place * (len(key) - 1))
    typo = key[:at] + key[at + 1 : at + 2] + key[at : at + 1] + key[at + 2 :]
    assert (key_id(typo) is None) == (typo != key)


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


async def test_a_line_that_is_no_record_locks_out_nobody_else_and_is_reported_once(tmp_path):
    path, clock = tmp_path / "keys.jsonl", FrozenClock()
    first, second, third = (make(seed).record for seed in (1, 2, 3))
    store = FileApiKeyStore(path, clock=clock)
    store.append(first)
    store.append(second)
    good = path.read_bytes()
    bad = b'{"canary": true}\n'
    with structlog.testing.capture_logs() as lines:
        path.write_bytes(good + bad)
        for new in (third, make(4).record):
            clock.advance(1)
            assert await look(store, first) == first and await look(store, second) == second
            store.append(new)
            clock.advance(1)
            assert await look(store, new) == new
        assert await look(FileApiKeyStore(path, clock=clock), first) == first
    mine, theirs = lines
    assert mine == theirs and mine["event"] == "api_key_record_unreadable" and mine["where"] == "line 3"
    assert "canary" not in str(lines) and str(tmp_path) not in str(lines)


async def test_a_line_that_is_no_record_refuses_the_key_that_it_names(tmp_path):
    """It may be the one that ends this key: fail closed, for this key."""
    path, clock = tmp_path / "keys.jsonl", FrozenClock()
    first, second = make(1).record, make(2).record
    store = FileApiKeyStore(path, clock=clock)
    store.append(first)
    store.append(second)
    with path.open("a") as file:
        file.write(f'{{"id": "{first.id}", "expires": soon}}\n')
    clock.advance(1)
    with structlog.testing.capture_logs():
        assert await look(store, first) is None and await look(store, second) == second
        store.append(first)
        clock.advance(1)
        assert await look(store, first) == first, "a later line that is one holds again"


@given(st.binary(max_size=200))
def test_no_content_of_a_file_is_an_error(noise):
    with tempfile.TemporaryDirectory() as folder, structlog.testing.capture_logs():
        path, record = Path(folder) / "keys.jsonl", make().record
        path.write_bytes(noise + b"\n")
        FileApiKeyStore(path).append(record)
        assert FileApiKeyStore(path).find(record.id) == record


def test_ids_are_known_by_their_check_and_only_under_their_pepper():
    other = pepper_bytes(SecretStr("another-pepper-that-is-long-enough-too"))
    ids = [make(seed).record.id for seed in range(200)]
    assert all(is_issued_id(pepper_bytes(PEPPER), made) for made in ids)
    assert not any(is_issued_id(other, made) for made in ids)


def test_the_checksum_is_crc_32_in_base_62():
    """What a scanner computes, written down once more."""
    body, _, said = TEXT.decode().rpartition("_")
    number, digits = zlib.crc32(body.encode()), string.digits + string.ascii_uppercase + string.ascii_lowercase
    assert said == "".join(digits[number // 62**place % 62] for place in range(5, -1, -1))


async def test_a_machine_and_people_write_the_same_record(tmp_path):
    path = tmp_path / "keys.toml"
    first = make(1, expires=5e9, created=1.5, prefix="sk_test").record
    second = make(2, subject='"É\\ \U0001f511').record
    path.write_text(as_toml(first) + "\n\n" + as_toml(second) + "\n")
    store = TomlApiKeyStore(path)
    assert await store.records() == (first, second)
    for change in (store.save(make(3).record), store.end(first.id, 1.0)):
        with pytest.raises(ReadOnlyStoreError, match="by hand"):
            await change


async def test_a_table_that_is_no_record_is_passed_over(tmp_path):
    path = tmp_path / "keys.toml"
    first, second = make(1).record, make(2).record
    naive = as_toml(make(3).record) + "\nexpires = 2030-01-01T00:00:00"
    path.write_text("\n".join([as_toml(first), "canary = 1", as_toml(second), naive, "[keys.short]", "a = 1"]))
    with structlog.testing.capture_logs() as lines:
        store = TomlApiKeyStore(path)
        assert await store.records() == (second,)
        await store.records()
    assert [line["where"] for line in lines] == [
        f"[keys.{first.id}]", f"[keys.{make(3).record.id}]", "[keys.an id of another form]",
    ]  # fmt: skip
    assert "canary" not in str(lines)


async def test_moments_in_toml_have_their_offset(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(as_toml(make().record) + "\nexpires = 2027-01-31T01:00:00+01:00")
    assert (await TomlApiKeyStore(path).records())[0].expires == 1_801_353_600.0


async def test_a_file_that_is_no_toml_holds_the_keys_of_before_for_a_minute(tmp_path):
    path, clock, record = tmp_path / "keys.toml", FrozenClock(), make().record
    path.write_text(as_toml(record))
    store = TomlApiKeyStore(path, clock=clock)
    path.write_text(as_toml(record) + "\ncanary =")
    clock.advance(1)
    with structlog.testing.capture_logs() as lines:
        for _ in range(60):
            assert await look(store, record) == record
            clock.advance(1)
        with pytest.raises(ValueError, match="could not be read"):
            await look(store, record)
        with pytest.raises(ValueError, match="no TOML") as caught:
            TomlApiKeyStore(path)
    assert [line["where"] for line in lines] == ["the file"]
    assert "canary" not in f"{caught.value}{lines}"
    path.write_text(as_toml(record))
    clock.advance(1)
    assert await look(store, record) == record
