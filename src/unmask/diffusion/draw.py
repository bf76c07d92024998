"""Draws from the vocabulary: temperature, min-p, top-k and top-p, and the inverse distribution function.

Owns which tokens may be drawn and which one is. No row is sorted whole unless its distribution is flat: the tokens that filters
keep are the most probable ones, and those are found through the maxima of small blocks of the vocabulary.

Legend: N rows, V vocabulary, B blocks of it, S tokens looked at.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK = 32
"""Tokens in a block of the vocabulary that only its maximum speaks for."""
_NUM_BLOCKS = (64, 512)
"""Blocks, those of the greatest maxima, that are looked at, until they hold all that the filters keep."""
_STRETCH = 256
"""Tokens that are added up at once where nothing is filtered."""


class DrawOptions(Protocol):
    """The decoding options of a draw. Temperature 0 is argmax; `top_k` and `top_p` None and `min_p` 0 are off."""

    @property
    def temperature(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def seed(self) -> int: ...


def draw(probabilities_NV: Tensor, u_N: Tensor, params: DrawOptions) -> Tensor:
    """A token of every row, drawn in the order of ids: the first whose cumulative probability is above `u_N` of that of all.

    Min-p keeps the tokens that have at least `min_p` of the greatest probability; top-k of those the `top_k` most probable, and
    every token as probable as the last of them; top-p of those the smallest set whose mass, as a share of theirs, reaches
    `top_p`, at least one: of equally probable tokens those of lowest id.

    Args:
        probabilities_NV: float32, at the temperature of the draw.
        u_N: float64 in [0, 1).
        params: the filters.

    Returns:
        int64 [N]. A row's token does not depend on the other rows.
    """
    vocab_size = probabilities_NV.shape[-1]
    top_k = params.top_k if params.top_k is not None and params.top_k < vocab_size else 0
    if not top_k and not params.min_p and params.top_p in (None, 1):
        return _draw_from_all(probabilities_NV, u_N)
    is_settled_N, token_N = _draw_from_blocks(probabilities_NV, u_N, params, _NUM_BLOCKS[0])
    for num_blocks in (*_NUM_BLOCKS[1:], vocab_size):
        rows = torch.nonzero(~is_settled_N)[:, 0]
        if not len(rows):
            break
        is_settled_N[rows], token_N[rows] = _draw_from_blocks(probabilities_NV[rows], u_N[rows], params, num_blocks)
    return token_N


def _draw_from_all(probabilities_NV: Tensor, u_N: Tensor) -> Tensor:
    """A draw without filters: the stretch of the vocabulary first, then the token in it."""
    vocab_size = probabilities_NV.shape[-1]
    stretches = pad(probabilities_NV, (0, -vocab_size % _STRETCH)).view(len(u_N), -1, _STRETCH)
    cdf_NB = stretches.sum(-1, dtype=torch.float64).cumsum(-1)
    u_N1 = u_N[:, None] * cdf_NB[:, -1:]
    stretch_N1 = _invert(cdf_NB, u_N1)
    inside_NS = stretches.gather(1, stretch_N1[..., None].expand(-1, -1, _STRETCH))[:, 0]
    before_N1 = pad(cdf_NB, (1, 0)).gather(1, stretch_N1)
    offset_N1 = _invert(inside_NS.cumsum(-1, dtype=torch.float64), u_N1 - before_N1)
    return (stretch_N1 * _STRETCH + offset_N1)[:, 0]


def _invert(cdf_NK: Tensor, u_N1: Tensor) -> Tensor:
    """The first index whose cumulative mass is above u, [N, 1]; whatever the rounding, none without mass."""
    total_N1 = cdf_NK[:, -1:]
    below_N1 = torch.minimum(u_N1, total_N1.nextafter(torch.zeros_like(total_N1)))
    return torch.searchsorted(cdf_NK, below_N1, right=True).clamp(max=cdf_NK.shape[1] - 1)


def _draw_from_blocks(probabilities_NV: Tensor, u_N: Tensor, params: DrawOptions, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Draws from the blocks of the greatest maxima.

    Returns:
        bool [N], whether these hold all that the filters keep, and tokens int64 [N], valid where they do.
    """
    id_NS, p_NS, outside_N1 = _largest_blocks(probabilities_NV, num_blocks)
    count_N1, last_N1, needed_N1 = _kept(_descending(p_NS), params)
    is_kept_NS = p_NS >= last_N1
    if bool((is_kept_NS.sum(-1, keepdim=True) > count_N1).any()):
        is_tied_NS = p_NS == last_N1  # of these the first ones
        num_tied_N1 = count_N1 - (p_NS > last_N1).sum(-1, keepdim=True)
        is_kept_NS &= ~is_tied_NS | (is_tied_NS.cumsum(-1) <= num_tied_N1)
    cdf_NS = p_NS.where(is_kept_NS, 0.0).cumsum(-1, dtype=torch.float64)
    drawn_N1 = _invert(cdf_NS, u_N[:, None] * cdf_NS[:, -1:])
    return (needed_N1 > outside_N1)[:, 0], id_NS.gather(1, drawn_N1)[:, 0]


