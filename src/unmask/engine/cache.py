"""Contiguous keys and values of committed tokens, and the `Attend` that reads and writes them.

Owns the cache of one batch of sequences that advance together. Knows nothing of decoding rules.

Legend: B batch, G kv heads, C capacity, S head dim, T tokens of this forward, K keys visible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.errors import RequestError
from unmask.models.attention import sdpa
from unmask.models.config import ModelConfig


class KVCache:
    """Keys and values of `length` committed tokens; room for `capacity`.

    A forward writes its keys and values behind the committed ones. They stay only if `commit` says so: a denoising pass over
    a block that still holds masks leaves nothing behind.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, *, batch: int = 1, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (config.num_layers, 2, batch, config.num_kv_heads, capacity, config.head_dim)
        self._store = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.length = 0

    def attend(self, mask: Tensor | None = None) -> CachedAttend:
        """Attention over the committed tokens and this forward's; `mask` is bool, broadcastable to [B, 1, T, length + T]."""
        return CachedAttend(self, mask)

    def commit(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` that the last forward wrote."""
        assert self.length + num_tokens <= self.capacity, "commit beyond the cache"
        self.length += num_tokens

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with the given batch rows (int64 indices) only."""
        self._store = self._store[:, :, rows]

    def extend(self, layer: int, k_BGTS: Tensor, v_BGTS: Tensor) -> tuple[Tensor, Tensor]:
        """Write this forward's keys and values behind the committed ones; returns all of them, [B, G, length + T, S]."""
        end = self.length + k_BGTS.shape[2]
        if end > self.capacity:
            raise RequestError(f"{end} tokens do not fit a cache of {self.capacity}; make it larger")
        keys, values = self._store[layer]
        keys[:, :, self.length : end] = k_BGTS
        values[:, :, self.length : end] = v_BGTS
        return keys[:, :, :end], values[:, :, :end]


class CachedAttend:
    """`Attend` over a `KVCache`."""

    def __init__(self, cache: KVCache, mask: Tensor | None) -> None:
        self.cache, self.mask = cache, mask

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        keys, values = self.cache.extend(layer, k_BGTS, v_BGTS)
        return sdpa(q_BHTS, keys, values, self.mask)
