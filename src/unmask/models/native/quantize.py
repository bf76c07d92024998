"""Weight quantisation to 8 or 4 bits, in the layout that `gemm.h` reads.

Owns rounding and packing of one matrix. Knows neither models nor how the kernels are called.

Legend: N outputs, K inputs, P panels of 16 outputs, G groups of 32 inputs. 8-bit depths are multiples of STEP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
GROUP = 32
STEP = 16
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
    """A quantised matrix as the kernels read it; `depth` is K padded with zeros."""

    bits: int
    outputs: int
    depth: int
    weight: Tensor
    group_scale: Tensor | None
    scale: Tensor


def pack(matrix: QuantizedMatrix) -> PackedMatrix:
    """Bring a matrix into panels."""
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
    # Input 4 * step + 2 * half + byte of a pair of steps is nibble 2 * step + byte of the 16-bit word `half`.
    pairs = nibbles.view(-1, PANEL, depth // 8, 2, 2, 2).permute(0, 2, 1, 4, 3, 5).reshape(-1, 2)
    weight = pairs[:, 0] | pairs[:, 1] << 4
    group_scale = multiple_NG.view(-1, PANEL, depth // GROUP).transpose(1, 2).contiguous()
    return PackedMatrix(4, outputs, depth, weight, group_scale, scale)
