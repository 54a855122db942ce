"""A property that does not hold, for the test of the fuzzer itself."""

from sigil_policy.wire.jws import parse_object

WORDS = [b'"a":1', b'"a"']


def check(data: bytes) -> None:
    assert not broken(data), "planted"


def broken(data: bytes) -> bool:
    """Whether `data` is an object with a member."""
    try:
        return bool(parse_object(data))
    except ValueError:
        return False


def seeds() -> list[bytes]:
    return [b'{"a"}', b"{}"]
