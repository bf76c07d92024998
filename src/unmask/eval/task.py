"""Tasks: items with prompts and targets, and a rule that scores answers.

Owns the records that the tasks, the runner and the reports share. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Dimension = Literal["knowledge", "reasoning", "coding", "math", "agent"]
"""The five dimensions of the LLaDA2.0 report (its "Agent & Alignment" is `agent`)."""
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
        schema: JSON schema to which the answer is constrained.
        answer_prefix: beginning of the answer, which the model continues; it is scored with the rest.
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
class ItemScore:
    """Score of one answer, in [0, 1]; what was extracted from it; and the reason, where that helps."""

    value: float
    extracted: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Task:
    """A task of our own.

    Attributes:
        name: of the task.
        dimension: where it counts.
        metric: of the score, by its usual name.
        version: changes whenever items or scoring do.
        licence: of the items.
        source: where the items come from.
        items: the first `count` items of a split, in a fixed order; fewer where there are no more.
        score: the score of each answer, in order.
        size: number of items in the test split; None where any number can be made.
        require: raises ConfigError where a package that the items come from is missing.
    """

    name: str
    dimension: Dimension
    metric: str
    version: str
    licence: str
    source: str
    items: Callable[[Split, int], Sequence[Item]]
    score: Callable[[Sequence[Item], Sequence[str]], Sequence[ItemScore]]
    size: int | None = None
    require: Callable[[], object] = lambda: None
