"""The plain definition of a draw, which `unmask.diffusion.draw` equals: rows sorted whole, sums over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.diffusion.decode import scaled_probabilities
from unmask.diffusion.draw import DrawOptions


def filtered_probabilities(logits_NV: Tensor, params: DrawOptions) -> Tensor:
    """Distribution that a draw uses: temperature, then min-p, top-k, top-p; float32 [N, V]."""
    return filtered(scaled_probabilities(logits_NV, params.temperature), params)


def filtered(probabilities_NV: Tensor, params: DrawOptions) -> Tensor:
    """The distribution of the tokens that the filters keep."""
    kept = probabilities_NV >= params.min_p * probabilities_NV.amax(-1, keepdim=True)
    if params.top_k is not None and params.top_k < probabilities_NV.shape[-1]:
        kept &= probabilities_NV >= probabilities_NV.topk(params.top_k, dim=-1).values[:, -1:]
    if params.min_p or params.top_k is not None:
        probabilities_NV = probabilities_NV.masked_fill(~kept, 0.0)
        probabilities_NV = probabilities_NV / probabilities_NV.sum(-1, keepdim=True)
    if params.top_p is not None and params.top_p < 1.0:
        ordered, order = probabilities_NV.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        drop = torch.zeros_like(before, dtype=torch.bool).scatter_(1, order, before >= params.top_p)
        probabilities_NV = probabilities_NV.masked_fill(drop, 0.0)
        probabilities_NV = probabilities_NV / probabilities_NV.sum(-1, keepdim=True)
    return probabilities_NV


def plain_draw(probabilities_NV: Tensor, u_N: Tensor, params: DrawOptions) -> Tensor:
    """The token at `u_N` of the cumulative distribution."""
    cdf_NV = filtered(probabilities_NV, params).double().cumsum(-1)
    token_N1 = torch.searchsorted(cdf_NV, (u_N * cdf_NV[:, -1])[:, None], right=True)
    return token_N1[:, 0]
