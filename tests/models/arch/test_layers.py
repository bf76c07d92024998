"""Hand-written backward passes of the norm and the gate, against what they stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.models.arch.layers import FeedForward, RMSNorm


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def norm_of(size: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(size, 1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    return norm


def gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return torch.autograd.grad(out, inputs, cotangent)


def assert_same(one: Tensor, other: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Equal outputs and gradients, dtypes included, within some roundings."""
    tolerance = 20 * torch.finfo(one.dtype).eps
    for mine, theirs in zip((one, *gradients(one, *inputs)), (other, *gradients(other, *inputs)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance * float(theirs.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.transpose(1, 2)], ids=["whole", "transposed"])
def test_norm_is_x_over_rms_and_so_are_its_gradients(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    norm = norm_of(24, dtype)
    leaf = torch.randn(2, 5, 3, 24, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    x = layout(leaf)
    assert_same(norm(x), plain_norm(x, norm.weight, norm.eps), (leaf, norm.weight))


def test_norm_of_zeros_is_zero() -> None:
    norm, x = norm_of(4, torch.float32), torch.zeros(2, 4, requires_grad=True)
    out = norm(x)
    assert not out.any()
    torch.testing.assert_close(gradients(out, x), gradients(plain_norm(x, norm.weight, norm.eps), x))


def test_norm_leaves_what_it_reads_alone() -> None:
    norm, x = norm_of(8, torch.float32), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone(), norm.weight.clone()
    norm(x)
    assert torch.equal(x, before[0])
    assert torch.equal(norm.weight, before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_feed_forward_is_swiglu_and_so_are_its_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = FeedForward(12, 20, bias=True).to(dtype)
    x = torch.randn(2, 7, 12).to(dtype).requires_grad_()
    gate, up = layer.gate_up(x).chunk(2, dim=-1)
    assert_same(layer(x), layer.down(F.silu(gate) * up), (x, *layer.parameters()))
