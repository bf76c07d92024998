"""Memory and FLOP of tensors: what a forward and backward pass allocates and computes, operation by operation.

Owns the counts. Knows nothing of models. Under `FakeTensorMode` nothing is allocated, so that a model of any size is counted.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper


def _grouped_flops(a_shape: tuple[int, ...], b_shape: tuple[int, ...], *rest: Any, **options: Any) -> int:
    """FLOP of a grouped product: each row of `a` times one matrix; or each column of `a` times one row of `b`."""
    return int(2 * a_shape[0] * a_shape[1] * b_shape[-1])


_FLOPS = {**flop_registry, torch.ops.aten._grouped_mm: shape_wrapper(_grouped_flops)}


class Tracker(TorchDispatchMode):
    """Counts of what happens inside the `with` block.

    `current` and, since `reset`, `peak`: bytes of the storages of tensors, each from its first tensor until nothing refers to
    it. FSDP frees and refills gathered parameters by resizing their storages, which counts too.
    `flops`, since `reset`: of matrix products, by PyTorch's formulas (`FlopCounterMode` itself keeps activations alive).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}
        self._resize = torch.UntypedStorage.resize_

    def reset(self) -> None:
        """Start peak and FLOP from here."""
        self.peak, self.flops = self.current, 0

    def __enter__(self) -> Tracker:
        resize = self._resize

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes back with the local tensors
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = _FLOPS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._set(key, storage.nbytes())
            weakref.finalize(storage, self._forget, key)

    def _set(self, key: int, size: int) -> None:
        self.current += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.current)

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key)
