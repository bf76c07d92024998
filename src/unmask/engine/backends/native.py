"""The native backend: quantised weights on the CPU by the compiled kernels, and plain PyTorch until they are there.

Owns the choice between the two, and the KV cache as the kernels take it. The kernels are `models.native`'s.

Legend: N sequences, M cache blocks of a sequence, K keys of a sequence, L layers, G kv heads, S slots
of a cache block or head dim.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from unmask.engine.backends.base import Backend
from unmask.engine.backends.torch import TorchBackend, unwritten_tensor
from unmask.engine.batch import Batch
from unmask.errors import BackendError, ConfigError, UnmaskWarning
from unmask.models.arch.transformer import Transformer
from unmask.models.native.build import Build, start_build
from unmask.models.native.interface import Kernels
from unmask.models.native.packed import PackedTransformer, check_packable

BITS = {"int8": 8, "int4": 4}


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
    """A model whose weights are quantised as soon as the kernels are compiled.

    Compiling takes seconds, once a machine, in a process of its own. Until it is done, requests are served by the weights as
    they are, so that the first answer never waits for a compiler. A request is computed in one way from beginning to end:
    `current` is asked when an engine is made. Once the weights are packed, `model` is not needed here any more, and let go of.

    Args:
        model: a dense model on the CPU.
        weights: "int8" or "int4".
        on_packed: called when the weights are packed; who else holds `model` may let go of it.

    Raises:
        ConfigError: another kind of weights, or a model that the kernels do not run.
    """

    def __init__(self, model: Transformer, weights: str, on_packed: Callable[[], None] = lambda: None) -> None:
        if weights not in BITS:
            raise ConfigError(f"weights cannot be quantised to {weights!r}; use one of {', '.join(BITS)}, or auto")
        check_packable(model, BITS[weights])
        self._bits, self._weights, self._on_packed = BITS[weights], weights, on_packed
        self._backend: TorchBackend | NativeBackend = TorchBackend(model)
        self._warned, self._lock = False, threading.Lock()
        self._build: Build | None = None
        try:
            self._build = start_build()
        except BackendError as error:
            self._warn(f"{error}; computing with the weights as they are")

    @classmethod
    def choose(
        cls, model: Transformer, weights: str | None, on_packed: Callable[[], None] = lambda: None
    ) -> QuantizedModel | None:
        """What a user asked for: int8, int4, "auto" (int8 where the kernels run the model) or None, the weights as they are.

        Raises:
            ConfigError: another kind of weights, or, but for auto, a model that the kernels do not run.
        """
        if weights == "auto":
            try:
                return cls(model, "int8", on_packed)
            except ConfigError:
                return None
        return None if weights is None else cls(model, weights, on_packed)

    def current(self, *, wait: bool = False) -> Backend:
        """The fastest way to compute that is ready; `wait` lets the compiler finish first."""
        build = self._build
        if build is None:
            return self._backend
        if build.running and not wait:
            self._warn(
                f"the CPU kernels for {self._weights} weights are being compiled (once, some seconds); until then the weights "
                "are used as they are"
            )
            return self._backend
        with self._lock:
            if self._build is not None:
                assert isinstance(self._backend, TorchBackend), "there is a build until the weights are packed"
                try:
                    with torch.no_grad():
                        self._backend = NativeBackend(self._backend.model, self._bits, Kernels(build.load()))
                except BackendError as error:
                    self._warn(f"{error}; computing with the weights as they are")
                else:
                    self._on_packed()
                    _trim_heap()
                self._build = None
        return self._backend

    def _warn(self, message: str) -> None:
        if not self._warned:
            warnings.warn(message, UnmaskWarning, stacklevel=3)
        self._warned = True


def _trim_heap() -> None:
    """Return freed memory to the system: of what packing has freed, glibc keeps all that lies below something still in use."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
