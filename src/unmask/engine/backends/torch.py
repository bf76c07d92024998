"""The PyTorch backend: eager, on any device, attention batched over sequences.

Owns the model's call and paged attention through PyTorch operators alone: keys and values are gathered through the block table
and attended to by padded SDPA, one call a layer for a group of sequences of similar lengths.

Legend: T tokens, N selected tokens or sequences of a group, Q padded tokens and K padded keys of a group's sequence, D hidden,
V vocabulary, L layers, H query heads, G kv heads, R query heads of a kv head, S head dim.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from unmask.diffusion.decode import greedy_candidates
from unmask.diffusion.objectives import ban_mask
from unmask.engine.backends.adapters import PreparedAdapters
from unmask.engine.batch import Batch, Ints
from unmask.models.arch.attention import Attend, sdpa
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.moe import TokenBlocks
from unmask.models.arch.row_lora import AdaptedRows, LayerUpdate, RowSelection, with_row_lora
from unmask.models.arch.transformer import Transformer, reconfigured
from unmask.models.dtypes import dtype_name
from unmask.models.weights.adapter import adaptable_layers
from unmask.models.weights.lora_adapter import LoraAdapter, check_adapter

_SHORT, _FEW = 16, 64
"""Numbers of tokens and keys up to which padding costs less than another call."""
_MANY = 128
"""Keys whose copies cost more than a call, on a CPU."""


class TorchBackend:
    """The model as it is, in eager PyTorch.

    The KV cache is [L, 2, num_cache_blocks, cache_block_size, G, S], as vLLM-style paged kernels take it.
    """

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._adapters = PreparedAdapters(self._updates)
        self._adapted_rows = RowSelection()

    def with_expert_capacity(self, expert_capacity: int) -> TorchBackend:
        """The same weights with block routing."""
        return TorchBackend(reconfigured(self.model, self.config.with_expert_capacity(expert_capacity)))

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed.weight.dtype

    @property
    def kernels(self) -> str:
        return f"torch-{self.device.type}-{dtype_name(self.dtype)}{routing_name(self.config)}"

    @property
    def prefill_chunk(self) -> int:
        # A forward reads all weights: on a CPU as long as it computes some dozens of tokens, on a GPU some hundreds.
        return 128 if self.device.type == "cpu" else 1024

    def new_kv_cache(self, num_cache_blocks: int, cache_block_size: int) -> Tensor:
        config = self.config
        shape = (config.num_layers, 2, num_cache_blocks, cache_block_size, config.num_kv_heads, config.head_dim)
        return unwritten_tensor(shape, self.dtype, self.device)

    def prepare_adapter(self, adapter: LoraAdapter) -> None:
        self._adapters.of(adapter)

    def _updates(self, adapter: LoraAdapter) -> dict[str, LayerUpdate]:
        check_adapter(adapter, self.config)
        updates = adapter.updates.items()
        return {name: LayerUpdate(*(each.to(self.device, self.dtype) for each in update)) for name, update in updates}

    @cached_property
    def _model_by_row(self) -> Transformer:
        """The same weights, computed with the adapters of `_adapted_rows`."""
        return with_row_lora(self.model, adaptable_layers(self.config), self._adapted_rows)

    def attend(self, batch: Batch, kv_cache: Tensor) -> Attend:
        """Attention of one forward."""
        return PaddedAttend(batch, kv_cache)

    def forward(self, batch: Batch, kv_cache: Tensor) -> Tensor:
        gated = self.config.gated_lora_rank is not None and batch.segments_C6[:, 4].any()
        noisy_BT = batch.is_noisy_T[None] if gated else None
        attend = self.attend(batch, kv_cache)
        token_blocks = None
        if self.config.moe is not None and self.config.moe.expert_capacity is not None:
            token_blocks = TokenBlocks(batch.mask_block_T, int(batch.host_mask_block_T[-1]) + 1)
        model = self.model
        if batch.adapted_runs:
            model = self._model_by_row
            runs = batch.adapted_runs
            self._adapted_rows.rows = [AdaptedRows(run.start, run.stop, self._adapters.of(run.adapter)) for run in runs]
        hidden: Tensor = model(
            batch.tokens_T[None], batch.positions_T[None], attend, noisy_BT=noisy_BT, token_blocks=token_blocks
        )
        return hidden[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return self.model.head(hidden_ND)

    def greedy(self, hidden_ND: Tensor, banned_id: int | None) -> tuple[Tensor, Tensor]:
        logits_NV = self.model.head(hidden_ND)
        return greedy_candidates(logits_NV if banned_id is None else ban_mask(logits_NV, banned_id))


def routing_name(config: ModelConfig) -> str:
    """What block routing adds to the name of kernels: with it forwards cost less."""
    capacity = None if config.moe is None else config.moe.expert_capacity
    return "" if capacity is None else f"-{capacity}experts"


def unwritten_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A large tensor of any content. On a CPU its memory is taken as it is written, page by page."""
    if device.type != "cpu" or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device=device)
    # Where the system gives huge pages to everybody, the first token in each would take 2 MiB.
    memory = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def write_kv(kv_cache: Tensor, layer: int, batch: Batch, k_BGTS: Tensor, v_BGTS: Tensor) -> tuple[Tensor, Tensor]:
    """Write this forward's keys and values to their slots; the layer's keys and values by slot, [slots, G, S]."""
    keys, values = kv_cache[layer].flatten(1, 2)
    keys.index_copy_(0, batch.slot_mapping_T, k_BGTS[0].transpose(0, 1))
    values.index_copy_(0, batch.slot_mapping_T, v_BGTS[0].transpose(0, 1))
    return keys, values


