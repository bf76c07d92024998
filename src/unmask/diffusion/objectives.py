"""Loss functions: the negative evidence lower bound (NELBO) over masked positions, confidence (CAP), preference (DPO),
divergence from a parent, alignment of hidden states.

Owns cross-entropy at predicted positions and the losses made of it. Knows tensors only; losses are sums, because only the
trainer knows the global batch that normalises them.

Legend: N predictions, D hidden, V vocabulary, L layers, P preference pairs, S noise samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

PREDICTIONS_AT_ONCE = 2048
"""Predictions whose logits exist at once."""
_CACHED = 64
"""Rows of logits worked on at once, so that what lies between two passes over them stays in cache."""


def ban_mask(logits: Tensor, mask_id: int | None) -> Tensor:
    """Logits [..., V] with the mask token at -inf: it is never a prediction. As they are where there is no such token."""
    if mask_id is None:
        return logits
    banned = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(banned, float("-inf"))


def token_nll(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    target_N: Tensor,
    mask_id: int | None,
    *,
    chunk: int = PREDICTIONS_AT_ONCE,
) -> Tensor:
    """Negative log-likelihood of each target given the hidden state that predicts it: the same position's in diffusion.

    The vocabulary is projected for the given positions only, `chunk` of them at a time; with more than one chunk each is
    recomputed in the backward pass, so that [N, V] never exists at once.

    Args:
        head: hidden states to logits.
        hidden_ND: hidden states at predicted positions.
        target_N: int64 clean tokens, never `mask_id`.
        mask_id: token that is never predicted; None: an autoregressive model has none.
        chunk: positions projected at once.

    Returns:
        [N] in nats, float32 (of float64 logits float64).
    """

    def nll(part_ND: Tensor, part_N: Tensor) -> Tensor:
        nll_N: Tensor = _CrossEntropy.apply(head(part_ND), part_N, mask_id)  # type: ignore[no-untyped-call]
        return nll_N

    return torch.cat(in_chunks(nll, hidden_ND, target_N, chunk))


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits [N, V] with the mask token banned, at least float32; one [N, V] buffer holds log p, then the
    gradient."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, mask_id: int | None) -> Tensor:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        log_p_NV = torch.empty_like(logits_NV, dtype=wide)
        at_once = _CACHED if logits_NV.device.type == "cpu" else max(len(logits_NV), 1)
        for logits, log_p in zip(logits_NV.split(at_once), log_p_NV.split(at_once), strict=True):
            torch.log_softmax(ban_mask(logits.to(wide), mask_id), -1, out=log_p)
        ctx.save_for_backward(log_p_NV, target_N)
        ctx.dtype = logits_NV.dtype
        return -log_p_NV.gather(1, target_N[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        log_p_NV, target_N = ctx.saved_tensors
        # In place: a second backward pass through the same graph is an error of autograd's.
        grad_NV = log_p_NV.exp_().mul_(grad_N[:, None])
        grad_NV.scatter_add_(1, target_N[:, None], -grad_N[:, None])
        return grad_NV.to(ctx.dtype), None, None


def in_chunks(score: Callable[[Tensor, Tensor], T], hidden_ND: Tensor, target_N: Tensor, chunk: int) -> list[T]:
    """`score` of the predictions and of what they are compared with (targets [N], or hidden states), `chunk` at a time.

    With more than one chunk each is recomputed in the backward pass.
    """
    if len(target_N) <= chunk:
        return [score(hidden_ND, target_N)]
    chunks = zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)
    return [checkpoint(score, part_ND, part_N, use_reentrant=False) for part_ND, part_N in chunks]


class TokenScores(NamedTuple):
    """Scores of the predictions at N masked positions.

    `nll_N` (nats) and `entropy_N` (nats, zero where the argmax is wrong) carry gradients; `correct_N` (bool): the most probable
    token is the clean one; `confidence_N`: its probability. All are float32, of float64 logits float64.
    """

    nll_N: Tensor
    entropy_N: Tensor
    correct_N: Tensor
    confidence_N: Tensor


def token_scores(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    target_N: Tensor,
    mask_id: int | None,
    *,
    temperature: float = 1.0,
    chunk: int = PREDICTIONS_AT_ONCE,
) -> TokenScores:
    """`token_nll` together with what confidence-aware training needs, in one projection.

    Args:
        head, hidden_ND, target_N, mask_id, chunk: as for `token_nll`.
        temperature: divides the logits before the entropy (not before the likelihood).

    Source: LLaDA2.0 section 4.2 (CAP); dParallel (2509.26488) for the temperature.
    """

    def score(part_ND: Tensor, part_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits_NV = head(part_ND)
        logits_NV = ban_mask(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), mask_id)
        log_z_N = logits_NV.logsumexp(-1)
        nll_N = log_z_N - logits_NV.gather(1, part_N[:, None])[:, 0]
        best = logits_NV.detach().max(-1)
        correct_N = best.indices == part_N
        entropy_N = torch.zeros_like(nll_N).masked_scatter(correct_N, entropy(logits_NV[correct_N] / temperature))
        return nll_N, entropy_N, correct_N, (best.values - log_z_N.detach()).exp()

    columns = zip(*in_chunks(score, hidden_ND, target_N, chunk), strict=True)
    return TokenScores(*(torch.cat(column) for column in columns))


def entropy(logits_NV: Tensor) -> Tensor:
    """Shannon entropy [N] in nats of softmax(logits); entries at -inf count as probability zero."""
    finite_NV = logits_NV.masked_fill(logits_NV == float("-inf"), 0.0)
    return logits_NV.logsumexp(-1) - (logits_NV.softmax(-1) * finite_NV).sum(-1)


def parent_divergence(
    head: Callable[[Tensor], Tensor],
    parent_head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    parent_ND: Tensor,
    mask_id: int | None,
    *,
    chunk: int = PREDICTIONS_AT_ONCE,
) -> Tensor:
    """Kullback-Leibler divergence `KL(parent || child)` [N] in nats, the mask token banned on both sides.

    Args:
        head, parent_head: hidden states to logits; no gradient reaches the parent's.
        hidden_ND, parent_ND: hidden states of the same predictions.
        mask_id, chunk: as for `token_nll`.
    """

    def log_softmax(logits_NV: Tensor) -> Tensor:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        return ban_mask(logits_NV.to(wide), mask_id).log_softmax(-1)

    def divergence(part_ND: Tensor, parent_part_ND: Tensor) -> Tensor:
        with torch.no_grad():
            parent_NV = log_softmax(parent_head(parent_part_ND))
        log_ratio_NV = parent_NV - log_softmax(head(part_ND))
        return (parent_NV.exp() * log_ratio_NV.masked_fill(parent_NV == float("-inf"), 0.0)).sum(-1)

    return torch.cat(in_chunks(divergence, hidden_ND, parent_ND, chunk))


def alignment(noisy_LND: Sequence[Tensor], clean_LND: Sequence[Tensor]) -> Tensor:
    """`1 - cos` of the hidden states [N, D] of noisy and clean rows, summed over predictions and averaged over layers.

    Source: REPR-ALIGN (2605.06885); no gradient reaches the clean rows.
    """
    wide = torch.promote_types(noisy_LND[0].dtype, torch.float32)
    sums = [
        (1 - F.cosine_similarity(noisy_ND.to(wide), clean_ND.detach().to(wide), dim=-1)).sum()
        for noisy_ND, clean_ND in zip(noisy_LND, clean_LND, strict=True)
    ]
    return torch.stack(sums).mean()


def preference_loss(margin_P: Tensor, beta: float) -> Tensor:
    """`-log sigmoid(beta * margin)` of each pair; log 2 where policy and reference agree.

    Args:
        margin_P: `[B(theta, x_w) - B(ref, x_w)] - [B(theta, x_l) - B(ref, x_l)]`, B the ELBO of all response tokens (nats).
        beta: strength of the pull towards the reference.

    Source: LLaDA2.0 Eq. 7; VRPO (2505.19223) Eq. 4. Departs: sign, as in `elbo_weight`.
    """
    return -F.logsigmoid(beta * margin_P)


def elbo_gains(
    policy_N: Tensor, reference_N: Tensor, weight_N: Tensor, row_N: Tensor, sample_N: Tensor, shape: tuple[int, int]
) -> Tensor:
    """ELBO of the policy less that of the reference, by row and noise sample.

    Args:
        policy_N, reference_N: negative log-likelihoods of the same masked tokens under the same noise (nats).
        weight_N: 1/t weights.
        row_N, sample_N: row and noise sample (both from 0) of each prediction.
        shape: (rows, samples).

    Returns:
        [rows, samples] in nats, summed over tokens; exactly zero where policy and reference agree.

    Source: VRPO (2505.19223) Eq. 6: policy and reference share t and mask, so their noise cancels.
    """
    gain_N = weight_N * (reference_N - policy_N)
    flat = torch.zeros(shape[0] * shape[1], dtype=gain_N.dtype, device=gain_N.device)
    return flat.index_add(0, row_N * shape[1] + sample_N, gain_N).view(shape)


def nelbo(nll_N: Tensor, weight_N: Tensor) -> Tensor:
    """`sum_i w_i nll_i`: the NELBO of a micro-batch in nats.

    Args:
        nll_N: float32 negative log-likelihoods of the masked tokens.
        weight_N: their weights, 1/t.

    Returns:
        Scalar. The sum over micro-batches, divided by the maskable tokens of the *global* batch (counted once per noisy copy),
        is the NELBO per token.

    Source: LLaDA2.0 Eqs 1, 5. Departs: sign (see `elbo_weight`) and global instead of per-micro-batch normalisation.
    """
    return (nll_N * weight_N).sum()
