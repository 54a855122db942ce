"""Order is declared by policies and checked before the first exchange."""

from typing import ClassVar

import pytest

from sigil_policy.core.ordering import PolicyOrderError, check_order
from sigil_policy.core.policy import Policy
from sigil_policy.core.stack import PolicyStack


class Fact: ...


class Giver(Policy):
    gives: ClassVar[tuple[type, ...]] = (Fact,)


class OtherGiver(Policy):
    gives: ClassVar[tuple[type, ...]] = (Fact,)


class Needer(Policy):
    needs: ClassVar[tuple[type, ...]] = (Fact,)


class Reader(Policy):
    reads: ClassVar[tuple[type, ...]] = (Fact,)


class Outermost(Policy):
    precedes: ClassVar[tuple[type, ...]] = (Fact,)


async def app(scope: object, receive: object, send: object) -> None: ...


def test_a_good_order_needs_nothing_from_outside() -> None:
    assert check_order([Outermost(), Giver(), Needer(), Reader()]) == frozenset()


def test_a_fact_that_nobody_gives_is_asked_of_an_outer_stack() -> None:
    assert check_order([Needer()]) == {Fact}


def test_a_fact_that_is_only_read_may_be_missing() -> None:
    assert check_order([Reader()]) == frozenset()


@pytest.mark.parametrize("user", [Needer, Reader])
def test_standing_outside_of_what_gives_the_fact_is_refused_with_the_swap(user: type[Policy]) -> None:
    with pytest.raises(PolicyOrderError, match=f"list Giver before {user.__name__}"):
        PolicyStack(app, [user(), Giver()])


def test_a_second_giver_inside_the_reader_is_refused_too() -> None:
    with pytest.raises(PolicyOrderError, match="list OtherGiver before Reader"):
        check_order([Giver(), Reader(), OtherGiver()])


def test_the_same_giver_twice_is_no_disorder() -> None:
    assert check_order([Giver(), Reader(), Giver()]) == frozenset()


def test_a_policy_that_must_see_refusals_is_refused_inside() -> None:
    with pytest.raises(PolicyOrderError, match="list Outermost before Giver"):
        check_order([Giver(), Outermost()])


def test_fused_stacks_are_checked_together() -> None:
    inner = PolicyStack(app, [Giver()])
    with pytest.raises(PolicyOrderError, match="list Giver before Reader"):
        PolicyStack(inner, [Reader()])
    assert PolicyStack(PolicyStack(app, [Needer()]), [Giver()]).missing == frozenset()


@pytest.mark.parametrize("wrong", [Giver, object(), "Giver"], ids=["class", "object", "text"])
def test_what_is_no_policy_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="policies must be Policy instances"):
        PolicyStack(app, [wrong])  # type: ignore[list-item]
