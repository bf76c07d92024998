"""Rounding of weights to 8 and 4 bits, and the layout of these and of floats."""

from __future__ import annotations

import pytest
import torch

from unmask.models.native.quantize import (
    GROUP,
    PANEL,
    GroupedMatrix,
    PackedMatrix,
    group_grid,
    pack,
    pack_floats,
    quantize,
    round_bytes,
    round_codes,
)


def unpack(packed: PackedMatrix) -> torch.Tensor:
    """The matrix [N padded, K padded] that a packed one stands for, one by one as `linear.h` describes its layout."""
    assert packed.scale is not None
    out = torch.zeros(len(packed.scale), packed.depth)
    panels, groups = packed.weight.flatten(1).tolist(), packed.depth // GROUP
    for n, unit in enumerate(packed.scale):
        bytes_, channel = panels[n // PANEL], n % PANEL
        codes = -(-groups * 2 * PANEL // 64) * 64
        for k in range(packed.depth):
            if packed.bits == 8:
                out[n, k] = (bytes_[(k // 4 * PANEL + channel) * 4 + k % 4] - 128) * unit
                continue
            code = bytes_[codes + (k // 8 * PANEL + channel) * 4 + k % 4] >> k // 4 % 2 * 4 & 15
            multiple, zero = (bytes_[(k // GROUP * 2 + i) * PANEL + channel] for i in (0, 1))
            out[n, k] = code * (multiple * unit) - (multiple * unit) * zero / 16
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 32), (5, 7), (33, 70)])
def test_packing_keeps_every_weight(bits: int, shape: tuple[int, int]) -> None:
    matrix = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), bits)
    packed = pack(matrix)
    whole = unpack(packed)
    assert torch.equal(whole[: shape[0], : shape[1]], matrix.dequantize())
    assert whole[shape[0] :].count_nonzero() == 0
    if bits == 8:
        assert whole[:, shape[1] :].count_nonzero() == 0
    else:
        assert packed.weight.shape[1] % 64 == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_outputs_packed_in_parts_are_slices_of_the_whole(bits: int) -> None:
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    whole, first, last = (pack(quantize(rows, bits)) for rows in (weight, weight[:32], weight[32:]))
    assert whole.scale is not None
    assert first.scale is not None
    assert last.scale is not None
    assert torch.equal(whole.weight, torch.cat((first.weight, last.weight)))
    assert torch.equal(whole.scale, torch.cat((first.scale, last.scale)))


@pytest.mark.parametrize("is_narrow", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_keeps_every_float(dtype: torch.dtype, is_narrow: bool) -> None:
    """In bfloat16 where that is exact, whatever the dtype; over several parts."""
    weight = torch.randn(4100, 7, generator=torch.Generator().manual_seed(0))
    packed = pack_floats((weight.bfloat16() if is_narrow else weight).to(dtype))
    weight = weight.bfloat16().float() if is_narrow or dtype == torch.bfloat16 else weight
    assert packed.bits == (16 if is_narrow or dtype == torch.bfloat16 else 32)
    step = 32 // packed.bits
    assert packed.weight.shape == (257, 16 // step, PANEL, step)
    whole = packed.weight.float().transpose(1, 2).reshape(257 * PANEL, 16)
    assert torch.equal(whole[:4100, :7], weight)
    assert whole[4100:].count_nonzero() == whole[:, 7:].count_nonzero() == 0


def test_8_bits_err_by_half_a_step_at_most() -> None:
    weight = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    matrix = round_bytes(weight)
    assert matrix.integers_NK.abs().amax(1).eq(127).all()
    assert ((matrix.dequantize() - weight).abs() <= matrix.scale_N[:, None] * 0.5001).all()


def test_4_bits_err_by_half_a_step_of_their_group() -> None:
    """A little more at the ends, as scales and minima are rounded themselves."""
    weight = torch.randn(50, 320, generator=torch.Generator().manual_seed(0)) + 0.5
    weight[:, 32:64] *= 0.2
    matrix = round_codes(weight)
    step_NK = matrix.grid.scale_NG.repeat_interleave(GROUP, dim=1)
    assert ((matrix.dequantize() - weight).abs() <= step_NK * 0.7).all()
    assert matrix.grid.scale_NG[:, 1].mean() < 0.3 * matrix.grid.scale_NG[:, 0].mean()
    # Rounding scales and minima costs little over ideal ones.
    groups = weight.unflatten(1, (-1, GROUP))
    least, most = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    ideal = (((groups - least) / (most - least) * 15).round() * (most - least) / 15 + least).flatten(1)
    assert (matrix.dequantize() - weight).norm() < 1.02 * (ideal - weight).norm()


def test_a_grid_is_near_the_scales_and_minima_asked_for_and_its_own_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(20, 9, generator=generator) + 0.1
    minimum = -scale * 15 * torch.rand(20, 9, generator=generator)
    grid = group_grid(scale, minimum)
    assert ((grid.scale_NG - scale).abs() <= grid.unit_N[:, None] * 0.501).all()
    assert ((grid.minimum_NG - minimum).abs() <= grid.scale_NG / 31).all()
    again = group_grid(grid.scale_NG, grid.minimum_NG)
    assert torch.equal(again.zero_NG, grid.zero_NG)
    torch.testing.assert_close(again.scale_NG, grid.scale_NG)
    codes = torch.randint(0, 16, (20, 9 * GROUP), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack(pack(GroupedMatrix(codes, grid)))[:20], GroupedMatrix(codes, grid).dequantize())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_zero_matrix_stays_zero(bits: int) -> None:
    matrix = quantize(torch.zeros(3, 40), bits)
    assert matrix.dequantize().count_nonzero() == 0
    packed = pack(matrix)
    assert packed.scale is not None
    assert packed.scale.isfinite().all()
