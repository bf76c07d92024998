"""What a benchmark is: items with prompts and targets, and a rule that scores answers.

Owns the records that every task, the runner and the reports share. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Dimension = Literal["knowledge", "reasoning", "coding", "math", "agent"]
"""The five of the LLaDA2.0 report (its "Agent & Alignment" is `agent`)."""
Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in its task, and stable over runs and versions.
        prompt: the user's message, or plain text to continue.
        target: what the answer is compared with; JSON.
        system: system message.
        raw: continue the prompt as plain text, without the chat template.
        max_new_tokens: most tokens of the answer.
        stop: strings that end the answer.
        schema: the answer is JSON that this schema accepts, by a grammar.
        answer_prefix: text that the answer begins with; the model goes on from it, and it is scored with the rest.
    """

    id: str
    prompt: str
    target: Any
    system: str | None = None
    raw: bool = False
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    answer_prefix: str = ""


@dataclass(frozen=True)
class Score:
    """What an answer is worth, from 0 to 1; what was read out of it; and why, where that helps."""

    value: float
    extracted: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: of the task.
        dimension: where it counts.
        metric: what the score is, in the field's words.
        version: changes whenever items or scoring do.
        licence: of the items.
        source: where they come from.
        items: the first `count` items of a split, in a fixed order; fewer where there are no more.
        score: of each answer, in order.
        size: items of the test split; None: as many as asked for.
    """

    name: str
    dimension: Dimension
    metric: str
    version: str
    licence: str
    source: str
    items: Callable[[Split, int], Sequence[Item]]
    score: Callable[[Sequence[Item], Sequence[str]], Sequence[Score]]
    size: int | None = field(default=None)
