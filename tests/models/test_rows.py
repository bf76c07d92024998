"""Paged attention: writes go to their slots only, a segment sees what it may, wherever its keys live."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiny import tiny_config
from unmask.diffusion.masks import block_causal_mask
from unmask.models.arch.attention import DenseAttend
from unmask.models.rows import PagedAttend, Rows, Segment

CONFIG = tiny_config("llama")
SLOTS = 64


def heads(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 4 heads, keys and values of 2, float64."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, count, length, 8, generator=generator, dtype=torch.float64) for count in (4, 2, 2))
    return q, k, v


def empty_store() -> Tensor:
    """No slot may be read before it is written."""
    shape = (CONFIG.num_layers, 2, CONFIG.num_kv_heads, SLOTS, CONFIG.head_dim)
    return torch.full(shape, float("nan"), dtype=torch.float64)


def rows_of(*segments: Segment) -> Rows:
    tokens = [[0] * (segment.stop - segment.start) for segment in segments]
    return Rows.join(tokens, segments, "cpu")


def segment(slots: list[int], past: int, block_size: int, *, start: int = 0) -> Segment:
    """All keys of a sequence but the first `past` are this forward's own."""
    consecutive = slots == list(range(slots[0], slots[0] + len(slots)))
    return Segment(start, start + len(slots) - past, past, block_size, torch.tensor(slots), consecutive)


def expected(q: Tensor, k: Tensor, v: Tensor, past: int, block_size: int) -> Tensor:
    """Rows from `past` on, from all keys and values at once."""
    mask = block_causal_mask(k.shape[2], k.shape[2], block_size)[None]
    return DenseAttend(mask)(0, q, k, v)[:, :, past:]


def test_rows_are_joined_in_order() -> None:
    first, second = segment([3, 4, 5, 6], 1, 4), segment([9, 8], 0, 1, start=3)
    rows = Rows.join([[10, 11, 12], [20, 21]], [first, second], "cpu")
    assert rows.tokens_T.tolist() == [10, 11, 12, 20, 21]
    assert rows.positions_T.tolist() == [1, 2, 3, 0, 1]
    assert (first.num_keys, second.num_keys) == (4, 2)
    assert rows.tokens_T.dtype == rows.positions_T.dtype == torch.int64


def test_committed_tokens_are_seen_before_this_forwards_own() -> None:
    """Three forwards of one sequence equal one over all of it, in every layer."""
    store, (q, k, v) = empty_store(), heads(1, 9)
    slots = list(range(20, 29))
    for layer in range(CONFIG.num_layers):
        parts = []
        for past, stop in ((0, 4), (4, 8), (8, 9)):
            attend = PagedAttend(store, rows_of(segment(slots[:stop], past, 4)))
            at = slice(past, stop)
            parts.append(attend(layer, q[:, :, at] + layer, k[:, :, at] + layer, v[:, :, at] - layer))
        whole = DenseAttend(block_causal_mask(9, 9, 4)[None])(layer, q + layer, k + layer, v - layer)
        # The last block is incomplete: its row sees itself and what came before.
        torch.testing.assert_close(torch.cat(parts, 2), whole)


@given(
    st.permutations(range(SLOTS)),
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 11), st.sampled_from([1, 2, 4, 5])), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_every_segment_attends_as_if_alone(order: list[int], shapes: list[tuple[int, int, int]], seed: int) -> None:
    """Scattered slots, unlike lengths, pasts and block sizes; neighbours do not matter."""
    store, segments, parts, wanted, alone = empty_store(), [], [], [], []
    taken, start = 0, 0
    for number, (length, past, block_size) in enumerate(shapes):
        past = min(past // block_size * block_size, length - 1)
        q, k, v = heads(seed + number, length)
        slots = order[taken : taken + length]
        taken += length
        if past:
            PagedAttend(store, rows_of(segment(slots[:past], 0, block_size)))(1, q[:, :, :past], k[:, :, :past], v[:, :, :past])
        segments.append(segment(slots, past, block_size, start=start))
        start += length - past
        parts.append([x[:, :, past:] for x in (q, k, v)])
        wanted.append(expected(q, k, v, past, block_size))
        own = rows_of(replace(segments[-1], start=0, stop=length - past))
        alone.append(PagedAttend(store.clone(), own)(1, *parts[-1]))
    q, k, v = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    before = store.clone()
    found = PagedAttend(store, rows_of(*segments))(1, q, k, v)
    torch.testing.assert_close(found, torch.cat(wanted, 2))
    assert torch.equal(found, torch.cat(alone, 2)), "neighbours change not even the rounding"
    written = torch.zeros(SLOTS, dtype=torch.bool)
    for each in segments:
        written[each.slots_K[each.past :]] = True
    same = (store == before) | (store.isnan() & before.isnan())
    assert same[:, :, :, ~written].all(), "writes go to their slots only"
    assert same[0].all(), "and to their layer"
    assert torch.equal(store[1, 0][:, torch.cat([s.slots_K[s.past :] for s in segments])], k[0])
    assert torch.equal(store[1, 1][:, torch.cat([s.slots_K[s.past :] for s in segments])], v[0])


@pytest.mark.parametrize("block_size", [1, 4])
def test_consecutive_slots_equal_gathered_ones(block_size: int) -> None:
    q, k, v = heads(3, 8)
    results = []
    for slots in (list(range(5, 13)), [40, 2, 17, 33, 8, 9, 60, 1]):
        for consecutive in {slots[1] == slots[0] + 1, False}:
            store = empty_store()
            first = replace(segment(slots[:4], 0, block_size), consecutive=consecutive)
            PagedAttend(store, rows_of(first))(0, q[:, :, :4], k[:, :, :4], v[:, :, :4])
            second = replace(segment(slots, 4, block_size), consecutive=consecutive)
            results.append(PagedAttend(store, rows_of(second))(0, q[:, :, 4:], k[:, :, 4:], v[:, :, 4:]))
    assert len(results) == 3
    for result in results:
        torch.testing.assert_close(result, expected(q, k, v, 4, block_size))


def test_a_denoising_pass_leaves_no_trace() -> None:
    """A block is forwarded many times: only what the last pass wrote counts."""
    store, (q, k, v) = empty_store(), heads(1, 7)
    slots = [7, 3, 11, 12, 30, 31, 32]
    PagedAttend(store, rows_of(segment(slots[:4], 0, 4)))(0, q[:, :, :4], k[:, :, :4], v[:, :, :4])
    for seed in range(3, 6):
        PagedAttend(store, rows_of(segment(slots, 4, 4)))(0, *heads(seed, 3))
    found = PagedAttend(store, rows_of(segment(slots, 4, 4)))(0, q[:, :, 4:], k[:, :, 4:], v[:, :, 4:])
    torch.testing.assert_close(found, expected(q, k, v, 4, 4))


def test_a_shared_prefix_serves_several_segments() -> None:
    store, (q, k, v) = empty_store(), heads(1, 4)
    PagedAttend(store, rows_of(segment([0, 1, 2, 3], 0, 4)))(0, q, k, v)
    q2, k2, v2 = heads(2, 4)
    two = [segment([0, 1, 2, 3, 8, 9], 4, 4), segment([0, 1, 2, 3, 5, 6], 4, 4, start=2)]
    found = PagedAttend(store, rows_of(*two))(0, q2, k2, v2)
    for at in (slice(0, 2), slice(2, 4)):
        parts = (torch.cat((x, y[:, :, at]), 2) for x, y in ((q, q2), (k, k2), (v, v2)))
        torch.testing.assert_close(found[:, :, at], expected(*parts, 4, 4))
