"""Weight quantisation to 8 or 4 bits, and the layout of quantised and of float matrices that `linear.h` describes.

Owns rounding to nearest and packing of one matrix, however its integers were chosen. Knows neither models nor how the kernels
are called. Every tensor of a packed matrix has panels, or the outputs of panels, in front, and none of an output's numbers
depends on another's: outputs packed 16 at a time are slices of the whole.

Legend: N outputs, K inputs, P panels of 16 outputs, G groups of inputs: 32, or those that share four
bytes of a panel; c outputs of a panel, s inputs of a group. Depths of floats are multiples of STEP, those of integers of GROUP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL = 16
GROUP = 32
STEP = 16
TOP = 15
"""The largest code of 4 bits."""
# Of a matrix that are packed at a time.
_ROWS = 4096
_LINE = 64
# Steps of a group's zero to one of its codes.
_ZERO_STEPS = 16


@dataclass(frozen=True)
class QuantizedMatrix:
    """Signed bytes and one scale per output: `weight = integers * scale`."""

    integers_NK: Tensor
    scale_N: Tensor

    def dequantize(self) -> Tensor:
        """The float32 matrix [N, K] that the integers stand for."""
        return self.integers_NK.float() * self.scale_N[:, None]


@dataclass(frozen=True)
class GroupGrid:
    """The numbers that the 4-bit codes of a matrix stand for: `code * scale + minimum`, one of both for 32 inputs.

    Attributes:
        unit_N: float32, of each output.
        multiple_NG: uint8: a group's scale is so many units.
        zero_NG: uint8: where 0 lies, in sixteenths of a code, so that `minimum = -scale * zero / 16`.
    """

    unit_N: Tensor
    multiple_NG: Tensor
    zero_NG: Tensor

    @property
    def scale_NG(self) -> Tensor:
        """float32 scale of each group."""
        return self.multiple_NG * self.unit_N[:, None]

    @property
    def minimum_NG(self) -> Tensor:
        """float32 number of code 0 of each group."""
        return self.scale_NG * self.zero_NG.float() / -_ZERO_STEPS


@dataclass(frozen=True)
class GroupedMatrix:
    """Codes of 4 bits, and what they stand for.

    Attributes:
        codes_NK: uint8, 0 to 15.
        grid: of its groups; the last one may be of less than 32 inputs.
    """

    codes_NK: Tensor
    grid: GroupGrid

    def dequantize(self) -> Tensor:
        """The float32 matrix [N, K] that the codes stand for."""
        scale_NK, minimum_NK = (
            each.repeat_interleave(GROUP, 1)[:, : self.codes_NK.shape[1]] for each in (self.grid.scale_NG, self.grid.minimum_NG)
        )
        return self.codes_NK * scale_NK + minimum_NK


RoundedMatrix = QuantizedMatrix | GroupedMatrix


def group_grid(scale_NG: Tensor, minimum_NG: Tensor) -> GroupGrid:
    """The grid nearest to some scales and minima. Codes are best chosen for the grid's own.

    Args:
        scale_NG: floats; 0 or more.
        minimum_NG: floats; those above 0 become 0, those below -15.9 scales these.
    """
    scale_NG = scale_NG.float()
    unit_N = (scale_NG.amax(dim=1) / 255).clamp_min(torch.finfo(torch.float32).tiny)
    multiple_NG = (scale_NG / unit_N[:, None]).round().clamp(1, 255)
    zero_NG = (minimum_NG.float() * -_ZERO_STEPS / (multiple_NG * unit_N[:, None])).round().clamp(0, 255)
    return GroupGrid(unit_N, multiple_NG.to(torch.uint8), zero_NG.to(torch.uint8))


def quantize(weight_NK: Tensor, bits: int) -> RoundedMatrix:
    """Round a matrix to 8 or 4 bits."""
    return round_bytes(weight_NK) if bits == 8 else round_codes(weight_NK)


def round_bytes(weight_NK: Tensor) -> QuantizedMatrix:
    """Round a matrix to 8 bits, symmetric around 0."""
    weight_NK = weight_NK.float()
    scale_N = weight_NK.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return QuantizedMatrix((weight_NK / scale_N[:, None]).round().to(torch.int8), scale_N)


def round_codes(weight_NK: Tensor) -> GroupedMatrix:
    """Round a matrix to 4 bits, between the least and the largest number of each group."""
    groups_NGs = groups_of(weight_NK)
    least_NG, most_NG = groups_NGs.amin(dim=2).clamp(max=0), groups_NGs.amax(dim=2).clamp(min=0)
    return round_to(weight_NK, group_grid((most_NG - least_NG) / TOP, least_NG))


def round_to(weight_NK: Tensor, grid: GroupGrid) -> GroupedMatrix:
    """The nearest codes on a grid."""
    codes_NGs = ((groups_of(weight_NK) - grid.minimum_NG[..., None]) / grid.scale_NG[..., None]).round_().clamp_(0, TOP)
    return GroupedMatrix(codes_NGs.to(torch.uint8).flatten(1)[:, : weight_NK.shape[1]], grid)


def groups_of(weight_NK: Tensor) -> Tensor:
    """float32 [N, G, GROUP], the last group padded with zeros."""
    groups_NGs: Tensor = F.pad(weight_NK.float(), (0, -weight_NK.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    return groups_NGs


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix as the kernels read it; `depth` is K padded with zeros, `bits` 8 or 4, 16 (bfloat16) or 32 (float32)."""

    bits: int
    outputs: int
    depth: int
    weight: Tensor
    scale: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Of all that a product reads of it."""
        return self.weight.nbytes + (0 if self.scale is None else self.scale.nbytes)


def padded_depth(inputs: int, bits: int) -> int:
    """The depth of a packed matrix of so many inputs."""
    return inputs + -inputs % (STEP if bits >= 16 else GROUP)


def matrix_bytes(outputs: int, inputs: int, bits: int) -> int:
    """`num_bytes` of a packed matrix of this size."""
    depth, panels = padded_depth(inputs, bits), -(-outputs // PANEL)
    head = 2 * PANEL * depth // GROUP if bits == 4 else 0
    scale = 0 if bits >= 16 else 4
    return panels * (head + -head % _LINE + PANEL * (depth * bits // 8 + scale))


def pack_floats(weight_NK: Tensor) -> PackedMatrix:
    """Bring a float matrix into panels, some rows at a time: bfloat16 if that holds every weight exactly, else float32."""
    dtype = exact_dtype(weight_NK)
    outputs, inputs = weight_NK.shape
    bits = 8 * dtype.itemsize
    depth, step = padded_depth(inputs, bits), 4 // dtype.itemsize
    panels_PGcs = torch.empty(-(-outputs // PANEL), depth // step, PANEL, step, dtype=dtype)
    for panels, rows in zip(panels_PGcs.split(_ROWS // PANEL), weight_NK.split(_ROWS), strict=True):
        padded = F.pad(rows.to(dtype), (0, depth - inputs, 0, -len(rows) % PANEL))
        panels.copy_(padded.view(-1, PANEL, depth // step, step).transpose(1, 2))
    return PackedMatrix(bits, outputs, depth, panels_PGcs, None)


def exact_dtype(weight_NK: Tensor) -> torch.dtype:
    """bfloat16 if that holds every number of a float matrix exactly, else float32."""
    is_narrow = all(torch.equal(rows.bfloat16().float(), rows.float()) for rows in weight_NK.split(_ROWS))
    return torch.bfloat16 if is_narrow else torch.float32


def pack(matrix: RoundedMatrix) -> PackedMatrix:
    """Bring a quantised matrix into panels."""
    return _pack_groups(matrix.codes_NK, matrix.grid) if isinstance(matrix, GroupedMatrix) else _pack_bytes(matrix)


def _pack_bytes(matrix: QuantizedMatrix) -> PackedMatrix:
    outputs, inputs = matrix.integers_NK.shape
    rows, depth = -outputs % PANEL, padded_depth(inputs, 8)
    padded = F.pad(matrix.integers_NK, (0, depth - inputs, 0, rows))
    panels = padded.view(-1, PANEL, depth // 4, 4).transpose(1, 2).contiguous()
    # Bytes w + 128: flipping the sign bit of a signed byte.
    return PackedMatrix(8, outputs, depth, panels.view(torch.uint8).bitwise_xor_(128), F.pad(matrix.scale_N, (0, rows)))


def _pack_groups(codes_NK: Tensor, grid: GroupGrid) -> PackedMatrix:
    outputs, inputs = codes_NK.shape
    rows, depth = -outputs % PANEL, padded_depth(inputs, 4)
    # [P, G, multiple or zero, c], to a whole number of cache lines.
    of_groups = torch.stack((grid.multiple_NG, grid.zero_NG), 2)
    head = F.pad(of_groups, (0, 0, 0, 0, 0, rows)).view(-1, PANEL, depth // GROUP * 2).transpose(1, 2).flatten(1)
    lower, upper = F.pad(codes_NK, (0, depth - inputs, 0, rows)).view(-1, PANEL, depth // 8, 2, 4).transpose(1, 2).unbind(3)
    weight = torch.cat((F.pad(head, (0, -head.shape[1] % _LINE)), (lower | upper << 4).flatten(1)), 1)
    return PackedMatrix(4, outputs, depth, weight, F.pad(grid.unit_N, (0, rows)))
