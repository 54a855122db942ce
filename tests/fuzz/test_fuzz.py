"""The fuzzer's property holds where it starts, and the fuzzer finds what breaks it."""

import os
from importlib.util import find_spec

import pytest

from tests.fuzz import planted, properties, tokens


@pytest.mark.parametrize(
    "seed", list(properties.seeds()), ids=lambda seed: f"{properties.KINDS[seed[0]].__name__}-{len(seed)}"
)
def test_the_property_holds_where_the_search_starts(seed):
    properties.check(seed)


def test_seeds_reach_the_end_of_every_kind():
    """A search that begins with refusals alone would find little behind them."""
    passing = [seed for seed in properties.seeds() if seed[0] == 1 and b"sigil-api" in seed]
    verified = [properties._verified(properties.VERIFIERS[0], _made(seed)) for seed in passing]
    assert len([found for found in verified if found is not None]) >= 4
    assert {seed[0] for seed in properties.seeds()} == set(range(len(properties.KINDS)))


def _made(seed: bytes) -> bytes:
    header, _, claims = seed[1:].partition(b"\0")
    return properties.raw_token(header, claims)


def test_a_verifier_that_raises_or_lets_pass_breaks_the_property(monkeypatch):
    seed = next(iter(properties.seeds()))
    with monkeypatch.context() as patched:
        patched.setattr(properties, "SIGNED", {})
        with pytest.raises(AssertionError, match="nobody has signed"):
            properties.check(seed)
    monkeypatch.setattr("sigil_policy.identity.tokens.parse_compact", lambda _: {}["missing"])
    with pytest.raises(KeyError):
        properties.check(seed)


@pytest.mark.skipif(
    find_spec("atheris") is None and os.environ.get("CI") != "true", reason="atheris is not here: the extra fuzz"
)
def test_the_fuzzer_finds_what_breaks_the_property_and_says_so(capfd):
    """`planted.check` breaks on an object with a member, which no seed is."""
    assert tokens.main(["--seconds", "30", "--properties", "tests.fuzz.planted"]) == 1
    told = capfd.readouterr().out
    assert "AssertionError: planted" in told
    assert "base64.b64decode(" in told
    assert not any(planted.broken(seed) for seed in planted.seeds()), "it was not found at the start"
