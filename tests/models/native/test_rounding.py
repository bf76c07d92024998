"""Rounding to 4 bits for the inputs that matter: what takes more effort loses less, and rows are independent."""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.models.native.quantize import round_codes, round_to
from unmask.models.native.rounding import Gptq, fit_grid


def inputs_and_weight() -> tuple[Tensor, Tensor]:
    """Correlated inputs, some of them loud, and a matrix whose last group is not full."""
    generator = torch.Generator().manual_seed(0)
    loud = torch.rand(80, generator=generator) ** 4 * 4 + 0.1
    inputs = torch.randn(400, 80, generator=generator) @ torch.randn(80, 80, generator=generator) * loud
    return inputs, torch.randn(48, 80, generator=generator)


def test_what_takes_more_effort_loses_less() -> None:
    inputs, weight = inputs_and_weight()
    gptq = Gptq(inputs.T @ inputs)
    squares = inputs.square().sum(0)
    found = [
        round_codes(weight),
        round_to(weight, fit_grid(weight, None)),
        round_to(weight, fit_grid(weight, squares)),
        gptq(weight),
    ]
    for matrix in found:
        assert matrix.codes_NK.shape == weight.shape
        assert matrix.codes_NK.max() <= 15
    nearest, plain, weighted, best = (((each.dequantize() - weight) @ inputs.T).norm().item() for each in found)
    assert nearest > weighted > best > 0
    assert (found[0].dequantize() - weight).norm() > (found[1].dequantize() - weight).norm()
    assert plain > weighted


def test_rows_are_rounded_by_themselves() -> None:
    inputs, weight = inputs_and_weight()
    gptq = Gptq(inputs.T @ inputs)
    whole, part = gptq(weight), gptq(weight[16:32])
    assert torch.equal(whole.dequantize()[16:32], part.dequantize())


def test_matrices_on_a_grid_and_without_inputs_stay_as_they_are() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (8, 64), generator=generator)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes - 6).float() * 0.25
    assert torch.allclose(round_to(weight, fit_grid(weight, None)).dequantize(), weight, atol=1e-5)
    for unusable in (torch.full((64, 64), torch.nan), torch.full((64, 64), 1e30)):
        assert Gptq(unusable)(weight).codes_NK.shape == weight.shape
    zeros = Gptq(torch.zeros(64, 64))(torch.zeros(8, 64))
    assert torch.equal(zeros.dequantize(), torch.zeros(8, 64))
