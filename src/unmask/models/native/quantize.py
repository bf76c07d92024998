"""Weight quantisation to 8 or 4 bits, and the layout of quantised and of float matrices that `linear.h` describes.

Owns rounding and packing of one matrix. Knows neither models nor how the kernels are called.

Legend: N outputs, K inputs, P panels of 16 outputs, G groups of inputs: 32, or those that share four
bytes of a panel; c outputs of a panel, s inputs of a group. Depths of all but 4 bits are multiples of STEP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
GROUP = 32
STEP = 16
# Of a matrix that are packed at a time.
_ROWS = 4096
# The largest multiple of a group's step that keeps (q - 8) * multiple + 128 in a byte.
_MAX_MULTIPLE = 16


@dataclass(frozen=True)
class QuantizedMatrix:
    """Signed integers and one scale per output: `weight = integers * scale`.

    With 4 bits the integers are `q * multiple`, q in -8..7 and one multiple in 1..16 per group, so that products of both
    widths are exact sums of bytes.
    """

    integers_NK: Tensor
    scale_N: Tensor
    multiple_NG: Tensor | None

    def dequantize(self) -> Tensor:
        """The float32 matrix [N, K] that the integers stand for."""
        return self.integers_NK.float() * self.scale_N[:, None]


def quantize(weight_NK: Tensor, bits: int) -> QuantizedMatrix:
    """Round a matrix to `bits` (8 or 4) bits, symmetric around 0."""
    weight_NK = weight_NK.float()
    if bits == 8:
        scale_N = weight_NK.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        return QuantizedMatrix((weight_NK / scale_N[:, None]).round().to(torch.int8), scale_N, None)
    groups_NGk = F.pad(weight_NK, (0, -weight_NK.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    peak_NG = groups_NGk.abs().amax(dim=2)
    # A group's peak lies at 7 steps, the largest group's step is 16 units.
    scale_N = peak_NG.amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / (7 * _MAX_MULTIPLE)
    multiple_NG = (peak_NG / (7 * scale_N[:, None])).ceil().clamp(1, _MAX_MULTIPLE)
    step_NG1 = (multiple_NG * scale_N[:, None])[..., None]
    q_NGk = (groups_NGk / step_NG1).round().clamp(-8, 7)
    integers = (q_NGk * multiple_NG[..., None]).flatten(1)[:, : weight_NK.shape[1]]
    return QuantizedMatrix(integers.to(torch.int8), scale_N, multiple_NG.to(torch.uint8))


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix as the kernels read it; `depth` is K padded with zeros, `bits` 8 or 4, 16 (bfloat16) or 32 (float32)."""

    bits: int
    outputs: int
    depth: int
    weight: Tensor
    group_scale: Tensor | None
    scale: Tensor | None


def pack_floats(weight_NK: Tensor) -> PackedMatrix:
    """Bring a float matrix into panels, some rows at a time: bfloat16 if that holds every weight exactly, else float32."""
    dtype = exact_dtype(weight_NK)
    outputs, inputs = weight_NK.shape
    depth, step = inputs + -inputs % STEP, 4 // dtype.itemsize
    panels_PGcs = torch.empty(-(-outputs // PANEL), depth // step, PANEL, step, dtype=dtype)
    for panels, rows in zip(panels_PGcs.split(_ROWS // PANEL), weight_NK.split(_ROWS), strict=True):
        padded = F.pad(rows.to(dtype), (0, depth - inputs, 0, -len(rows) % PANEL))
        panels.copy_(padded.view(-1, PANEL, depth // step, step).transpose(1, 2))
    return PackedMatrix(8 * dtype.itemsize, outputs, depth, panels_PGcs, None, None)


def exact_dtype(weight_NK: Tensor) -> torch.dtype:
    """bfloat16 if that holds every number of a float matrix exactly, else float32."""
    is_narrow = all(torch.equal(rows.bfloat16().float(), rows.float()) for rows in weight_NK.split(_ROWS))
    return torch.bfloat16 if is_narrow else torch.float32


def pack(matrix: QuantizedMatrix) -> PackedMatrix:
    """Bring a quantised matrix into panels."""
    outputs, inputs = matrix.integers_NK.shape
    rows = -outputs % PANEL
    scale = F.pad(matrix.scale_N, (0, rows))
    if matrix.multiple_NG is None:
        depth = inputs + -inputs % STEP
        padded = F.pad(matrix.integers_NK, (0, depth - inputs, 0, rows))
        panels = padded.view(-1, PANEL, depth // 4, 4).transpose(1, 2).contiguous()
        # Bytes w + 128: flipping the sign bit of a signed byte.
        return PackedMatrix(8, outputs, depth, panels.view(torch.uint8).bitwise_xor_(128), None, scale)
    depth = inputs + -inputs % GROUP
    multiple_NG = F.pad(matrix.multiple_NG, (0, 0, 0, rows), value=1)
    padded = F.pad(matrix.integers_NK, (0, depth - inputs, 0, rows)).unflatten(1, (-1, GROUP))
    nibbles = (padded // multiple_NG[..., None].to(torch.int8) + 8).to(torch.uint8)
    lower, upper = nibbles.view(-1, PANEL, depth // 8, 2, 4).transpose(1, 2).unbind(3)
    weight = (lower | upper << 4).contiguous()
    group_scale = multiple_NG.view(-1, PANEL, depth // GROUP).transpose(1, 2).contiguous()
    return PackedMatrix(4, outputs, depth, weight, group_scale, scale)