class PaddedAttend:
    """`Attend` of one batch: one padded SDPA call a layer for each group of sequences of similar lengths.

    On a CPU a sequence with many keys whose cache blocks are neighbours attends by itself, through a view: copying its
    keys would take longer than a call of its own.
    """

    def __init__(self, batch: Batch, kv_cache: Tensor) -> None:
        self.batch, self.kv_cache = batch, kv_cache
        members = _groups(batch, views=kv_cache.device.type == "cpu")
        self._calls = [_call(batch, members_N, kv_cache.device) for members_N in members]
        # Where each token's output is among those of all calls; of a token repeated as padding, any will do.
        tokens = np.concatenate([call.tokens for call in self._calls])
        order_T = np.empty(len(batch.tokens_T), dtype=np.int64)
        order_T[tokens] = np.arange(len(tokens))
        in_order = np.array_equal(tokens, np.arange(len(order_T)))
        self._order_T = None if in_order else torch.from_numpy(order_T).to(kv_cache.device)

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        """Attention output [1, H, T, S]."""
        keys, values = write_kv(self.kv_cache, layer, self.batch, k_BGTS, v_BGTS)
        outputs = [call(q_BHTS, keys, values) for call in self._calls]
        out_BHTS = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return out_BHTS if self._order_T is None else out_BHTS.index_select(2, self._order_T)


