"""The sequential backend: the PyTorch model with attention one sequence after the other. The reference of all others.

Owns the plainest paged attention. Must not be optimised: a sequence's result does not depend on its neighbours, not even in
rounding.

Legend: T tokens, Q tokens and K keys of one sequence, H query heads, G kv heads, S head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unmask.engine.backends.torch import TorchBackend, write_kv
from unmask.engine.batch import Batch
from unmask.models.arch.attention import Attend, sdpa


class SequentialBackend(TorchBackend):
    """`TorchBackend` without padding or batching of attention."""

    def attend(self, batch: Batch, kv_cache: Tensor) -> Attend:
        return SequentialAttend(batch, kv_cache)


class SequentialAttend:
    """`Attend` of one batch, a call for each sequence."""

    def __init__(self, batch: Batch, kv_cache: Tensor) -> None:
        self.batch, self.kv_cache = batch, kv_cache

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        """Attention output [1, H, T, S]."""
        batch, size = self.batch, self.batch.cache_block_size
        keys, values = write_kv(self.kv_cache, layer, batch, k_BGTS, v_BGTS)
        outputs, start = [], 0
        for num_queries, num_keys, table_M in zip(batch.num_queries_N, batch.num_keys_N, batch.block_table_NM, strict=True):
            stop = start + int(num_queries)
            key_K = torch.arange(int(num_keys), device=keys.device)
            slot_K = table_M[key_K // size] * size + key_K % size
            mask_QK = key_K < batch.num_visible_keys_T[start:stop, None]
            k_BGKS, v_BGKS = (x[slot_K].transpose(0, 1)[None] for x in (keys, values))
            outputs.append(sdpa(q_BHTS[:, :, start:stop], k_BGKS, v_BGKS, mask_QK))
            start = stop
        return torch.cat(outputs, dim=2)
