"""The native backend: quantised weights on the CPU by the compiled kernels.

Owns when weights are packed, and the KV cache as the kernels take it. The kernels are `models.native`'s; when they are used,
`engine.quantization` says.

Legend: N sequences, M cache blocks of a sequence, K keys of a sequence, L layers, G kv heads, S slots
of a cache block or head dim.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from unmask.engine.backends.base import Backend
from unmask.engine.backends.torch import TorchBackend, unwritten_tensor
from unmask.engine.batch import Batch
from unmask.engine.quantization import BITS
from unmask.models.arch.transformer import Transformer
from unmask.models.native.interface import Kernels
from unmask.models.native.library import load_kernels
from unmask.models.native.packed import PackedTransformer
from unmask.models.native.packing import pack_model


class NativeBackend(PackedTransformer):
    """The kernels as a `Backend`. The KV cache is float32 [L, 2, G, slots, S] on the CPU."""

    device = torch.device("cpu")
    dtype = torch.float32
    # From 8 tokens on, a forward takes as long as it has tokens: larger chunks gain nothing.
    prefill_chunk = 32

    def new_kv_cache(self, num_cache_blocks: int, cache_block_size: int) -> Tensor:
        config = self.config
        shape = (config.num_layers, 2, config.num_kv_heads, num_cache_blocks * cache_block_size, config.head_dim)
        return unwritten_tensor(shape, self.dtype, self.device)

    def forward(self, batch: Batch, kv_cache: Tensor) -> Tensor:
        size = batch.cache_block_size
        slots_NMS = batch.host_block_table_NM[..., None] * np.int64(size) + np.arange(size)
        slots_NK = slots_NMS.reshape(len(slots_NMS), -1)
        return self.run(batch.tokens_T, batch.positions_T, batch.segments_C6, slots_NK, kv_cache)


class QuantizedModel:
    """A model whose weights are quantised when the first engine asks for them.

    Once the weights are packed, `model` is not needed here any more, and let go of.

    Args:
        model: that the kernels run.
        weights: "int8" or "int4", as of `decoding_weights`.
        on_packed: called when the weights are packed; who else holds `model` may let go of it.
    """

    def __init__(self, model: Transformer, weights: str, on_packed: Callable[[], None] = lambda: None) -> None:
        self._bits, self._on_packed = BITS[weights], on_packed
        self._backend: TorchBackend | NativeBackend = TorchBackend(model)
        self._kernels: Kernels | None = load_kernels()
        self._lock = threading.Lock()

    def backend(self) -> Backend:
        """What computes; packs the weights at the first call."""
        with self._lock:
            if self._kernels is not None:
                assert isinstance(self._backend, TorchBackend), "there are kernels to pack for until the weights are packed"
                with torch.no_grad():
                    self._backend = NativeBackend(pack_model(self._backend.model, self._bits), self._kernels)
                self._kernels = None
                self._on_packed()
                _trim_heap()
        return self._backend


def _trim_heap() -> None:
    """Return freed memory to the system: of what packing has freed, glibc keeps all that lies below something still in use."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
