"""Policies: which masked positions a denoising step commits.

Owns the policies and their registry: a new policy is one function here, named in `POLICIES`; `SamplingParams.policy` takes its
name. Imports no torch: candidates and confidences are numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from unmask.diffusion.decode import Guess


class PolicyOptions(Protocol):
    """The decoding options that policies read; `SamplingParams` has them."""

    @property
    def policy(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def threshold(self) -> float: ...
    @property
    def entropy_bound(self) -> float: ...


@dataclass(frozen=True)
class Policy:
    """A rule that chooses the positions to commit.

    Attributes:
        choose: of the candidates of the masked positions (ascending), the least number of commits (fewer when fewer are
            masked), and the decoding options: ascending indices into the candidates.
        needs_entropy: it reads `Guess.entropies`, which take the logits; the others read candidates and confidences alone.
        verifiable: self-speculative decoding and grammars go with it, its threshold being also one of draft and of provisional
            tokens.
    """

    choose: Callable[[Guess, int, PolicyOptions], list[int]]
    needs_entropy: bool = False
    verifiable: bool = False


def _by_threshold(masked: Guess, quota: int, params: PolicyOptions) -> list[int]:
    """Every position whose confidence is above `threshold`. Source: LLaDA2.0 section 5 (confidence-aware parallel decoding)."""
    return accept(masked.confidences, params.threshold, quota)


def _by_entropy(masked: Guess, quota: int, params: PolicyOptions) -> list[int]:
    """Positions of least entropy while the sum of all but the largest stays within `entropy_bound` nats.

    Source: Ben-Hamu et al. (2505.24857), EB-sampler, Eq. 9 with the entropy as error proxy.
    """
    assert masked.entropies is not None, "the entropy policy needs the entropies"
    return accept_within_entropy(masked.entropies, params.entropy_bound, min(quota, len(masked.positions)))


def _fixed(masked: Guess, quota: int, params: PolicyOptions) -> list[int]:
    """The same number of positions every step, the most confident first."""
    return accept(masked.confidences, 1.0, quota)


POLICIES: Mapping[str, Policy] = {
    "threshold": Policy(_by_threshold, verifiable=True),
    "entropy": Policy(_by_entropy, needs_entropy=True),
    "fixed": Policy(_fixed),
}


def choose(masked: Guess, step: int, params: PolicyOptions) -> list[int]:
    """What the policy of `params` commits in step `step` of a block: ascending indices into `masked`."""
    return POLICIES[params.policy].choose(masked, step_quota(step, params.block_size, params.steps), params)


def step_quota(step: int, block_size: int, steps: int) -> int:
    """How many positions step `step` (from 0) commits at least: block size over steps, the remainder in the first steps."""
    whole, remainder = divmod(block_size, steps)
    return whole + (1 if step < remainder else 0)


def accept(confidences: Sequence[float], threshold: float, quota: int) -> list[int]:
    """Every index whose confidence is *greater* than the threshold; if those are fewer than `quota`, the most confident.

    Args:
        confidences: of the masked positions, in ascending order of position; on ties the lowest comes first.
        threshold: probability; 1.0 accepts nothing by confidence.
        quota: least number of indices.

    Returns:
        Ascending indices into `confidences`.
    """
    above = [i for i, confidence in enumerate(confidences) if confidence > threshold]
    if len(above) >= min(quota, len(confidences)):
        return above
    return sorted(sorted(range(len(confidences)), key=lambda i: -confidences[i])[:quota])


def accept_within_entropy(entropies: Sequence[float], bound: float, quota: int) -> list[int]:
    """Ascending indices of least entropy while the sum of all but the largest stays within `bound`; at least `quota`."""
    ranked = sorted(range(len(entropies)), key=lambda i: entropies[i])
    # In ascending order the largest is the newest: the sum of all others is the sum before it.
    sums = accumulate((entropies[i] for i in ranked), initial=0.0)
    count = sum(before <= bound for _, before in zip(ranked, sums, strict=False))
    return sorted(ranked[: max(count, quota)])
