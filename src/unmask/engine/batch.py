"""The batch: tokens of several sequences in one forward, and the metadata that every paged attention kernel takes.

Owns the layout of a forward and where their keys and values lie in the KV cache. Knows neither requests nor the cache's
memory: a slot is a number, `cache_block * cache_block_size + offset`, and what it addresses is the backend's matter.

Legend: T tokens of the forward, N sequences, M cache blocks of a sequence, C segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SequenceSlice:
    """Consecutive positions of one sequence, to be run in a forward.

    Attributes:
        tokens: what the model reads, one id a position.
        start: the first position; keys and values of all positions before it are in the KV cache.
        block_table: cache blocks of the sequence in order, at least up to the last of these positions.
        mask_block_size: attention is block-causal with blocks of this size; 1 is causal.
        causal_end: positions below it attend causally and are clean; those from it on are noisy (`Batch.is_noisy_T`).
    """

    tokens: Sequence[int]
    start: int
    block_table: Sequence[int]
    mask_block_size: int
    causal_end: int = 0


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward over T tokens of N sequences, in order.

    Attributes:
        tokens_T: int64 ids.
        positions_T: int64, counted from the start of the sequence.
        slot_mapping_T: int64 slot of the KV cache that each token's own key and value are written to.
        cu_seqlens_q: int32 [N + 1], cumulative number of tokens.
        cu_seqlens_k: int32 [N + 1], cumulative number of keys: those in the cache and the forward's own.
        block_table_NM: int32 cache blocks of each sequence, padded with 0.
        num_visible_keys_T: int32; a token attends to this many first keys of its sequence. That one number expresses causal and
            block-causal attention, and attention within one block.
        is_noisy_T: bool, tokens that are being denoised; they pass the gated LoRA of a model that has one.
        max_seqlen_q: most tokens of a sequence.
        max_seqlen_k: most keys of a sequence.
        cache_block_size: tokens in a cache block.
        num_queries_N: `cu_seqlens_q` as lengths, on the host.
        num_keys_N: `cu_seqlens_k` as lengths, on the host.
        sees_all_N: whether every token of the sequence attends to all of its keys, on the host.
        is_consecutive_N: whether the sequence's cache blocks are neighbours in the KV cache, on the host.
        host_block_table_NM: `block_table_NM` on the host.
        segments_C6: int64 on the host, for kernels whose mask has one form per call. A segment is a sequence, or its causal and
            its noisy part: start, stop (tokens of the forward), first position, mask block size, noisy (0 or 1), sequence.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slot_mapping_T: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    block_table_NM: Tensor
    num_visible_keys_T: Tensor
    is_noisy_T: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    cache_block_size: int
    num_queries_N: Ints
    num_keys_N: Ints
    sees_all_N: NDArray[np.bool_]
    is_consecutive_N: NDArray[np.bool_]
    host_block_table_NM: NDArray[np.int32]
    segments_C6: Ints

    @classmethod
    def build(cls, slices: Sequence[SequenceSlice], cache_block_size: int, device: torch.device | str) -> Batch:
        """The batch of these slices, one a sequence; one copy a tensor to `device`."""
        sizes = [(len(s.tokens), s.start, s.mask_block_size, s.causal_end) for s in slices]
        num_queries, start, mask_block_size, causal_end = np.array(sizes, dtype=np.int64).T
        num_keys, ends = start + num_queries, np.cumsum(num_queries)
        tables = np.zeros((len(slices), max(len(s.block_table) for s in slices)), dtype=np.int32)
        for row, each in zip(tables, slices, strict=True):
            row[: len(each.block_table)] = each.block_table
        is_unused_NM = np.arange(tables.shape[1]) * cache_block_size >= num_keys[:, None]
        # By token: its sequence, its position, and whether it stands before `causal_end`.
        sequence_T = np.repeat(np.arange(len(slices)), num_queries)
        positions_T = np.arange(len(sequence_T)) + (num_keys - ends)[sequence_T]
        noisy_T = positions_T >= causal_end[sequence_T]
        size_T = np.where(noisy_T, mask_block_size[sequence_T], 1)
        visible_T = np.minimum((positions_T // size_T + 1) * size_T, num_keys[sequence_T])
        slot_mapping_T = tables[sequence_T, positions_T // cache_block_size] * np.int64(cache_block_size)
        slot_mapping_T += positions_T % cache_block_size
        tokens_T = np.fromiter(chain.from_iterable(s.tokens for s in slices), np.int64, len(sequence_T))

        def tensor(array: NDArray[np.generic], dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(array).to(device=device, dtype=dtype)

        return cls(
            tokens_T=tensor(tokens_T, torch.int64),
            positions_T=tensor(positions_T, torch.int64),
            slot_mapping_T=tensor(slot_mapping_T, torch.int64),
            cu_seqlens_q=tensor(np.concatenate(([0], ends)), torch.int32),
            cu_seqlens_k=tensor(np.concatenate(([0], np.cumsum(num_keys))), torch.int32),
            block_table_NM=tensor(tables, torch.int32),
            num_visible_keys_T=tensor(visible_T, torch.int32),
            is_noisy_T=tensor(noisy_T, torch.bool),
            max_seqlen_q=int(num_queries.max()),
            max_seqlen_k=int(num_keys.max()),
            cache_block_size=cache_block_size,
            num_queries_N=num_queries,
            num_keys_N=num_keys,
            sees_all_N=visible_T[ends - num_queries] == num_keys,
            is_consecutive_N=((np.diff(tables) == 1) | is_unused_NM[:, 1:]).all(1),
            host_block_table_NM=tables,
            segments_C6=_segments(start, num_queries, mask_block_size, causal_end),
        )


def _segments(start_N: Ints, num_queries_N: Ints, mask_block_size_N: Ints, causal_end_N: Ints) -> Ints:
    """`Batch.segments_C6`: of every sequence the causal part and the noisy one, unless it is empty."""
    stop_N = np.cumsum(num_queries_N)
    border_N = stop_N - num_queries_N + np.clip(causal_end_N - start_N, 0, num_queries_N)
    one_N, sequence_N = np.ones_like(start_N), np.arange(len(start_N))
    position_N = start_N + border_N - (stop_N - num_queries_N)
    causal = np.stack((stop_N - num_queries_N, border_N, start_N, one_N, 0 * one_N, sequence_N), 1)
    noisy = np.stack((border_N, stop_N, position_N, mask_block_size_N, one_N, sequence_N), 1)
    both = np.stack((causal, noisy), 1).reshape(-1, 6)
    return np.ascontiguousarray(both[both[:, 0] < both[:, 1]])
