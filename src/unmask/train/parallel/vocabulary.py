"""Vocabulary-parallel losses: each tensor rank has the logits of its share of the vocabulary.

Owns cross-entropy, entropy and confidence over a split vocabulary; no rank ever has all logits of a position. The definitions,
and the plain functions these equal, are in `diffusion.objectives`.

Legend: N predictions, D hidden, W the rank's share of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from unmask.diffusion.objectives import PREDICTIONS_AT_ONCE, TokenScores, in_chunks


@dataclass(frozen=True, eq=False)
class VocabularyShard:
    """A rank's share of the vocabulary: logit `j` of the rank is of token `start + j`; from `stop` on they are padding."""

    group: dist.ProcessGroup
    start: int
    stop: int

    def banned(self, logits_NW: Tensor, mask_id: int | None) -> Tensor:
        """Which of the rank's logits are of no prediction: of padding or the mask token; bool [W]."""
        token_W = torch.arange(self.start, self.start + logits_NW.shape[1], device=logits_NW.device)
        banned_W = token_W >= self.stop
        return banned_W if mask_id is None else banned_W | (token_W == mask_id)

    def own(self, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets (bool [N]) are in the rank's share, and the column of each (0 where it is not)."""
        own_N = (target_N >= self.start) & (target_N < self.stop)
        return own_N, torch.where(own_N, target_N - self.start, 0)

    def reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """The tensor, reduced over the ranks in place."""
        dist.all_reduce(tensor, operation, self.group)
        return tensor


def parallel_nll(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    target_N: Tensor,
    mask_id: int | None,
    shard: VocabularyShard,
    *,
    chunk: int = PREDICTIONS_AT_ONCE,
) -> Tensor:
    """`token_nll` [N], where `head` gives the logits of the rank's share of the vocabulary; equal on all ranks.

    The gradient of `hidden_ND` is this rank's part of it: the sum over ranks is the caller's.
    """

    def nll(part_ND: Tensor, part_N: Tensor) -> Tensor:
        nll_N: Tensor = _CrossEntropy.apply(head(part_ND), part_N, mask_id, shard)  # type: ignore[no-untyped-call]
        return nll_N

    return torch.cat(in_chunks(nll, hidden_ND, target_N, chunk))


def parallel_scores(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    target_N: Tensor,
    mask_id: int | None,
    shard: VocabularyShard,
    *,
    temperature: float = 1.0,
    chunk: int = PREDICTIONS_AT_ONCE,
) -> TokenScores:
    """`token_scores`, where `head` gives the logits of the rank's share; as for `parallel_nll`."""

    def score(part_ND: Tensor, part_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores: tuple[Tensor, Tensor, Tensor, Tensor] = _Scores.apply(  # type: ignore[no-untyped-call]
            head(part_ND), part_N, mask_id, shard, temperature
        )
        return scores

    columns = zip(*in_chunks(score, hidden_ND, target_N, chunk), strict=True)
    return TokenScores(*(torch.cat(column) for column in columns))


def _wide(logits_NW: Tensor, mask_id: int | None, shard: VocabularyShard) -> Tensor:
    """The rank's logits, in at least float32; -inf where there is no prediction."""
    wide_NW = logits_NW.to(torch.promote_types(logits_NW.dtype, torch.float32))
    return wide_NW.masked_fill(shard.banned(logits_NW, mask_id), float("-inf"))


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of the targets; one [N, W] buffer holds the rank's log p, then the gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NW: Tensor, target_N: Tensor, mask_id: int | None, shard: VocabularyShard) -> Tensor:
        log_p_NW = _wide(logits_NW, mask_id, shard)
        best_N = shard.reduce(log_p_NW.amax(1), dist.ReduceOp.MAX)
        log_p_NW.sub_(best_N[:, None])
        own_N, column_N = shard.own(target_N)
        target_logit_N = torch.where(own_N, log_p_NW.gather(1, column_N[:, None])[:, 0], 0.0)
        sums_2N = shard.reduce(torch.stack((log_p_NW.exp().sum(1), target_logit_N)), dist.ReduceOp.SUM)
        log_z_N = sums_2N[0].log()
        log_p_NW.sub_(log_z_N[:, None])
        ctx.save_for_backward(log_p_NW, own_N, column_N)
        ctx.dtype = logits_NW.dtype
        return log_z_N - sums_2N[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        log_p_NW, own_N, column_N = ctx.saved_tensors
        # In place: a second backward pass through the same graph is an error of autograd's.
        grad_NW = log_p_NW.exp_().mul_(grad_N[:, None])
        grad_NW.scatter_add_(1, column_N[:, None], torch.where(own_N, -grad_N, 0.0)[:, None])
        return grad_NW.to(ctx.dtype), None, None, None


class _Scores(torch.autograd.Function):
    """Likelihood, entropy, correctness and confidence.

    With p = softmax(z / temperature) the entropy H has the gradient `-p (log p + H) / temperature`.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NW: Tensor, target_N: Tensor, mask_id: int | None, shard: VocabularyShard, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z_NW = _wide(logits_NW, mask_id, shard)
        own_best = z_NW.max(1)
        best_N = shard.reduce(own_best.values.clone(), dist.ReduceOp.MAX)
        # Of equal logits the first token's, as where the vocabulary is whole.
        nowhere = torch.iinfo(target_N.dtype).max
        argmax_N = torch.where(own_best.values == best_N, own_best.indices + shard.start, nowhere)
        correct_N = shard.reduce(argmax_N, dist.ReduceOp.MIN) == target_N
        z_NW.sub_(best_N[:, None])
        own_N, column_N = shard.own(target_N)
        target_logit_N = torch.where(own_N, z_NW.gather(1, column_N[:, None])[:, 0], 0.0)
        cooled_NW = z_NW / temperature
        weight_NW = cooled_NW.exp()
        energy_N = (weight_NW * cooled_NW.masked_fill(weight_NW == 0, 0.0)).sum(1)
        sums = torch.stack((z_NW.exp().sum(1), target_logit_N, weight_NW.sum(1), energy_N))
        z_sum_N, target_logit_N, cooled_sum_N, energy_N = shard.reduce(sums, dist.ReduceOp.SUM)
        entropy_N = torch.where(correct_N, cooled_sum_N.log() - energy_N / cooled_sum_N, 0.0)
        ctx.save_for_backward(z_NW, own_N, column_N, z_sum_N, cooled_sum_N, entropy_N, correct_N)
        ctx.temperature, ctx.dtype = temperature, logits_NW.dtype
        confidence_N = 1 / z_sum_N
        ctx.mark_non_differentiable(correct_N, confidence_N)
        return z_sum_N.log() - target_logit_N, entropy_N, correct_N, confidence_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, grad_entropy_N: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        z_NW, own_N, column_N, z_sum_N, cooled_sum_N, entropy_N, correct_N = ctx.saved_tensors
        grad_NW = z_NW.exp().mul_((grad_N / z_sum_N)[:, None])
        grad_NW.scatter_add_(1, column_N[:, None], torch.where(own_N, -grad_N, 0.0)[:, None])
        log_p_NW = z_NW / ctx.temperature - cooled_sum_N.log()[:, None]
        p_NW = log_p_NW.exp()
        steepness_NW = p_NW * (log_p_NW.masked_fill(p_NW == 0, 0.0) + entropy_N[:, None])
        grad_NW.addcmul_(steepness_NW, torch.where(correct_N, grad_entropy_N, 0.0)[:, None], value=-1 / ctx.temperature)
        return grad_NW.to(ctx.dtype), None, None, None, None
