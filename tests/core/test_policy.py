"""A plain subclass of `Policy` is a frozen, validated, keyword-only dataclass by itself."""

import dataclasses
import pickle
from copy import copy, deepcopy
from functools import cached_property
from typing import Annotated, Any, ClassVar

import pytest
from pydantic import Field, SecretStr, TypeAdapter, ValidationError, field_validator, model_validator

from sigil_policy.core.exchange import Exchange, Head
from sigil_policy.core.policy import Policy
from sigil_policy.core.problems import Reply
from sigil_policy.core.stack import PolicyStack
from sigil_policy.testing import drive

pytestmark = pytest.mark.anyio


class Greeting(Policy):
    """What somebody else writes: no decorator, nothing to register."""

    name: str = "world"
    times: Annotated[int, Field(ge=1)] = 1
    key: SecretStr | None = None
    marks: tuple[str, ...] = ()

    def on_response(self, ex: Exchange, head: Head) -> None:
        head.headers.append((b"greeting", self.line))

    @cached_property
    def line(self) -> bytes:
        return " ".join([self.name] * self.times).encode()


class Farewell(Greeting):
    """A subclass of a subclass has its own fields and those it inherits."""

    until: int = 1

    @field_validator("until")
    @classmethod
    def _not_never(cls, until: int) -> int:
        if until < 0:
            raise ValueError(f"until is a number of days from now, not {until}")
        return until

    @model_validator(mode="after")
    def _short(self) -> "Farewell":
        if self.until * self.times > 100:
            raise ValueError("until x times must be at most 100")
        return self


async def ok(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def test_it_is_a_dataclass_by_itself() -> None:
    assert dataclasses.is_dataclass(Greeting)
    assert [field.name for field in dataclasses.fields(Farewell)] == ["name", "times", "key", "marks", "until"]
    assert all(field.kw_only for field in dataclasses.fields(Farewell))


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Greeting().name = "moon"  # type: ignore[misc]


def test_options_are_given_by_name() -> None:
    with pytest.raises((TypeError, ValidationError)):
        Greeting("moon")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("policy", "options", "named"),
    [
        (Greeting, {"nmae": "moon"}, "nmae"),
        (Greeting, {"times": 0}, "times"),
        (Greeting, {"times": "many"}, "times"),
        (Greeting, {"name": None}, "name"),
        (Farewell, {"until": -1}, "number of days"),
        (Farewell, {"until": 60, "times": 2}, "at most 100"),
    ],
    ids=["unknown", "out of range", "wrong type", "null", "own check", "own check of two"],
)
def test_a_wrong_option_fails_at_construction_and_is_named(policy: Any, options: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        policy(**options)


@pytest.mark.parametrize(
    "options", [{"key": 7}, {"key": ["s3cret-value"]}, {"key": "s3cret-value", "times": 0}, {"s3cret": "s3cret-value"}]
)
def test_no_error_shows_what_was_given_for_a_secret(options: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        Greeting(**options)
    assert "s3cret-value" not in str(caught.value)
    assert "input_value" not in str(caught.value)


def test_a_secret_is_in_no_repr() -> None:
    policy = Greeting(key=SecretStr("s3cret-value"))
    assert "s3cret-value" not in f"{policy!r} {policy} {PolicyStack(ok, [policy])!r}"
    assert policy.key is not None and policy.key.get_secret_value() == "s3cret-value"


def test_equal_options_make_equal_policies() -> None:
    assert Greeting(name="moon") == Greeting(name="moon")
    assert Greeting(name="moon") != Greeting(name="sun")
    assert Greeting() != Farewell()
    assert len({Greeting(marks=("a",)), Greeting(marks=("a",)), Greeting()}) == 2


def test_repr_shows_the_options() -> None:
    assert repr(Greeting(name="moon")) == "Greeting(name='moon', times=1, key=None, marks=())"


@pytest.mark.parametrize("duplicate", [copy, deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))])
def test_a_copy_is_an_equal_policy_of_its_own(duplicate: Any) -> None:
    policy = Greeting(name="moon")
    assert policy.line == b"moon"
    other = duplicate(policy)
    assert other == policy
    assert other is not policy
    assert other.line == b"moon"


def test_replace_checks_again() -> None:
    assert dataclasses.replace(Greeting(), name="moon") == Greeting(name="moon")
    with pytest.raises(ValidationError):
        dataclasses.replace(Greeting(), times=0)


def test_the_class_is_also_its_schema() -> None:
    """One definition: what Python takes is what a policy file takes."""
    assert TypeAdapter(Greeting).validate_python({"name": "moon", "times": 2}).line == b"moon moon"
    assert TypeAdapter(Greeting).json_schema()["additionalProperties"] is False


def test_bound_may_become_an_option() -> None:
    class Small(Policy):
        bound: int = 10  # type: ignore[misc]

    assert Small(bound=3).bound == 3
    assert Policy.bound == 65_536


def test_declarations_are_no_options() -> None:
    class Giver(Policy):
        gives: ClassVar[tuple[type, ...]] = (int,)

    assert not dataclasses.fields(Giver)
    with pytest.raises(ValidationError):
        Giver(gives=(str,))  # type: ignore[call-arg]


async def test_a_policy_without_hooks_costs_no_layer() -> None:
    """The messages of the application reach the server as the objects that they are."""

    class Nothing(Policy):
        pass

    start = {"type": "http.response.start", "status": 200, "headers": [(b"A", b"1")]}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start)

    sent = await drive(PolicyStack(app, [Nothing(), Nothing()]))
    assert sent.messages[0] is start
    assert start["headers"] == [(b"A", b"1")]


async def test_a_hook_that_is_not_overridden_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(*_: Any) -> None:
        raise AssertionError("called a hook that nobody wrote")

    stack = PolicyStack(ok, [Greeting()])
    for hook in ("on_request", "around", "wants_body", "on_body", "on_chunk", "on_error", "on_finish"):
        monkeypatch.setattr(Policy, hook, boom)
    assert (await drive(stack)).header("greeting") == "world"


async def test_two_equal_policies_in_one_stack_keep_separate_notes() -> None:
    class Counts(Policy):
        def on_request(self, ex: Exchange) -> None:
            assert ex.note(self) is None
            ex.keep(self, len(seen))
            seen.append(self)

        def on_response(self, ex: Exchange, head: Head) -> None:
            head.headers.append((b"x-place", b"%d" % ex.note(self)))

    seen: list[Any] = []
    policy = Counts()
    sent = await drive(PolicyStack(ok, [policy, policy, Counts()]))
    assert sent.header_lines("x-place") == ["2", "1", "0"]


async def test_one_policy_object_in_two_stacks_keeps_separate_notes() -> None:
    class Once(Policy):
        def on_request(self, ex: Exchange) -> Reply | None:
            if ex.note(self) is not None:
                return Reply(status=500, body=b"shared")
            ex.keep(self, "seen")
            return None

    policy = Once()
    inner = PolicyStack(ok, [policy])

    async def between(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)

    assert (await drive(PolicyStack(between, [policy]))).body == b"ok"


@pytest.mark.parametrize("answer", ["no", 403, {"status": 403}, object()], ids=["text", "number", "mapping", "object"])
async def test_an_answer_that_is_none_is_a_type_error_that_says_so(answer: Any) -> None:
    class Wrong(Policy):
        def on_request(self, ex: Exchange) -> Any:
            return answer

    sent = await drive(PolicyStack(ok, [Wrong()]), raise_errors=False)
    assert isinstance(sent.error, TypeError)
    assert "Problem or a Reply" in str(sent.error)
