"""What training minimises: the negative evidence lower bound over masked positions.

Owns cross-entropy at predicted positions and the NELBO. Knows tensors only; normalisers come in as arguments because only
the trainer knows the global batch.

Legend: N predictions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def ban_mask(logits: Tensor, mask_id: int) -> Tensor:
    """Logits [..., V] with the mask token at -inf: it is never a prediction."""
    banned = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(banned, float("-inf"))


def token_nll(
    head: Callable[[Tensor], Tensor], hidden_ND: Tensor, target_N: Tensor, mask_id: int, *, chunk: int = 2048
) -> Tensor:
    """Negative log-likelihood of each target under same-position prediction (no shift).

    The vocabulary is projected for the given positions only, `chunk` of them at a time; with more than one chunk each is
    recomputed in the backward pass, so that [N, V] never exists at once.

    Args:
        head: hidden states to logits.
        hidden_ND: hidden states at predicted positions.
        target_N: int64 clean tokens, never `mask_id`.
        mask_id: banned from the prediction.
        chunk: positions projected at once.

    Returns:
        float32 [N] in nats.
    """

    def nll(part_ND: Tensor, part_N: Tensor) -> Tensor:
        return F.cross_entropy(ban_mask(head(part_ND).float(), mask_id), part_N, reduction="none")

    if len(target_N) <= chunk:
        return nll(hidden_ND, target_N)
    pieces = zip(hidden_ND.split(chunk), target_N.split(chunk), strict=True)
    return torch.cat([checkpoint(nll, part, target, use_reentrant=False) for part, target in pieces])


def nelbo(nll_N: Tensor, weight_N: Tensor, num_maskable: int) -> Tensor:
    """`(1 / num_maskable) sum_i w_i nll_i`: the NELBO per maskable token, in nats.

    Args:
        nll_N: float32 negative log-likelihoods of the masked tokens (of this micro-batch).
        weight_N: their weights, 1/t.
        num_maskable: maskable tokens of the *global* batch, over all ranks and micro-batches, counted once per noisy copy.

    Returns:
        Scalar; summed over micro-batches it is the batch's NELBO. Zero, never NaN, where nothing is maskable.

    Source: LLaDA2.0 Eqs 1, 5. Departs: sign (see `elbo_weight`) and global instead of per-micro-batch normalisation.
    """
    return (nll_N * weight_N).sum() / max(num_maskable, 1)


def exact_block_nelbo(nll_of: Callable[[Sequence[int]], Tensor], maskable: Sequence[int]) -> Tensor:
    """The NELBO of one block by enumeration of its 2^m - 1 masks (m maskable positions): exact, for small blocks.

    `sum_{S nonempty} 1 / (m C(m, |S|)) (m / |S|) sum_{i in S} nll_i(S)`.

    Args:
        nll_of: gives the negative log-likelihoods of the tokens at the masked positions S, summed or as a vector.
        maskable: positions that may be masked.

    Returns:
        Scalar in nats, *not* divided by the number of tokens.

    Source: LLaDA2.0 Eq. 1 integrated over t: a rate drawn uniformly makes every mask size 1..m equally likely.
    """
    m = len(maskable)
    total = torch.zeros((), dtype=torch.float64)
    for size in range(1, m + 1):
        for masked in combinations(maskable, size):
            total = total + nll_of(masked).double().sum() / (m * comb(m, size)) * (m / size)
    return total
