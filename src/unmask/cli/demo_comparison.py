"""The comparison inside `unmask demo`: a speculative model against the same weights decoded token by token, by turns.

Owns the two sides, the rounds, the table and the sentence that ends it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unmask.cli.console import visible
from unmask.engine.llm import LanguageModel
from unmask.engine.parent import parent_of
from unmask.engine.request import Completion

ROUNDS = 5
"""Answers of each side to each prompt."""
SAME = 0.03
"""Ratios this near to 1 are no difference."""


@dataclass(frozen=True)
class Comparison:
    """Both sides' answers to one prompt, one of each a round."""

    prompt: str
    token_by_token: tuple[Completion, ...]
    speculative: tuple[Completion, ...]

    @property
    def ratio(self) -> float:
        """Tokens/s of speculative decoding over those of decoding token by token."""
        return tokens_per_second(self.speculative) / tokens_per_second(self.token_by_token)


def compare(model: LanguageModel, prompts: Sequence[str], max_new_tokens: int) -> list[Comparison]:
    """Let a speculative model and its own weights, decoded token by token, answer each prompt in turn.

    Args:
        model: with gated LoRA and a tokenizer.
        prompts: of users.
        max_new_tokens: of an answer, at most.

    Raises:
        ConfigError: a model without gated LoRA.
    """
    parent, start = parent_of(model)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_id": model.eos_ids}
    comparisons = []
    for number, prompt in enumerate(prompts):
        ids = model.encode_prompt(prompt)
        answers: tuple[list[Completion], list[Completion]] = ([], [])
        for _ in range(ROUNDS + (number == 0)):
            answers[0].append(parent.complete((*start, *ids), prompt_lookup=False, **options))
            answers[1].append(model.complete(ids, **options))
        # The very first answers also make room for the weights.
        comparisons.append(Comparison(prompt, *(tuple(side[-ROUNDS:]) for side in answers)))
    return comparisons


def tokens_per_second(completions: Sequence[Completion]) -> float:
    """Tokens/s of a prompt's answers, by the median of their times."""
    seconds = statistics.median(completion.costs.busy_seconds for completion in completions)
    return len(completions[0].ids) / max(seconds, 1e-6)


def print_comparisons(console: Console, model: LanguageModel, comparisons: Sequence[Comparison]) -> None:
    """The answers and speeds of both sides in neighbouring columns, and what was faster by how much."""
    assert model.tokenizer is not None, "compare() has encoded the prompts"
    table = Table(show_lines=True, width=min(console.width, 120))
    table.add_column("", max_width=20)
    table.add_column("token by token", ratio=1)
    table.add_column("speculative", ratio=1)
    for each in comparisons:
        sides = (each.token_by_token, each.speculative)
        first, second = (visible(model.tokenizer.decode(side[0].ids).strip()) for side in sides)
        table.add_row(Text(each.prompt, style="bold"), Text(first), "the same text" if first == second else Text(second))
        figures = (
            f"{tokens_per_second(side):.1f}\n{len(side[0].ids) / side[0].forwards:.2f}\n{side[0].forwards}" for side in sides
        )
        table.add_row("tokens/s\ntokens per forward\nforwards", *figures)
    console.print(table)
    console.print(verdict([each.ratio for each in comparisons]), soft_wrap=True)


def verdict(ratios: Sequence[float]) -> str:
    """A sentence on which side wrote more tokens/s on which prompts; `ratios` are those of speculative decoding."""
    groups: dict[str, list[str]] = {"faster": [], "as fast": [], "slower": []}
    for ratio in ratios:
        name = "as fast" if abs(ratio - 1) < SAME else "faster" if ratio > 1 else "slower"
        groups[name].append(f"{ratio:.2f}")
    parts = [f"{name} on {len(group)} ({', '.join(group)} times the tokens/s)" for name, group in groups.items() if group]
    against = "the same weights decoded token by token"
    return f"Of {len(ratios)} prompts, speculative decoding was {', '.join(parts)}, compared with {against}."
