"""A small language engine that runs anywhere: no network, no model, the same answer to the same question every time.

    reply = answer(agent, "Qualify this lead: John from Acme", memories=[])
    "".join(reply.tokens)

It really counts: `tokens` splits a text so that joining the parts gives the text back, and everything the engine reads
or writes is measured in those.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from examples.sigil_api.models import Agent, TokensUsed

# A token is a piece of a word, a number or one sign, with the white space before it.
_TOKEN = re.compile(r"\s*(?:[^\W\d]{1,8}|\d{1,3}|[^\w\s])|\s+")
_WORD = re.compile(r"\w{3,}")
_COMMON = frozenset(
    "and are but can did does for from has have how into not that the then this was what when where which who why "  # noqa: SIM905
    "with you your".split()
)


def tokens(text: str) -> list[str]:
    """The tokens of `text`; joined they are `text` again."""
    return _TOKEN.findall(text)


def keywords(text: str, most: int = 5) -> list[str]:
    """The words that `text` is about: the most frequent, the longest of those, the first of those."""
    words = [word for word in _WORD.findall(text.lower()) if word not in _COMMON]
    order = {word: index for index, word in reversed(list(enumerate(words)))}
    counts = Counter(words)
    return sorted(counts, key=lambda word: (-counts[word], -len(word), order[word]))[:most]


def relevance(query: str, content: str) -> float:
    """How much of `query` is found in `content`, from 0 to 1."""
    wanted = set(_WORD.findall(query.lower())) - _COMMON
    return round(len(wanted & set(_WORD.findall(content.lower()))) / len(wanted), 3) if wanted else 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[str, ...]
    input_tokens: int
    finish_reason: Literal["stop", "length"]

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def used(self) -> TokensUsed:
        written = len(self.tokens)
        return TokensUsed(
            input_tokens=self.input_tokens, output_tokens=written, total_tokens=self.input_tokens + written
        )


def answer(agent: Agent, question: str, *, memories: Sequence[str] = (), max_tokens: int = 256) -> Answer:
    """What `agent` says to `question`; what it remembers is read, and counted, before the question."""
    read = sum(len(tokens(text)) for text in (agent.system_prompt or "", *memories, question))
    topics = keywords(question)
    sentences = [f"{agent.name} ({agent.stratum}) has read your request."]
    sentences.append(f"It is about {', '.join(topics)}." if topics else "It names no topic.")
    if memories:
        sentences.append(f"I remember: {memories[0]}")
    if agent.description:
        sentences.append(f"My task: {agent.description.rstrip('.')}.")
    sentences.append("Next step: tell me what a good result looks like.")
    written = tokens(" ".join(sentences))
    return Answer(
        tokens=tuple(written[:max_tokens]),
        input_tokens=read,
        finish_reason="stop" if len(written) <= max_tokens else "length",
    )


def scores(agent: Agent, cases: Sequence[str]) -> tuple[dict[str, float], TokensUsed]:
    """How well `agent` does on `cases`: accuracy (answers stay on the topic), brevity, and their mean."""
    answers = [answer(agent, case) for case in cases]
    accuracy = sum(relevance(case, reply.text) for case, reply in zip(cases, answers, strict=True)) / len(cases)
    brevity = sum(min(1.0, 40 / len(reply.tokens)) for reply in answers) / len(cases)
    read, written = sum(reply.input_tokens for reply in answers), sum(len(reply.tokens) for reply in answers)
    marks = {"accuracy": accuracy, "brevity": brevity, "overall": (accuracy + brevity) / 2}
    return (
        {name: round(mark, 3) for name, mark in marks.items()},
        TokensUsed(input_tokens=read, output_tokens=written, total_tokens=read + written),
    )


def improved_prompt(agent: Agent, target: str) -> str:
    """A system prompt that asks for `target`; asking twice changes nothing."""
    wish = {"accuracy": "Stay on the topic of the question.", "brevity": "Answer in one sentence."}[target]
    prompt = agent.system_prompt or ""
    return prompt if wish in prompt else f"{prompt} {wish}".strip()
