"""Keys are short, say nothing of whom they are about, and are where a cluster wants them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from sigil_policy.stores.redis.keys import KeySpace
from sigil_policy.stores.redis.topology import slot_of

SPACE = KeySpace("sigil", use=b"tests")
names = st.text(st.characters(), max_size=40) | st.text("a\0{}\ud800:", max_size=6)


@given(one=names, other=names)
def test_every_string_has_a_digest_of_its_own_and_of_one_length(one: str, other: str) -> None:
    digest = SPACE.digest(one)
    assert re.fullmatch(rb"[A-Za-z0-9_-]{24}", digest)
    assert (digest == SPACE.digest(other)) == (one == other)
    assert SPACE.digest(one.encode("utf-8", "surrogatepass")) == digest


def test_digests_of_other_keys_and_other_uses_are_others() -> None:
    spaces = [
        SPACE,
        KeySpace("sigil", use=b"others"),
        KeySpace("sigil", SecretStr("one"), use=b"tests"),
        KeySpace("sigil", SecretStr("two"), use=b"tests"),
    ]
    assert len({space.digest("ann") for space in spaces}) == 4
    assert KeySpace("other", use=b"tests").digest("ann") == SPACE.digest("ann"), "a prefix is in the key already"


def test_keys_together_are_in_one_slot_of_a_cluster_and_keys_apart_are_not() -> None:
    assert SPACE.together("c") == b"sigil:1:c:{sigil}"
    assert len({slot_of(SPACE.together(kind) + b":%d" % number) for kind in "cd" for number in range(50)}) == 1
    apart = [SPACE.apart("f") + SPACE.digest(f"{number}") + b"}" for number in range(50)]
    assert all(key.startswith(b"sigil:1:f:{") for key in apart)
    assert len({slot_of(key) for key in apart}) > 40
    assert {slot_of(key + b":log") for key in apart} == {slot_of(key) for key in apart}


@pytest.mark.parametrize("prefix", ["", "a{b}", "x" * 65, "a b", "é", "a\n"])
def test_a_prefix_that_could_move_keys_elsewhere_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix must be 1 to 64 letters"):
        KeySpace(prefix)


def test_the_digest_key_is_not_shown() -> None:
    space = KeySpace("sigil", SecretStr("swordfish"))
    assert "swordfish" not in repr(space)
    for secret in ("", "x" * 65):
        with pytest.raises(ValueError, match=f"digest_key must be 1 to 64 bytes, not {len(secret)}") as refused:
            KeySpace("sigil", SecretStr(secret))
        assert not secret or secret not in str(refused.value)