def _largest_blocks(probabilities_NV: Tensor, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks of the vocabulary with the greatest maxima.

    Returns:
        Ascending ids int64 [N, S], their probabilities, and the greatest probability of any other token, [N, 1].
    """
    num_rows, vocab_size = probabilities_NV.shape
    if num_blocks * _BLOCK >= vocab_size:
        id_NV = torch.arange(vocab_size, device=probabilities_NV.device).expand(num_rows, -1)
        return id_NV, probabilities_NV, probabilities_NV.new_full((num_rows, 1), -1.0)
    blocks = pad(probabilities_NV, (0, -vocab_size % _BLOCK)).view(num_rows, -1, _BLOCK)
    maxima = blocks.amax(-1).topk(num_blocks + 1)
    block_NB1 = maxima.indices[:, :num_blocks].sort(-1).values[..., None]
    p_NS = blocks.gather(1, block_NB1.expand(-1, -1, _BLOCK)).flatten(1)
    offset = torch.arange(_BLOCK, device=probabilities_NV.device)
    return (block_NB1 * _BLOCK + offset).flatten(1), p_NS, maxima.values[:, -1:]


def _descending(p_NS: Tensor) -> Tensor:
    """Sorted rows; on a CPU by NumPy, which sorts numbers without their places many times faster."""
    if p_NS.device.type != "cpu":
        return p_NS.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(p_NS.detach().numpy(), axis=-1)).flip(-1)


def _kept(sorted_NS: Tensor, params: DrawOptions) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the tokens, sorted by falling probability, the filters keep.

    Returns:
        The number int64 [N, 1], at least one; the least probability that is kept; and the least that was looked at for it.
    """
    kept_NS = sorted_NS >= params.min_p * sorted_NS[:, :1]
    if params.top_k is not None and params.top_k < sorted_NS.shape[1]:
        kept_NS &= sorted_NS >= sorted_NS[:, params.top_k - 1 : params.top_k]
    count_N1 = kept_NS.sum(-1, keepdim=True).clamp(min=1)
    last_N1 = needed_N1 = sorted_NS.gather(1, count_N1 - 1)
    if params.top_p is not None and params.top_p < 1.0:
        shares_NS = sorted_NS
        if params.min_p or params.top_k is not None:
            shares_NS = sorted_NS / sorted_NS.where(kept_NS, 0.0).sum(-1, keepdim=True, dtype=torch.float64).float()
        # Added up in float64 and rounded, as torch's cumulative sum of a whole sorted row on a CPU.
        kept_NS &= shares_NS.cumsum(-1, dtype=torch.float64).float() - shares_NS < params.top_p
        count_N1 = kept_NS.sum(-1, keepdim=True).clamp(min=1)
        last_N1 = sorted_NS.gather(1, count_N1 - 1)
        if shares_NS is sorted_NS:
            needed_N1 = last_N1
    return count_N1, last_N1, needed_N1
