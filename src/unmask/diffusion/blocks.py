"""Block arithmetic and the Warmup-Stable-Decay schedule of block sizes.

Owns block boundaries and the block size at each point of training. Knows integers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import lcm
from typing import Literal

from unmask.errors import ConfigError

PhaseName = Literal["warmup", "stable", "decay"]


def num_blocks(length: int, block_size: int) -> int:
    """Number of blocks that cover `length` tokens, the last one possibly partial."""
    return -(-length // block_size)


@dataclass(frozen=True)
class Phase:
    """A phase of training at one block size; `tokens` is its length in clean tokens.

    `block_size` None is full-sequence diffusion: one block as long as the document, no clean copy.
    """

    name: PhaseName
    block_size: int | None
    tokens: int


@dataclass(frozen=True)
class BlockSchedule:
    """The phases of a run, in order.

    Source: LLaDA2.0 section 3 (Warmup-Stable-Decay over the block size).
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConfigError("the block-size schedule is empty; give at least one phase")
        for phase in self.phases:
            if phase.tokens <= 0:
                raise ConfigError(f"phase '{phase.name}' has {phase.tokens} tokens; every phase needs at least one")
            if phase.block_size is not None and phase.block_size <= 0:
                raise ConfigError(f"phase '{phase.name}' has block size {phase.block_size}; it must be positive")

    def index_at(self, tokens_seen: int) -> int:
        """Index of the phase after `tokens_seen` tokens; past the end, the last one."""
        starts = accumulate((phase.tokens for phase in self.phases[:-1]), initial=0)
        return max(index for index, start in enumerate(starts) if start <= tokens_seen)

    def check_row_length(self, row_length: int) -> None:
        """Every block size must divide the row.

        Raises:
            ConfigError: names the sizes that do not, and the nearest valid row lengths.
        """
        sizes = sorted({phase.block_size for phase in self.phases if phase.block_size is not None})
        wrong = [size for size in sizes if row_length % size]
        if wrong:
            step = sizes[-1] if all(sizes[-1] % size == 0 for size in sizes) else lcm(*sizes)
            below, above = row_length // step * step, (row_length // step + 1) * step
            valid = " or ".join(str(n) for n in (below, above) if n > 0)
            noun = f"block size {wrong[0]}" if len(wrong) == 1 else f"block sizes {', '.join(map(str, wrong))}"
            raise ConfigError(f"row length {row_length} is not a multiple of {noun}; use {valid}")


def wsd_schedule(
    total_tokens: int, *, warmup: Sequence[tuple[int, float]], stable: float, decay: Sequence[tuple[int, float]]
) -> BlockSchedule:
    """Warmup-Stable-Decay schedule from shares of the run.

    Args:
        total_tokens: clean tokens of the whole run.
        warmup: (block size, share) pairs with growing sizes.
        stable: share of full-sequence diffusion, possibly 0.
        decay: (block size, share) pairs with shrinking sizes.

    Returns:
        The schedule; shares are normalised to sum to one.

    Raises:
        ConfigError: no phase, a negative share, too few tokens for a phase, or sizes that do not grow (warmup) or
            shrink (decay).
    """
    named: list[tuple[PhaseName, int | None, float]] = [("warmup", size, share) for size, share in warmup]
    if stable > 0:
        named.append(("stable", None, stable))
    named += [("decay", size, share) for size, share in decay]
    _check_monotone("warmup", [size for size, _ in warmup])
    _check_monotone("decay", [size for size, _ in decay][::-1])
    for name, size, share in named:
        if share <= 0:
            raise ConfigError(f"{name} at block size {size} has share {share}; shares must be positive")
    if stable < 0:
        raise ConfigError(f"the stable phase has share {stable}; shares must not be negative")
    if total_tokens < len(named):
        raise ConfigError(f"{total_tokens} tokens cannot fill {len(named)} phases; raise train.tokens")
    whole = sum(share for _, _, share in named)
    ends = [round(total_tokens * part / whole) for part in accumulate(share for _, _, share in named)]
    spans = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for (name, size, _), tokens in zip(named, spans, strict=True):
        if tokens == 0:
            raise ConfigError(f"{name} at block size {size} gets none of {total_tokens} tokens; raise train.tokens")
    return BlockSchedule(tuple(Phase(name, size, tokens) for (name, size, _), tokens in zip(named, spans, strict=True)))


def _check_monotone(name: str, growing: Sequence[int]) -> None:
    if any(a >= b for a, b in pairwise(growing)):
        direction, shown = ("grow", list(growing)) if name == "warmup" else ("shrink", list(growing[::-1]))
        raise ConfigError(f"{name} block sizes must {direction} step by step; got {shown}")
