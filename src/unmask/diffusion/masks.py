"""Attention masks of block diffusion: one predicate, three views of it.

Owns the attention pattern of training and inference. Knows tensors only: no model, no cache.

A *stream* is the model's input: clean tokens and noisy copies of them, concatenated. `StreamIndex` holds, for every
stream position, its document, its block in that document, and its copy.

Legend: B batch, T stream positions, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CLEAN = 0
"""Copy number of the clean tokens; noisy copies count from 1."""


@dataclass(frozen=True)
class StreamIndex:
    """Document, block and copy of each stream position, as the predicate compares them; all int64 [B, T].

    `document` separates packed documents (padding is a document of its own), `block` counts from the start of the
    document, `copy` is `CLEAN` or the number of the noisy copy.
    """

    document_BT: Tensor
    block_BT: Tensor
    copy_BT: Tensor

    def __getitem__(self, index: tuple[slice, ...] | slice) -> StreamIndex:
        return StreamIndex(self.document_BT[index], self.block_BT[index], self.copy_BT[index])


def may_attend(query: StreamIndex, key: StreamIndex) -> Tensor:
    """The predicate, elementwise over broadcastable indices.

    Within a document: a noisy query sees its own block of its own noisy copy and the clean blocks strictly before it; a
    clean query sees the clean blocks up to and including its own; a clean query never sees a noisy key.

    Returns:
        Bool tensor, True where the query may attend to the key.

    Source: BD3-LM (2503.09573) section 3.3; LLaDA2.0 Eq. 4 (document-level mask).
    """
    same_document = query.document_BT == key.document_BT
    query_noisy, key_noisy = query.copy_BT != CLEAN, key.copy_BT != CLEAN
    own_noisy_block = (query.copy_BT == key.copy_BT) & key_noisy & (query.block_BT == key.block_BT)
    past_clean = query_noisy & ~key_noisy & (query.block_BT > key.block_BT)
    clean_clean = ~query_noisy & ~key_noisy & (query.block_BT >= key.block_BT)
    return same_document & (own_noisy_block | past_clean | clean_clean)


def dense_mask(stream: StreamIndex, *, queries: StreamIndex | None = None) -> Tensor:
    """The predicate as a bool tensor [B, T, T] (query, key), or [B, Q, T] for these `queries`. For reference and short rows."""
    queries = stream if queries is None else queries
    query = StreamIndex(queries.document_BT[:, :, None], queries.block_BT[:, :, None], queries.copy_BT[:, :, None])
    key = StreamIndex(stream.document_BT[:, None, :], stream.block_BT[:, None, :], stream.copy_BT[:, None, :])
    return may_attend(query, key)


@dataclass(frozen=True)
class Tile:
    """Queries `start:stop` of one row, the key ranges any of them may see, and the mask over those keys.

    `mask` is bool [stop - start, visible keys], or None when everything in the ranges is visible.
    """

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    mask: Tensor | None


@dataclass(frozen=True)
class BlockedMask:
    """The predicate cut into tiles, row by row: what a CPU needs to skip invisible keys."""

    rows: tuple[tuple[Tile, ...], ...]

    def tiles(self) -> Iterator[tuple[int, Tile]]:
        """Every tile, with its row."""
        return ((row, tile) for row, tiles in enumerate(self.rows) for tile in tiles)


def blocked_mask(
    stream: StreamIndex, *, queries: StreamIndex | None = None, query_tile: int = 128, key_tile: int = 32
) -> BlockedMask:
    """Cut the predicate into tiles of `query_tile` queries; keys are kept in runs of `key_tile`.

    Args:
        stream: the index of B rows of T positions, which are the keys.
        queries: the index of the queries; None: the stream's own.
        query_tile: queries that share one attention call.
        key_tile: granularity at which invisible keys are skipped.

    Returns:
        Tiles that cover every query once; equal to `dense_mask` restricted to the kept keys.
    """
    dense_BQT = dense_mask(stream, queries=queries)
    count = dense_BQT.shape[1]
    ranges = [(start, min(start + query_tile, count)) for start in range(0, count, query_tile)]
    return BlockedMask(tuple(tuple(_tile(dense_QT, start, stop, key_tile) for start, stop in ranges) for dense_QT in dense_BQT))


def _tile(dense_QT: Tensor, start: int, stop: int, key_tile: int) -> Tile:
    mask_QT = dense_QT[start:stop]
    length = mask_QT.shape[1]
    padded = torch.nn.functional.pad(mask_QT.any(0), (0, -length % key_tile))
    keep = padded.view(-1, key_tile).any(1).tolist()
    keys: list[tuple[int, int]] = []
    for index, visible in enumerate(keep):
        if not visible:
            continue
        low, high = index * key_tile, min((index + 1) * key_tile, length)
        if keys and keys[-1][1] == low:
            keys[-1] = (keys[-1][0], high)
        else:
            keys.append((low, high))
    mask_QK = torch.cat([mask_QT[:, low:high] for low, high in keys], dim=1)
    return Tile(start, stop, tuple(keys), None if bool(mask_QK.all()) else mask_QK)


MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_mask_mod(stream: StreamIndex) -> MaskMod:
    """The predicate as FlexAttention's `mask_mod(batch, head, query, key)`; pass it to `create_block_mask`."""
    # Half the registers of 64 bits, which is what the kernel has too few of.
    stream = StreamIndex(stream.document_BT.int(), stream.block_BT.int(), stream.copy_BT.int())

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        def at(position: Tensor) -> StreamIndex:
            return StreamIndex(
                stream.document_BT[batch, position], stream.block_BT[batch, position], stream.copy_BT[batch, position]
            )

        return may_attend(at(query), at(key))

    return mask_mod


def block_causal_mask(num_queries: int, num_keys: int, block_size: int, *, start: int = 0, context: int = 0) -> Tensor:
    """The pattern at inference, where the whole canvas is clean-or-current: bidirectional in a block, causal across.

    Args:
        num_queries: queries, at positions `start, start + 1, ...`.
        num_keys: keys, at positions `0, 1, ...`.
        block_size: tokens in a block, counted from position 0.
        start: position of the first query.
        context: positions below it see only themselves and what lies before: the context of a shifted model.

    Returns:
        Bool [num_queries, num_keys].
    """
    query, key = torch.arange(num_queries) + start, torch.arange(num_keys)
    visible = torch.where(query < context, query + 1, (query // block_size + 1) * block_size)
    return key[None, :] < visible[:, None]