class _Alone:
    """Attention of one sequence whose cache blocks are neighbours."""

    def __init__(self, batch: Batch, sequence: int, slots: slice) -> None:
        stop = int(batch.num_queries_N[: sequence + 1].sum())
        self._tokens, self._slots = slice(stop - int(batch.num_queries_N[sequence]), stop), slots
        self.tokens = np.arange(self._tokens.start, stop)
        self._mask_QK: Tensor | None = None
        if not batch.sees_all_N[sequence]:
            visible_Q = batch.num_visible_keys_T[self._tokens]
            self._mask_QK = torch.arange(slots.stop - slots.start, device=visible_Q.device) < visible_Q[:, None]

    def __call__(self, q_BHTS: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention output [1, H, Q, S]."""
        k_BGKS, v_BGKS = (x[self._slots].transpose(0, 1)[None] for x in (keys, values))
        return sdpa(q_BHTS[:, :, self._tokens], k_BGKS, v_BGKS, self._mask_QK)


class _Padded:
    """Attention of some sequences, padded to the same numbers of tokens and keys.

    Padding repeats a sequence's last token and its last key, so that no slot is read that was never written.
    """

    def __init__(self, batch: Batch, members_N: Ints, slots_L: Tensor) -> None:
        num_queries_N, num_keys_N = batch.num_queries_N[members_N], batch.num_keys_N[members_N]
        self._shape = len(members_N), int(num_queries_N.max()), int(num_keys_N.max())
        self._slots = slots_L
        first_N = (np.cumsum(batch.num_queries_N) - batch.num_queries_N)[members_N]
        token_NQ = first_N[:, None] + np.minimum(np.arange(self._shape[1]), num_queries_N[:, None] - 1)
        self.tokens, self._token_NQ = token_NQ.reshape(-1), torch.from_numpy(token_NQ).to(slots_L.device)
        self._mask_N1QK: Tensor | None = None
        if not batch.sees_all_N[members_N].all() or bool((num_keys_N < self._shape[2]).any()):
            visible_NQ1 = batch.num_visible_keys_T[self._token_NQ][..., None]
            self._mask_N1QK = (torch.arange(self._shape[2], device=slots_L.device) < visible_NQ1)[:, None]

    def __call__(self, q_BHTS: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention output [1, H, N * Q, S]."""
        q_NHQS = q_BHTS[0].transpose(0, 1)[self._token_NQ].transpose(1, 2)
        out_NHQS = sdpa(q_NHQS, self._gather(keys), self._gather(values), self._mask_N1QK)
        return out_NHQS.transpose(0, 1).flatten(1, 2)[None]

    def _gather(self, x: Tensor) -> Tensor:
        """Keys or values [N, G, K, S] of the group; `x` is [slots, G, S]."""
        gathered = x.index_select(0, self._slots)
        return gathered.view(self._shape[0], self._shape[2], *x.shape[1:]).transpose(1, 2)


def _groups(batch: Batch, *, views: bool) -> list[Ints]:
    """Sequences in groups, so that padding at most doubles a group's tokens and its keys, short ones aside.

    Args:
        batch: the batch.
        views: sequences that `_Alone` serves better form groups of their own.
    """
    queries_N, keys_N = np.maximum(batch.num_queries_N, _SHORT), np.maximum(batch.num_keys_N, _FEW)
    key_N3 = np.stack((np.log2(queries_N).astype(int), np.log2(keys_N).astype(int), np.zeros_like(keys_N)), 1)
    if views:
        alone_N = (batch.num_keys_N > _MANY) & batch.is_consecutive_N
        key_N3[alone_N] = np.arange(1, len(keys_N) + 1)[alone_N, None]
    _, group_N = np.unique(key_N3, axis=0, return_inverse=True)
    return [np.flatnonzero(group_N == group) for group in range(group_N.max() + 1)]


def _call(batch: Batch, members_N: Ints, device: torch.device) -> _Alone | _Padded:
    size, tables = batch.cache_block_size, batch.host_block_table_NM[members_N]
    count = int(batch.num_keys_N[members_N].max())
    if len(members_N) == 1 and batch.is_consecutive_N[members_N[0]]:
        first = int(tables[0, 0]) * size
        return _Alone(batch, int(members_N[0]), slice(first, first + count))
    key_NK = np.minimum(np.arange(count), batch.num_keys_N[members_N][:, None] - 1)
    slots_NK = np.take_along_axis(tables, key_NK // size, axis=1) * np.int64(size) + key_NK % size
    return _Padded(batch, members_N, torch.from_numpy(slots_NK.reshape(-1)).to(device))
