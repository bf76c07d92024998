"""What a decoder is asked, what it reports while it works, and what it returns.

Owns the request's limits and the records shared by every decoder. Knows no model and no text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from unmask.errors import RequestError
from unmask.models.config import ModelConfig

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """Token ids to complete and where to stop. An end-of-sequence token inside `ids` stops nothing."""

    ids: tuple[int, ...]
    max_new_tokens: int
    eos_ids: frozenset[int]

    def check(self, config: ModelConfig) -> None:
        """Raises: RequestError: empty budget, a token outside the vocabulary, or more than the context holds."""
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        check_vocabulary(self.ids, config)
        total = len(self.ids) + self.max_new_tokens
        if total > config.max_positions:
            raise RequestError(
                f"prompt of {len(self.ids)} tokens plus {self.max_new_tokens} new ones exceeds the context of "
                f"{config.max_positions}; shorten the prompt or lower --max-new-tokens"
            )


def check_vocabulary(ids: Sequence[int], config: ModelConfig) -> None:
    """Raises: RequestError: a token outside the vocabulary."""
    outside = [token for token in ids if not 0 <= token < config.vocab_size]
    if outside:
        raise RequestError(f"prompt token {outside[0]} is outside the vocabulary (0..{config.vocab_size - 1})")


@dataclass(frozen=True)
class Step:
    """One forward, as seen from outside: the tokens of the current block after it.

    `tokens` holds None where undecided; `guess` the model's candidates for every undecided position of this step (None
    elsewhere); `start` is the absolute position of the block, `fixed` how many of its leading tokens belong to the prompt.
    """

    start: int
    fixed: int
    tokens: tuple[int | None, ...]
    guess: tuple[int | None, ...]
    accepted: tuple[bool, ...]
    forwards: int


OnStep = Callable[[Step], None]


@dataclass(frozen=True)
class Completion:
    """Completed ids up to and including the end-of-sequence token, and what they cost.

    `forwards` counts every call of the model, prefill and commit included.
    """

    ids: tuple[int, ...]
    finish_reason: FinishReason
    forwards: int


def finish(generated: Sequence[int], prompt: Prompt, forwards: int) -> Completion:
    """Cut decoded tokens at the first end-of-sequence token or at the budget."""
    kept = list(generated[: prompt.max_new_tokens])
    ends = [i for i, token in enumerate(kept) if token in prompt.eos_ids]
    if ends:
        return Completion(tuple(kept[: ends[0] + 1]), "stop", forwards)
    return Completion(tuple(kept), "length", forwards)
