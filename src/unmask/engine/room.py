"""Room for decoding: what a model takes of memory with each kind of weights, and what to expect where it is paged from disk.

Owns the choice of what else could be loaded where a model does not fit. The sums are `models.weights.room`'s, those of packed
weights `models.native.sizes`'; the limits are the former's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from unmask.engine.quantization import BITS, PACKED_BITS, kernels_compute
from unmask.errors import ConfigError, UnmaskNote
from unmask.models.arch.config import ModelConfig
from unmask.models.dtypes import dtype_name
from unmask.models.native.sizes import packed_bytes, packing_bytes
from unmask.models.weights.room import (
    OTHERWISE,
    available_memory,
    check_room,
    fits,
    in_words,
    kv_cache_bytes,
    weight_bytes,
)

FIRST_TOKENS = 2048
"""Tokens of the KV cache that a model must have room for when it is loaded; larger caches are checked when they are made."""


@dataclass(frozen=True)
class DecodingRoom:
    """What decoding with a model takes of memory.

    Attributes:
        config: of the model.
        dtype: of weights that decode as they are, and of those that are quantised.
        device: of the weights.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device

    def options(self) -> Mapping[str, int]:
        """Bytes of loading the model in each way it can be loaded here, the KV cache included, best quality first."""
        options: dict[str, int] = {}
        for dtype in (torch.float32, torch.bfloat16):
            is_packed = kernels_compute("none", self.device, dtype)
            weights = packing_bytes(self.config, dtype, PACKED_BITS["none"]) if is_packed else weight_bytes(self.config, dtype)
            options[f"dtype {dtype_name(dtype)}"] = weights + self._cache(torch.float32 if is_packed else dtype)
        if is_quantizable(self.device):
            cache = self._cache(torch.float32)
            sizes = {name: packing_bytes(self.config, torch.bfloat16, bits) for name, bits in BITS.items()}
            options |= {f"quantize {name}": size + cache for name, size in sizes.items()}
        return options

    def check_loading(self, name: str) -> None:
        """Refuse a model that does not fit as it is; `name` is for the message.

        Raises:
            RoomError: it does not fit.
        """
        needs = {f"weights in {dtype_name(self.dtype)}": weight_bytes(self.config, self.dtype)}
        check_room(name, needs | self._cache_need(self.dtype), self.device, self.options, otherwise=self._remedy(name))

    def check_packing(self, name: str, weights: str, *, whole: bool) -> None:
        """Refuse a model that cannot be packed for the CPU kernels.

        Args:
            name: of the model, for the message.
            weights: that decode: "int8", "int4" or "none".
            whole: all of the model is loaded before it is packed.

        Raises:
            RoomError: it does not fit.
        """
        what = f"packing weights in {dtype_name(self.dtype)}" if weights == "none" else f"quantising to {weights}"
        needs = {what: packing_bytes(self.config, self.dtype, PACKED_BITS[weights], whole=whole)}
        check_room(name, needs | self._cache_need(torch.float32), self.device, self.options, otherwise=self._remedy(name))

    def check_mapped(self, name: str, weights: str, num_bytes: int | None = None) -> bool:
        """Whether packed weights, mapped from files, fit into memory; if they do not, a note says what to expect.

        Args:
            name: as of `check_packing`.
            weights: as of `check_packing`.
            num_bytes: of the files; None: as many as packing would make.

        Raises:
            RoomError: not even the KV cache fits.
        """
        check_room(name, self._cache_need(torch.float32), self.device, self.options)
        packed = packed_bytes(self.config, self.dtype, PACKED_BITS[weights]) if num_bytes is None else num_bytes
        memory = available_memory(self.device)
        if memory is None or fits(packed, memory):
            return True
        what = dtype_name(self.dtype) if weights == "none" else weights
        warnings.warn(
            f"{name} has {in_words(packed)} of {what} weights, and there are {in_words(memory.num_bytes)} of "
            f"{memory.where}: they are read from disk as they are needed, up to all of them for every forward",
            UnmaskNote,
            stacklevel=3,
        )
        return False

    def _remedy(self, name: str) -> str:
        """What to do with a model that nothing else makes fit."""
        if not is_quantizable(self.device):
            return OTHERWISE
        return f"quantise it into a folder, which takes little memory and is mapped from there: unmask quantize {name}"

    def _cache(self, dtype: torch.dtype) -> int:
        return kv_cache_bytes(self.config, dtype, min(FIRST_TOKENS, self.config.max_positions))

    def _cache_need(self, dtype: torch.dtype) -> dict[str, int]:
        return {f"KV cache of {min(FIRST_TOKENS, self.config.max_positions):,} tokens": self._cache(dtype)}


def is_quantizable(device: torch.device) -> bool:
    """Whether the CPU kernels are there, and run quantised weights that are on this device."""
    from unmask.models.native.library import kernel_variant
    from unmask.models.native.packing import check_packable

    try:
        check_packable(device, 8)
    except ConfigError:
        return False
    return kernel_variant() is not None
