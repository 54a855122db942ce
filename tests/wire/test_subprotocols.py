"""A credential in `Sec-WebSocket-Protocol` (RFC 6455 sections 4.1 and 11.3.4, RFC 9110 section 5.6)."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sigil_policy.wire.subprotocols import MAX_FIELD, MAX_OFFERED, choose, find_pair

NAME = b"sigil.bearer"
TCHAR = "!#$%&'*+-.^_`|~" + string.digits + string.ascii_letters


@pytest.mark.parametrize(
    ("field", "credential"),
    [
        (b"sigil.bearer, abc", b"abc"),
        (b"sigil.bearer,abc", b"abc"),
        (b"chat.v2, sigil.bearer, eyJhbGciOi.eyJzdWI.c2ln-_, chat.v1", b"eyJhbGciOi.eyJzdWI.c2ln-_"),
        (b"\tsigil.bearer \t,, ,abc,", b"abc"),  # RFC 9110 section 5.6.1.2: empty elements, optional white space
        (b"", None),
        (b"chat.v2", None),
        (b"chat.v2, abc", None),
        (b"Sigil.Bearer, abc", None),
        (b"xsigil.bearer, abc", None),
        (b"sigil.bearer2, abc", None),
        (b"sigil, bearer, abc", None),
    ],
)
def test_the_value_behind_the_name_is_the_credential(field, credential):
    assert find_pair(field, NAME) == credential


@pytest.mark.parametrize(
    "field",
    [
        b"sigil.bearer",
        b"abc, sigil.bearer",
        b"sigil.bearer, ,",
        b"sigil.bearer, abc, sigil.bearer, def",
        b"sigil.bearer, sigil.bearer",
        b"sigil.bearer, abc, abc",
        b"sigil.bearer, a b",
        b'sigil.bearer, "abc"',
        b"sigil.bearer, abc=",
        b"sigil.bearer, a/b",
        b"sigil.bearer, a\x00b",
        b"sigil.bearer, \x0babc",
        b"sigil.bearer, \xe9",
        b"sigil.bearer, abc, a;b",
        b"sigil.bearer, " + b"a" * MAX_FIELD,
        b"sigil.bearer, abc" + b",x" * 99,
        b"sigil.bearer, abc" + b"," * 99,
    ],
)
def test_a_list_that_is_malformed_is_an_error_that_repeats_nothing(field):
    with pytest.raises(ValueError, match=r"^[a-zA-Z0-9 ,.()]+$") as caught:
        find_pair(field, NAME)
    assert "abc" not in str(caught.value)


def test_lines_are_one_list():
    """RFC 6455 section 11.3.4: a header that comes several times is one list."""
    assert find_pair(b", ".join([b"chat", b"sigil.bearer", b"abc"]), NAME) == b"abc"


def test_as_many_are_read_as_are_promised():
    others = [f"p{number}".encode() for number in range(MAX_OFFERED - 2)]
    assert find_pair(b",".join([*others, NAME, b"abc"]), NAME) == b"abc"
    with pytest.raises(ValueError, match="too many"):
        find_pair(b",".join([*others, b"one-more", NAME, b"abc"]), NAME)


def naive(field: bytes) -> "bytes | type[ValueError] | None":
    """The same, as one would write it down from the RFC."""
    elements = [element.strip(" \t") for element in field.decode("latin-1").split(",")]
    offered = [element for element in elements if element]
    if NAME.decode() not in offered:
        return None
    good = all(set(element) <= set(TCHAR) for element in offered) and len(set(offered)) == len(offered)
    place = offered.index(NAME.decode())
    return offered[place + 1].encode() if good and place + 1 < len(offered) else ValueError


ELEMENT = st.one_of(
    st.just(NAME.decode()), st.text(TCHAR, min_size=1, max_size=5), st.text("ab \t;=", max_size=3), st.just("")
)


@given(st.lists(ELEMENT, max_size=8), st.sampled_from([",", ", ", " ,\t"]))
def test_it_reads_what_a_naive_reading_reads(elements, comma):
    field = comma.join(elements).encode("latin-1")
    expected = naive(field)
    if expected is ValueError:
        with pytest.raises(ValueError, match=r"subprotocol|credential"):
            find_pair(field, NAME)
    else:
        assert find_pair(field, NAME) == expected


@given(st.binary(max_size=80), st.binary(max_size=80))
def test_no_bytes_are_another_error(before, behind):
    try:
        found = find_pair(before + NAME + behind, NAME)
    except ValueError:
        return
    assert found is None or set(found.decode("ascii")) <= set(TCHAR)


@pytest.mark.parametrize(
    ("chosen", "answer"), [(None, NAME), (b"abc", NAME), (b"chat.v2", b"chat.v2"), (NAME, NAME), (b"ABC", b"ABC")]
)
def test_the_answer_never_selects_the_credential(chosen, answer):
    """WHATWG: a browser fails the connection if nothing of what it offered is selected."""
    assert choose(chosen, NAME, b"abc") == answer
