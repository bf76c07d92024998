"""A packed linear layer: its product with rows, and greedy decoding when it is a vocabulary head.

Owns the memory its C structure points to. Knows nothing of transformers.

Legend: N rows, K inputs, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import byref

import numpy as np
import torch
from torch import Tensor

from unmask.models.native import interface
from unmask.models.native.quantize import PackedMatrix


class PackedLinear:
    """`x W^T + b` with 8- or 4-bit weights and 8-bit activations, or in floats; `depth` is K, padded."""

    def __init__(
        self, matrix: PackedMatrix, kernels: interface.Kernels, *, bias: Tensor | None = None, by_group: bool = False
    ) -> None:
        """Point the kernels to a matrix.

        Args:
            matrix: packed.
            kernels: the compiled library.
            bias: float32, padded to panels (`pack_bias`).
            by_group: as of `linear_struct`.
        """
        self._tensors = (matrix, bias)
        self._kernels, self._outputs, self.depth = kernels, matrix.outputs, matrix.depth
        self._workspace = interface.Workspace()
        self._struct = linear_struct(matrix, bias, by_group=by_group)

    def __call__(self, x_NK: Tensor) -> Tensor:
        """float32 [N, V] products of float rows."""
        out_NV = torch.empty(x_NK.shape[0], self._outputs)
        self._run(self._kernels.linear, x_NK, out_NV.data_ptr())
        return out_NV

    def greedy(self, x_NK: Tensor, banned_id: int | None) -> tuple[Tensor, Tensor]:
        """The largest output of each row and its softmax probability, without writing the others; see `PackedTransformer`."""
        count, banned = x_NK.shape[0], self._outputs if banned_id is None else banned_id
        tokens_N, probability_N = np.empty(count, np.int64), np.empty(count, np.float32)
        self._run(self._kernels.greedy, x_NK, banned, tokens_N.ctypes.data, probability_N.ctypes.data)
        return torch.from_numpy(tokens_N), torch.from_numpy(probability_N)

    def _run(self, kernel: Callable[..., None], x_NK: Tensor, *arguments: int) -> None:
        assert x_NK.ndim == 2
        assert x_NK.shape[1] <= self.depth
        if x_NK.dtype != torch.float32 or not x_NK.is_contiguous():
            x_NK = x_NK.float().contiguous()
        threads = torch.get_num_threads()
        buffer = self._workspace.address(self._kernels.linear_bytes(byref(self._struct), x_NK.shape[0], threads))
        kernel(byref(self._struct), x_NK.data_ptr(), *x_NK.shape, *arguments, buffer, threads)


def linear_struct(matrix: PackedMatrix, bias: Tensor | None, *, by_group: bool) -> interface.Linear:
    """The C structure of a matrix and its bias, which must outlive it.

    Args:
        matrix: packed.
        bias: as of `PackedLinear`.
        by_group: with weights of 8 bits, too, activations have a scale for every 32 inputs, and not for a row.
    """
    tensors = (matrix.weight, matrix.scale, bias)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return interface.Linear(*addresses, matrix.depth, matrix.outputs, matrix.bits, by_group)
