"""The local engine: counts what it reads and writes, and answers the same every time."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.sigil_api.engine import answer, improved_prompt, keywords, relevance, scores, tokens
from examples.sigil_api.models import Agent

NOW = datetime(2026, 1, 11, 12, tzinfo=UTC)
AGENT = Agent(
    name="sales_qualifier", stratum="RAI", description="Qualifies leads", status="active", version="1.0.0",
    created_at=NOW, updated_at=NOW, system_prompt="Be brief.",
)  # fmt: skip


@given(st.text())
def test_tokens_joined_are_the_text_again(text):
    assert "".join(tokens(text)) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        pytest.param("", 0, id="empty"),
        pytest.param("hello", 1, id="word"),
        pytest.param("hello world", 2, id="words"),
        pytest.param("hello, world!", 4, id="signs count"),
        pytest.param("12345", 2, id="numbers by threes"),
        pytest.param("extraordinarily", 2, id="long words in pieces"),
        pytest.param("  \n", 1, id="white space alone"),
    ],
)
def test_tokens_are_counted(text, count):
    assert len(tokens(text)) == count


def test_the_same_question_gets_the_same_answer():
    assert answer(AGENT, "Qualify John from Acme") == answer(AGENT, "Qualify John from Acme")


def test_input_tokens_are_the_prompt_the_memories_and_the_question():
    reply = answer(AGENT, "Qualify this lead", memories=["Acme signed"])
    assert reply.input_tokens == len(tokens("Be brief.")) + len(tokens("Acme signed")) + len(
        tokens("Qualify this lead")
    )
    assert reply.used.output_tokens == len(tokens(reply.text))
    assert reply.used.total_tokens == reply.used.input_tokens + reply.used.output_tokens


def test_an_answer_ends_at_max_tokens_and_says_so():
    reply = answer(AGENT, "Qualify this lead", max_tokens=5)
    assert (len(reply.tokens), reply.finish_reason) == (5, "length")
    assert answer(AGENT, "Qualify this lead").finish_reason == "stop"


def test_keywords_prefer_the_frequent_then_the_long():
    assert keywords("lead lead qualification acme the the the") == ["lead", "qualification", "acme"]


def test_relevance_is_the_share_of_the_query_that_is_found():
    assert relevance("when did acme sign", "Acme signed in March") == 0.5
    assert relevance("the", "the") == 0.0


def test_scores_lie_between_0_and_1_and_count_their_tokens():
    marks, used = scores(AGENT, ["Who qualifies leads?"])
    assert set(marks) == {"accuracy", "brevity", "overall"}
    assert all(0 <= mark <= 1 for mark in marks.values())
    assert used.total_tokens == used.input_tokens + used.output_tokens > 0


def test_improving_twice_changes_nothing_more():
    once = improved_prompt(AGENT, "brevity")
    assert once == "Be brief. Answer in one sentence."
    assert improved_prompt(AGENT.model_copy(update={"system_prompt": once}), "brevity") == once
