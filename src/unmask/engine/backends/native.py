"""The native backend: packed weights, quantised or floats, on the CPU by the compiled kernels.

Owns how a model comes to the kernels, and the KV cache as they take it. The kernels are `models.native`'s; when they are used,
`engine.quantization` says.

Legend: N sequences, M cache blocks of a sequence, K keys of a sequence, L layers, G kv heads, S slots
of a cache block or head dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unmask.engine.backends.adapters import PreparedAdapters
from unmask.engine.backends.torch import routing_name, unwritten_tensor
from unmask.engine.batch import Batch, Ints
from unmask.engine.quantization import PACKED_BITS
from unmask.models.arch.transformer import Transformer
from unmask.models.native.library import load_kernels
from unmask.models.native.packed import PackedTransformer
from unmask.models.native.packed_adapter import PackedAdapter
from unmask.models.native.packed_cache import PackedCache
from unmask.models.native.packing import OnLayer, pack_model
from unmask.models.weights.checkpoint import ModelParts
from unmask.models.weights.lora_adapter import LoraAdapter


class NativeBackend(PackedTransformer):
    """The kernels as a `Backend`. The KV cache is float32 [L, 2, G, slots, S] on the CPU."""

    device = torch.device("cpu")
    dtype = torch.float32
    # From 8 tokens on, a forward takes as long as it has tokens: larger chunks gain nothing.
    prefill_chunk = 32

    @property
    def kernels(self) -> str:
        return f"{self._kernels.variant}-{self.bits}bit{routing_name(self.config)}"

    def with_expert_capacity(self, expert_capacity: int) -> NativeBackend:
        """The same weights with block routing."""
        return NativeBackend(replace(self.weights, config=self.config.with_expert_capacity(expert_capacity)), self._kernels)

    def new_kv_cache(self, num_cache_blocks: int, cache_block_size: int) -> Tensor:
        config = self.config
        shape = (config.num_layers, 2, config.num_kv_heads, num_cache_blocks * cache_block_size, config.head_dim)
        return unwritten_tensor(shape, self.dtype, self.device)

    def prepare_adapter(self, adapter: LoraAdapter) -> None:
        self._adapters.of(adapter)

    @cached_property
    def _adapters(self) -> PreparedAdapters[PackedAdapter]:
        return PreparedAdapters(lambda adapter: PackedAdapter(adapter, self.weights))

    def forward(self, batch: Batch, kv_cache: Tensor, *, touched_L: Ints | None = None) -> Tensor:
        size = batch.cache_block_size
        slots_NMS = batch.host_block_table_NM[..., None] * np.int64(size) + np.arange(size)
        slots_NK = slots_NMS.reshape(len(slots_NMS), -1)
        adapted = [(run.start, run.stop, self._adapters.of(run.adapter)) for run in batch.adapted_runs]
        return self.run(
            batch.tokens_T, batch.host_positions_T, batch.segments_C6, slots_NK, kv_cache, adapted=adapted, touched_L=touched_L
        )


def packed_backend(model: Transformer, weights: str) -> NativeBackend:
    """A loaded model, packed; `weights` as of `decoding_weights`."""
    return NativeBackend(pack_model(model, PACKED_BITS[weights]), load_kernels())


def open_packed(
    folder: Path, weights: str, dtype: torch.dtype, load: Callable[[], ModelParts], on_packing: OnLayer
) -> NativeBackend:
    """The model in a folder: its packed weights are mapped from the cache, where they are put the first time.

    Args:
        folder: of a model or an adapter.
        weights: as of `decoding_weights`.
        dtype: of what is packed.
        load: gives it; called only where the cache does not hold the packed weights.
        on_packing: sees the progress.
    """
    cache = PackedCache(folder, PACKED_BITS[weights], dtype)
    packed = cache.open()
    if packed is None:
        packed = cache.pack(load, on_packing)
        _trim_heap()
    return NativeBackend(packed, load_kernels())


def _trim_heap() -> None:
    """Return freed memory to the system: of what packing has freed, glibc keeps all that lies below something still in use."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
