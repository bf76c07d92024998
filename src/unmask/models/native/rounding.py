"""Rounding of weights to 4 bits by the inputs that they multiply: least squares, and GPTQ.

Owns the choice of scales, minima and codes. What grids there are and how they are packed is `quantize`'s; where inputs come
from, `calibration`'s.

Source: GPTQ (2210.17323) Algorithm 1; scales and minima as llama.cpp's k-quants find them (weighted least squares for some
spacings). Departs: GPTQ's grids are fixed before it begins, and columns come in the order of their mean square input.

Legend: N outputs, K inputs, G groups, g inputs of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.native.quantize import GROUP, TOP, GroupedMatrix, GroupGrid, group_grid, groups_of, round_to

_SPACINGS = tuple(0.1 * number for number in range(-12, 9, 2))
"""Added to the number of steps between a group's ends."""
_CACHED = 2**16
"""Numbers that are worked on at a time: they stay in the second-level cache."""
_DAMPINGS = (0.01, 0.1, 1.0)


def fit_grid(weight_NK: Tensor, importance_K: Tensor | None) -> GroupGrid:
    """Scales and minima of the least squared error.

    Args:
        weight_NK: any floating dtype.
        importance_K: how much the error of an input counts, such as its mean square; None: equally.
    """
    inputs = weight_NK.shape[1]
    padding = -inputs % GROUP
    weight_Gg = torch.ones(inputs) if importance_K is None else importance_K.float()
    weight_Gg = F.pad(weight_Gg, (0, padding)).clamp_min(1e-20).unflatten(0, (-1, GROUP))
    fitted = []
    for rows in weight_NK.split(max(_CACHED // (inputs + padding), 1)):
        fitted.append(_fit(groups_of(rows), weight_Gg))
    scale_NG, minimum_NG = (torch.cat(each) for each in zip(*fitted, strict=True))
    return group_grid(scale_NG, minimum_NG)


def _fit(groups_NGg: Tensor, weight_Gg: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima [N, G]: the best of some spacings, each refined for its codes."""
    low = groups_NGg.amin(-1, keepdim=True).clamp_max(0)
    span = (groups_NGg.amax(-1, keepdim=True).clamp_min(0) - low).clamp_min(1e-12)
    total = weight_Gg.sum(-1, keepdim=True)
    weighted_NGg = groups_NGg * weight_Gg
    sum_x = weighted_NGg.sum(-1, keepdim=True)
    best_scale, best_low = span / TOP, low
    least = torch.full_like(span, torch.inf)
    for extra in _SPACINGS:
        codes = (groups_NGg - low).mul_((TOP + extra) / span).round_().clamp_(0, TOP)
        weighted_codes = codes * weight_Gg
        sum_c, sum_cc = weighted_codes.sum(-1, keepdim=True), (weighted_codes * codes).sum(-1, keepdim=True)
        sum_cx = (weighted_codes * groups_NGg).sum(-1, keepdim=True)
        determinant = total * sum_cc - sum_c * sum_c
        is_solvable = determinant > 1e-6 * total * sum_cc
        determinant = torch.where(is_solvable, determinant, 1.0)
        scale = (total * sum_cx - sum_c * sum_x) / determinant
        minimum = ((sum_cc * sum_x - sum_c * sum_cx) / determinant).clamp_max(0)
        # Zero lies in the range of every group: where the minimum would be above, the scale alone is fitted.
        scale = torch.where(minimum < 0, scale, sum_cx / sum_cc.clamp_min(1e-20))
        error = ((codes * scale).add_(minimum).sub_(groups_NGg).square_() * weight_Gg).sum(-1, keepdim=True)
        is_better = (error < least) & is_solvable & (scale > 0)
        best_scale, best_low = torch.where(is_better, scale, best_scale), torch.where(is_better, minimum, best_low)
        least = torch.where(is_better, error, least)
    return best_scale[..., 0], best_low[..., 0]


class Gptq:
    """GPTQ for the matrices that read the same inputs.

    Args:
        hessian_KK: sum of x x^T over inputs x. Where it has no inverse even when it is damped, matrices are rounded by least
            squares alone.
    """

    def __init__(self, hessian_KK: Tensor) -> None:
        self.importance_K = hessian_KK.diagonal().clone()
        mean = self.importance_K.mean().clamp_min(1e-12)
        self._order_K = self.importance_K.argsort(descending=True, stable=True)
        ordered = hessian_KK[self._order_K][:, self._order_K]
        self._upper_KK = _upper_factor(ordered, mean)

    def __call__(self, weight_NK: Tensor) -> GroupedMatrix:
        """Round a matrix, or some rows of one: errors are made up for by the inputs still to be rounded."""
        grid = fit_grid(weight_NK, self.importance_K)
        if self._upper_KK is None:
            return round_to(weight_NK, grid)
        upper_KK, size = self._upper_KK, weight_NK.shape[1]
        work_KN = weight_NK.float().T[self._order_K].contiguous()
        group_K = (self._order_K // GROUP).tolist()
        scale_GN, minimum_GN = grid.scale_NG.T.contiguous(), grid.minimum_NG.T.contiguous()
        codes_KN = torch.empty(size, len(weight_NK), dtype=torch.uint8)
        for start in range(0, size, GROUP):
            stop = min(start + GROUP, size)
            errors = torch.empty(stop - start, len(weight_NK))
            for column in range(start, stop):
                scale, minimum = scale_GN[group_K[column]], minimum_GN[group_K[column]]
                codes = ((work_KN[column] - minimum) / scale).round_().clamp_(0, TOP)
                codes_KN[column] = codes
                error = errors[column - start]
                torch.sub(work_KN[column], codes.mul_(scale).add_(minimum), out=error)
                error /= upper_KK[column, column]
                work_KN[column + 1 : stop].addr_(upper_KK[column, column + 1 : stop], error, alpha=-1)
            work_KN[stop:].addmm_(upper_KK[start:stop, stop:].T, errors, alpha=-1)
        codes_NK = torch.empty(len(weight_NK), size, dtype=torch.uint8)
        codes_NK[:, self._order_K] = codes_KN.T
        return GroupedMatrix(codes_NK, grid)


def _upper_factor(hessian_KK: Tensor, mean: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse, damped by as little of the mean diagonal as it takes; None: it has none."""
    for damping in _DAMPINGS:
        damped = hessian_KK.clone()
        damped.diagonal().add_(mean * damping)
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if info.item() == 0 and torch.isfinite(upper).all():
                factor: Tensor = upper
                return factor
    return None
