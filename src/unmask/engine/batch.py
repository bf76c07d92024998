"""The batch: tokens of several sequences in one forward, and the metadata that every paged attention kernel takes.

Owns the layout of a forward and where their keys and values lie in the KV cache. Knows neither requests nor the cache's
memory: a slot is a number, `cache_block * cache_block_size + offset`, and what it addresses is the backend's matter.

Legend: T tokens of the forward, N sequences, M cache blocks of a sequence, C segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.models.weights.lora_adapter import LoraAdapter

Ints = NDArray[np.int64]


class SequenceSlice(NamedTuple):
    """Consecutive positions of one sequence, to be run in a forward.

    Attributes:
        tokens: what the model reads, one id a position.
        start: the first position; keys and values of all positions before it are in the KV cache.
        block_table: cache blocks of the sequence in order, at least up to the last of these positions.
        mask_block_size: attention is block-causal with blocks of this size; 1 is causal.
        causal_end: positions below it attend causally and are clean; those from it on are noisy (`Batch.is_noisy_T`).
        adapter: LoRA that these tokens are computed with; None: the model as it is.
    """

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    mask_block_size: int
    causal_end: int = 0
    adapter: LoraAdapter | None = None


class AdaptedRun(NamedTuple):
    """Consecutive tokens of a forward with one adapter."""

    start: int
    stop: int
    adapter: LoraAdapter


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward over T tokens of N sequences, in order. Each of the arrays is made when a backend first asks for it.

    Attributes:
        slices: one a sequence.
        cache_block_size: tokens in a cache block.
        device: of the tensors; what is said to be on the host is an array.
    """

    slices: Sequence[SequenceSlice]
    cache_block_size: int
    device: torch.device | str = "cpu"

    @cached_property
    def tokens_T(self) -> Tensor:
        """int64 ids."""
        tokens = self.slices[0].tokens if len(self.slices) == 1 else list(chain.from_iterable(s.tokens for s in self.slices))
        return self._tensor(np.array(tokens, dtype=np.int64))

    @cached_property
    def positions_T(self) -> Tensor:
        """int64, counted from the start of the sequence."""
        return self._tensor(self.host_positions_T)

    @cached_property
    def slot_mapping_T(self) -> Tensor:
        """int64 slot of the KV cache that each token's own key and value are written to."""
        size = np.int64(self.cache_block_size)
        blocks_T = self.host_block_table_NM[self._sequence_T, self.host_positions_T // size]
        return self._tensor(blocks_T * size + self.host_positions_T % size)

    @cached_property
    def cu_seqlens_q(self) -> Tensor:
        """int32 [N + 1], cumulative number of tokens."""
        return self._tensor(np.array([0, *np.cumsum(self.num_queries_N)], dtype=np.int32))

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """int32 [N + 1], cumulative number of keys: those in the cache and the forward's own."""
        return self._tensor(np.array([0, *np.cumsum(self.num_keys_N)], dtype=np.int32))

    @cached_property
    def block_table_NM(self) -> Tensor:
        """int32 cache blocks of each sequence, padded with 0."""
        return self._tensor(self.host_block_table_NM)

    @cached_property
    def num_visible_keys_T(self) -> Tensor:
        """int32; a token attends to this many first keys of its sequence. That one number expresses causal and block-causal
        attention, and attention within one block."""
        return self._tensor(self._host_visible_T.astype(np.int32))

    @cached_property
    def is_noisy_T(self) -> Tensor:
        """bool, tokens that are being denoised; they pass the gated LoRA of a model that has one."""
        return self._tensor(self._host_noisy_T)

    @cached_property
    def mask_block_T(self) -> Tensor:
        """int64 number of each token's mask block in the forward, counted from 0; a causal token is one alone."""
        return self._tensor(self.host_mask_block_T)

    @property
    def max_seqlen_q(self) -> int:
        """Most tokens of a sequence."""
        return int(self.num_queries_N.max())

    @property
    def max_seqlen_k(self) -> int:
        """Most keys of a sequence."""
        return int(self.num_keys_N.max())

    @cached_property
    def num_queries_N(self) -> Ints:
        """`cu_seqlens_q` as lengths, on the host."""
        return np.array([len(each.tokens) for each in self.slices], dtype=np.int64)

    @cached_property
    def num_keys_N(self) -> Ints:
        """`cu_seqlens_k` as lengths, on the host."""
        return np.array([each.start + len(each.tokens) for each in self.slices], dtype=np.int64)

    @cached_property
    def sees_all_N(self) -> NDArray[np.bool_]:
        """Whether every token of the sequence attends to all of its keys, on the host."""
        first_N = np.cumsum(self.num_queries_N) - self.num_queries_N
        sees_all_N: NDArray[np.bool_] = self._host_visible_T[first_N] == self.num_keys_N
        return sees_all_N

    @cached_property
    def is_consecutive_N(self) -> NDArray[np.bool_]:
        """Whether the sequence's cache blocks are neighbours in the KV cache, on the host."""
        tables = self.host_block_table_NM
        is_unused_NM = np.arange(tables.shape[1]) * self.cache_block_size >= self.num_keys_N[:, None]
        is_consecutive_N: NDArray[np.bool_] = ((np.diff(tables) == 1) | is_unused_NM[:, 1:]).all(1)
        return is_consecutive_N

    @cached_property
    def host_block_table_NM(self) -> NDArray[np.int32]:
        """`block_table_NM` on the host."""
        if len(self.slices) == 1:
            return np.array([self.slices[0].block_table], dtype=np.int32)
        longest = max(len(each.block_table) for each in self.slices)
        return np.array([[*each.block_table, *[0] * (longest - len(each.block_table))] for each in self.slices], dtype=np.int32)

    @cached_property
    def segments_C6(self) -> Ints:
        """int64 on the host, for kernels whose mask has one form per call. A segment is a sequence, or its causal and its
        noisy part: start, stop (tokens of the forward), first position, mask block size, noisy (0 or 1), sequence."""
        segments, row = list[tuple[int, ...]](), 0
        for number, (tokens, start, _, mask_block_size, causal_end, _) in enumerate(self.slices):
            stop = row + len(tokens)
            border = row + min(max(causal_end - start, 0), len(tokens))
            if border > row:
                segments.append((row, border, start, 1, 0, number))
            if stop > border:
                segments.append((border, stop, start + border - row, mask_block_size, 1, number))
            row = stop
        return np.array(segments, dtype=np.int64)

    @cached_property
    def adapted_runs(self) -> list[AdaptedRun]:
        """Tokens that have an adapter; sequences next to each other with the same one are one run."""
        runs, row = list[AdaptedRun](), 0
        for each in self.slices:
            start, row = row, row + len(each.tokens)
            if each.adapter is not None:
                joins = bool(runs) and runs[-1].stop == start and runs[-1].adapter is each.adapter
                start = runs.pop().start if joins else start
                runs.append(AdaptedRun(start, row, each.adapter))
        return runs

    @cached_property
    def host_positions_T(self) -> Ints:
        """`positions_T` on the host."""
        if len(self.slices) == 1:
            tokens, start = self.slices[0][:2]
            return np.arange(start, start + len(tokens))
        return np.fromiter(chain.from_iterable(range(s.start, s.start + len(s.tokens)) for s in self.slices), np.int64)

    @cached_property
    def host_mask_block_T(self) -> Ints:
        """`mask_block_T` on the host."""
        key_4T = np.stack((self._sequence_T, self._host_noisy_T, self.host_positions_T // self._mask_size_T))
        begins_T = (np.diff(key_4T, axis=1) != 0).any(0)
        numbers_T: Ints = np.concatenate(([0], np.cumsum(begins_T)))
        return numbers_T

    @cached_property
    def _sequence_T(self) -> Ints:
        """By token, its sequence."""
        return np.repeat(np.arange(len(self.slices)), self.num_queries_N)

    @cached_property
    def _host_noisy_T(self) -> NDArray[np.bool_]:
        """By token, whether it stands at or behind `causal_end`."""
        noisy_T: NDArray[np.bool_] = self.host_positions_T >= np.array([s.causal_end for s in self.slices])[self._sequence_T]
        return noisy_T

    @cached_property
    def _mask_size_T(self) -> Ints:
        size_T = np.array([each.mask_block_size for each in self.slices], dtype=np.int64)[self._sequence_T]
        return np.where(self._host_noisy_T, size_T, 1)

    @cached_property
    def _host_visible_T(self) -> Ints:
        size_T = self._mask_size_T
        visible_T: Ints = np.minimum((self.host_positions_T // size_T + 1) * size_T, self.num_keys_N[self._sequence_T])
        return visible_T

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device == "cpu" or tensor.device == self.device else tensor.to(self.device)
