"""Rounding of weights to 8 and 4 bits, and the layout of these and of floats."""

from __future__ import annotations

import pytest
import torch

from unmask.models.native.quantize import GROUP, PANEL, PackedMatrix, QuantizedMatrix, pack, pack_floats, quantize


def unpack(packed: PackedMatrix) -> torch.Tensor:
    """The integers [N, K padded] that a packed matrix holds, one by one as `linear.h` describes its layout."""
    assert packed.scale is not None
    out = torch.zeros(len(packed.scale), packed.depth, dtype=torch.int64)
    bytes_ = packed.weight.flatten().tolist()
    for n in range(len(packed.scale)):
        panel, channel = divmod(n, PANEL)
        for k in range(packed.depth):
            if packed.bits == 8:
                step = panel * packed.depth // 4 + k // 4
                out[n, k] = bytes_[(step * PANEL + channel) * 4 + k % 4] - 128
                continue
            pair, within = divmod(k, 8)
            at = ((panel * packed.depth // 8 + pair) * PANEL + channel) * 4 + within % 4
            assert packed.group_scale is not None
            multiple = int(packed.group_scale.flatten()[(panel * packed.depth // GROUP + k // GROUP) * PANEL + channel])
            out[n, k] = ((bytes_[at] >> 4 * (within // 4) & 15) - 8) * multiple
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(16, 32), (5, 7), (33, 70)])
def test_packing_keeps_every_integer(bits: int, shape: tuple[int, int]) -> None:
    matrix = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), bits)
    whole = unpack(pack(matrix))
    assert torch.equal(whole[: shape[0], : shape[1]], matrix.integers_NK.long())
    assert whole[shape[0] :].count_nonzero() == whole[:, shape[1] :].count_nonzero() == 0


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
    matrix = quantize(weight, 8)
    assert matrix.integers_NK.abs().amax(1).eq(127).all()
    assert ((matrix.dequantize() - weight).abs() <= matrix.scale_N[:, None] * 0.5001).all()


def test_4_bits_err_by_half_a_step_of_their_group_at_most() -> None:
    weight = torch.randn(50, 320, generator=torch.Generator().manual_seed(0))
    weight[:, 32:64] *= 0.2
    matrix = quantize(weight, 4)
    assert matrix.multiple_NG is not None
    step = (matrix.multiple_NG * matrix.scale_N[:, None]).repeat_interleave(GROUP, dim=1)
    assert ((matrix.dequantize() - weight).abs() <= step * 0.5001).all()
    # A quiet group has a finer step than a loud one.
    assert (matrix.multiple_NG[:, 1] < matrix.multiple_NG[:, 0]).all()
    # Rounding to whole multiples costs little over ideal group scales.
    groups = weight.unflatten(1, (-1, GROUP))
    ideal_step = groups.abs().amax(2, keepdim=True) / 7
    ideal = ((groups / ideal_step).round() * ideal_step).flatten(1)
    assert (matrix.dequantize() - weight).norm() < 1.15 * (ideal - weight).norm()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_zero_matrix_stays_zero(bits: int) -> None:
    matrix = quantize(torch.zeros(3, 40), bits)
    assert isinstance(matrix, QuantizedMatrix)
    assert matrix.dequantize().count_nonzero() == 0
    assert matrix.scale_N.isfinite().all()
