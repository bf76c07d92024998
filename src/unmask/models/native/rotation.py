"""Rotation of activations (QuaRot): an orthogonal change of basis that spreads outliers, so that 8-bit activations lose little.

The residual stream of a language model has a few channels far larger than the others, and one scale per row must cover them.
RMSNorm, with its weights moved into the next matrix, commutes with rotations, so the whole stream can be rotated by changing
weights only. The input of the down projection follows a nonlinearity and is mixed at run time.

Owns both transforms of weights. Knows neither integers nor kernels.

Source: QuaRot (2404.00456). Departs: a Kronecker product of Hadamard and cosine matrices instead of a Hadamard matrix of the
full size, and the online transform mixes 8 channels, 16 apart, instead of all.

Legend: D hidden, N outputs, K inputs, F feed-forward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LANES = 16
_MIXED = 8
_LARGEST = 64


def mixed_channels(ffn_size: int) -> int:
    """How many channels of the feed-forward the kernels mix: 8, or fewer (1: none) where the size does not divide."""
    return math.gcd(_MIXED, ffn_size // LANES) if ffn_size % LANES == 0 else 1


def hadamard(size: int) -> Tensor:
    """The symmetric matrix of +1 and -1 with orthogonal rows, `size` a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def mix(x: Tensor, count: int) -> Tensor:
    """`hadamard(count)` over channels i, i + 16, ... of `x` [..., F], not normalised: twice gives `count * x`."""
    if count == 1:
        return x
    blocks = x.unflatten(-1, (-1, count, LANES))
    return torch.einsum("ij,...jl->...il", hadamard(count).to(x.dtype), blocks).flatten(-3)


class Rotation:
    """A fixed orthogonal matrix [D, D]: random signs, then a Kronecker product of small matrices."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._signs_D = torch.randint(0, 2, (size,), generator=generator).mul_(2).sub_(1).float()
        power = size & -size
        sizes = [size // power]
        while power > 1:
            sizes.append(min(power, _LARGEST))
            power //= sizes[-1]
        self._factors = [_orthogonal(n) for n in sizes if n > 1]

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate the last dimension [..., D]; float32."""
        out = x.float() * self._signs_D
        shape = [len(factor) for factor in self._factors]
        out = out.unflatten(-1, shape) if shape else out
        for i, factor in enumerate(self._factors):
            dim = i - len(shape)
            out = (out.transpose(dim, -1) @ factor).transpose(dim, -1)
        return out.reshape(x.shape)

    def inputs(self, weight_ND: Tensor, norm_D: Tensor) -> Tensor:
        """The weight of a layer that reads the normed residual stream, adapted to a rotated stream normed without weights."""
        return self(weight_ND.float() * norm_D.float())

    def outputs(self, weight_DK: Tensor) -> Tensor:
        """The weight of a layer that writes to the residual stream, adapted to a rotated stream."""
        return self(weight_DK.T).T


def _orthogonal(size: int) -> Tensor:
    if size & (size - 1) == 0:
        return hadamard(size) / math.sqrt(size)
    # The orthonormal discrete cosine transform exists for every size.
    angle = (torch.arange(size).double()[:, None] + 0.5) * torch.arange(size) * (math.pi / size)
    matrix = angle.cos() * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix.float()
