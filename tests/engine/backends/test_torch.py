"""Paged attention in PyTorch: writes go to their slots only, a sequence sees what it may, wherever its keys are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conformance.sequential import SequentialAttend
from tiny import tiny_config
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.backends.torch import PaddedAttend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.models.arch.attention import Attend, DenseAttend

CONFIG = tiny_config("llama")
NUM_BLOCKS = 256
Attending = Callable[[Batch, Tensor], Attend]
both = pytest.mark.parametrize("attending", [SequentialAttend, PaddedAttend])


def heads(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys and values of 2, float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, count, length, 8, generator=generator, dtype=torch.float64) for count in (4, 2, 2))
    return q, k, v


def empty_cache(cache_block_size: int = 1) -> Tensor:
    """No slot may be read before it is written."""
    shape = (CONFIG.num_layers, 2, NUM_BLOCKS, cache_block_size, CONFIG.num_kv_heads, CONFIG.head_dim)
    return torch.full(shape, float("nan"), dtype=torch.float64)


def slice_of(block_table: list[int], start: int, stop: int, block_size: int, causal_end: int = 0) -> SequenceSlice:
    return SequenceSlice([0] * (stop - start), start, block_table, block_size, causal_end)


def batch_of(*slices: SequenceSlice, size: int = 1) -> Batch:
    return Batch(slices, size, "cpu")


def expected(q: Tensor, k: Tensor, v: Tensor, past: int, block_size: int, causal_end: int = 0) -> Tensor:
    """Rows from `past` on, from all keys and values at once."""
    mask = block_causal_mask(k.shape[2], k.shape[2], block_size, context=causal_end)[None]
    return DenseAttend(mask)(0, q, k, v)[:, :, past:]


@both
def test_committed_tokens_are_seen_before_this_forwards_own(attending: Attending) -> None:
    """Three forwards of one sequence equal one over all of it, in every layer."""
    kv_cache, (q, k, v) = empty_cache(), heads(1, 9)
    table = list(range(20, 29))
    for layer in range(CONFIG.num_layers):
        parts = []
        for past, stop in ((0, 4), (4, 8), (8, 9)):
            attend = attending(batch_of(slice_of(table, past, stop, 4)), kv_cache)
            at = slice(past, stop)
            parts.append(attend(layer, q[:, :, at] + layer, k[:, :, at] + layer, v[:, :, at] - layer))
        whole = DenseAttend(block_causal_mask(9, 9, 4)[None])(layer, q + layer, k + layer, v - layer)
        # The last block is incomplete: its row sees itself and what came before.
        torch.testing.assert_close(torch.cat(parts, 2), whole)


SHAPES = st.tuples(
    st.integers(1, 40) | st.integers(120, 150), st.integers(0, 149), st.sampled_from([1, 2, 4, 5, 2**40]), st.integers(0, 160)
)


@both
@given(st.lists(SHAPES, min_size=1, max_size=4), st.integers(1, 7), st.booleans(), st.integers(0, 99))
def test_every_sequence_attends_as_if_alone(
    attending: Attending, shapes: list[tuple[int, int, int, int]], size: int, scattered: bool, seed: int
) -> None:
    """Unlike lengths, pasts, block sizes and causal parts, cache blocks scattered or neighbours; neighbours do not matter."""
    kv_cache, slices, parts, alone, answers = empty_cache(size), list[SequenceSlice](), [], [], []
    blocks = (
        torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
        if scattered
        else [*range(NUM_BLOCKS)]
    )
    for number, (length, past, block_size, causal_end) in enumerate(shapes):
        if sum(len(each.block_table) for each in slices) + length > NUM_BLOCKS:
            break
        past = min(past // block_size * block_size, length - 1)
        causal_end = min(causal_end // block_size * block_size, length)
        q, k, v = heads(seed + number, length)
        table = [blocks.pop(0) for _ in range(-(-length // size))]
        if past:
            before = batch_of(slice_of(table, 0, past, block_size, causal_end), size=size)
            attending(before, kv_cache)(1, q[:, :, :past], k[:, :, :past], v[:, :, :past])
        slices.append(slice_of(table, past, length, block_size, causal_end))
        parts.append([x[:, :, past:] for x in (q, k, v)])
        answers.append(expected(q, k, v, past, block_size, causal_end))
        alone.append(attending(batch_of(slices[-1], size=size), kv_cache.clone())(1, *parts[-1]))
    q, k, v = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    before_it, batch = kv_cache.clone(), batch_of(*slices, size=size)
    found = attending(batch, kv_cache)(1, q, k, v)
    torch.testing.assert_close(found, torch.cat(answers, 2))
    if attending is SequentialAttend:
        assert torch.equal(found, torch.cat(alone, 2)), "neighbours change not even the rounding"
    check_written(kv_cache, before_it, batch, k, v)


def check_written(kv_cache: Tensor, before: Tensor, batch: Batch, k: Tensor, v: Tensor) -> None:
    """Keys and values are in their slots of layer 1, and nothing else has changed."""
    written = torch.zeros(kv_cache[0, 0].shape[0] * kv_cache.shape[3], dtype=torch.bool)
    written[batch.slot_mapping_T] = True
    same = ((kv_cache == before) | (kv_cache.isnan() & before.isnan())).flatten(2, 3)
    assert same[:, :, ~written].all(), "writes go to their slots only"
    assert same[0].all(), "and to their layer"
    for stored, x in zip(kv_cache[1].flatten(1, 2), (k, v), strict=True):
        assert torch.equal(stored[batch.slot_mapping_T], x[0].transpose(0, 1))


@both
@pytest.mark.parametrize("block_size", [1, 4])
def test_neighbouring_cache_blocks_equal_scattered_ones(attending: Attending, block_size: int) -> None:
    q, k, v = heads(3, 200)
    for table in (list(range(5, 205)), torch.randperm(NUM_BLOCKS).tolist()[:200]):
        kv_cache = empty_cache()
        attending(batch_of(slice_of(table, 0, 160, block_size)), kv_cache)(0, q[:, :, :160], k[:, :, :160], v[:, :, :160])
        attend = attending(batch_of(slice_of(table, 160, 200, block_size)), kv_cache)
        torch.testing.assert_close(attend(0, q[:, :, 160:], k[:, :, 160:], v[:, :, 160:]), expected(q, k, v, 160, block_size))


@both
def test_a_denoising_pass_leaves_no_trace(attending: Attending) -> None:
    """A block is forwarded many times: only what the last pass wrote counts."""
    kv_cache, (q, k, v) = empty_cache(), heads(1, 7)
    table = [7, 3, 11, 12, 30, 31, 32]
    attending(batch_of(slice_of(table, 0, 4, 4)), kv_cache)(0, q[:, :, :4], k[:, :, :4], v[:, :, :4])
    last = batch_of(slice_of(table, 4, 7, 4))
    for seed in range(3, 6):
        attending(last, kv_cache)(0, *heads(seed, 3))
    found = attending(last, kv_cache)(0, q[:, :, 4:], k[:, :, 4:], v[:, :, 4:])
    torch.testing.assert_close(found, expected(q, k, v, 4, 4))


@both
def test_a_shared_prefix_serves_several_sequences(attending: Attending) -> None:
    kv_cache, (q, k, v) = empty_cache(2), heads(1, 4)
    first = slice_of([0, 1], 0, 4, 4)
    attending(batch_of(first, size=2), kv_cache)(0, q, k, v)
    q2, k2, v2 = heads(2, 4)
    two = [slice_of([0, 1, last], 4, 6, 4) for last in (8, 5)]
    found = attending(batch_of(*two, size=2), kv_cache)(0, q2, k2, v2)
    for at in (slice(0, 2), slice(2, 4)):
        parts = (torch.cat((x, y[:, :, at]), 2) for x, y in ((q, q2), (k, k2), (v, v2)))
        torch.testing.assert_close(found[:, :, at], expected(*parts, 4, 4))
