"""Any tensor of a checkpoint at any time, read from its file when asked for.

Owns the open files. What a folder must hold is `checkpoint`'s matter.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from unmask.models.weights.checkpoint import DTYPE_NAMES, TensorSpec, tensor_index

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class TensorFiles:
    """The weights of a folder; its files stay open as long as `stack`."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        index = tensor_index(folder)
        files = {path: stack.enter_context(safe_open(path, framework="pt")) for path in sorted(set(index.values()))}
        self._file_of = {name: files[path] for name, path in index.items()}
        self.names = tuple(index)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype, from the file's header alone."""
        header = self._file_of[name].get_slice(name)
        return TensorSpec(tuple(header.get_shape()), _DTYPES[header.get_dtype()])

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor
