"""The attention predicate against its table, and every view of it against the plain one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from unmask.diffusion.masks import (
    CLEAN,
    BlockedMask,
    StreamIndex,
    block_causal_mask,
    blocked_mask,
    dense_mask,
    flex_mask_mod,
    may_attend,
)
from unmask.models.arch.attention import BlockedAttend, DenseAttend, FlexAttend

Place = tuple[int, int, int]  # document, block, copy
PLACES = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2))


def table(query: Place, key: Place) -> bool:
    """Who may attend to whom, row by row."""
    if query[0] != key[0]:
        return False
    query_is_clean, key_is_clean = query[2] == CLEAN, key[2] == CLEAN
    if query_is_clean and key_is_clean:
        return query[1] >= key[1]
    if query_is_clean:
        return False
    if key_is_clean:
        return query[1] > key[1]
    return query[1] == key[1] and query[2] == key[2]


def index_of(rows: list[list[Place]]) -> StreamIndex:
    return StreamIndex(*torch.tensor(rows).unbind(-1))


def brute_force(rows: list[list[Place]]) -> Tensor:
    return torch.tensor([[[table(q, k) for k in row] for q in row] for row in rows])


def training_layout(documents: list[int], block_size: int, copies: int) -> list[Place]:
    """`[x_t | x_t' | x_0]` of documents of these lengths, whole."""
    return [
        (document, i // block_size, copy)
        for copy in (*range(1, copies + 1), CLEAN)
        for document, length in enumerate(documents)
        for i in range(length)
    ]


def rows_of(min_length: int = 1, max_length: int = 14) -> st.SearchStrategy[list[list[Place]]]:
    lengths = st.tuples(st.integers(1, 2), st.integers(min_length, max_length))
    return lengths.flatmap(lambda s: st.lists(st.lists(PLACES, min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0]))


def test_the_table_by_hand() -> None:
    mask = dense_mask(index_of([[(0, 0, 1), (0, 1, 1), (0, 0, CLEAN), (0, 1, CLEAN)]]))[0]
    assert mask.int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


@settings(max_examples=50)
@given(rows_of())
def test_dense_mask_equals_the_table(rows: list[list[Place]]) -> None:
    assert torch.equal(dense_mask(index_of(rows)), brute_force(rows))


@given(st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=20))
def test_may_attend_is_elementwise(pairs: list[tuple[Place, Place]]) -> None:
    found = may_attend(index_of([[q for q, _ in pairs]]), index_of([[k for _, k in pairs]]))
    assert found.tolist() == [[table(q, k) for q, k in pairs]]


def test_index_slices_every_field() -> None:
    index = index_of([training_layout([5, 3], 2, 2)])
    part = index[:, 3:7]
    assert torch.equal(dense_mask(part), dense_mask(index)[:, 3:7, 3:7])


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_complementary_copies_never_see_each_other(block_size: int) -> None:
    index = index_of([training_layout([7, 4], block_size, 2)])
    mask, copy = dense_mask(index)[0], index.copy_BT[0]
    assert not mask[copy == 1][:, copy == 2].any()
    assert not mask[copy == 2][:, copy == 1].any()
    assert not mask[copy == CLEAN][:, copy != CLEAN].any()


@settings(max_examples=40)
@given(rows_of(max_length=30), st.integers(1, 9), st.integers(1, 9))
def test_tiles_cover_every_query_once_and_equal_the_dense_mask(rows: list[list[Place]], query: int, key: int) -> None:
    index = index_of(rows)
    tiled = blocked_mask(index, query_tile=query, key_tile=key)
    rebuilt = torch.zeros_like(dense_mask(index))
    assert len(tiled.rows) == len(rows)
    for row, tiles in enumerate(tiled.rows):
        covered = [q for tile in tiles for q in range(tile.start, tile.stop)]
        assert covered == list(range(len(rows[row])))
        for tile in tiles:
            columns = [k for start, stop in tile.keys for k in range(start, stop)]
            assert columns == sorted(set(columns))
            everything = torch.ones(tile.stop - tile.start, len(columns), dtype=torch.bool)
            rebuilt[row, tile.start : tile.stop, columns] = everything if tile.mask is None else tile.mask
    assert torch.equal(rebuilt, dense_mask(index))


def num_scores(mask: BlockedMask) -> int:
    return sum((tile.stop - tile.start) * (stop - start) for _, tile in mask.tiles() for start, stop in tile.keys)


def test_tiles_skip_what_no_query_sees() -> None:
    index = index_of([training_layout([64], 8, 1)])
    tiled = blocked_mask(index, query_tile=8, key_tile=8)
    assert num_scores(tiled) == int(dense_mask(index).sum())
    assert all(tile.mask is None for tile in tiled.rows[0])
    assert num_scores(blocked_mask(index, query_tile=128, key_tile=128)) == dense_mask(index).numel()


def heads(length: int, rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(rows, count, length, 8, generator=generator) for count in (4, 2, 2))
    return q, k, v


LAYOUTS = [([9, 1, 6], 4, 1), ([5, 11], 3, 2), ([16], 16, 1), ([3, 3, 10], 1, 1)]


@pytest.mark.parametrize(("documents", "block_size", "copies"), LAYOUTS)
@pytest.mark.parametrize(("query", "key"), [(4, 3), (7, 8), (128, 32)])
@pytest.mark.parametrize("num_queries", [None, 10])
def test_blocked_attention_equals_dense(
    documents: list[int], block_size: int, copies: int, query: int, key: int, num_queries: int | None
) -> None:
    index = index_of([training_layout(documents, block_size, copies), training_layout(documents[::-1], block_size, copies)])
    queries = None if num_queries is None else index[:, :num_queries]
    q_BHTS, *keys_values = heads(index.copy_BT.shape[1])
    inputs = [x.requires_grad_() for x in (q_BHTS[:, :, :num_queries], *keys_values)]
    dense = DenseAttend(dense_mask(index, queries=queries))(0, *inputs)
    attend = BlockedAttend(blocked_mask(index, queries=queries, query_tile=query, key_tile=key))
    blocked = attend(0, *inputs)
    torch.testing.assert_close(blocked, dense, atol=1e-5, rtol=0)
    torch.testing.assert_close(attend.slice_by_slice(*inputs), dense, atol=1e-5, rtol=0)
    cotangent = torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    found, expected = (torch.autograd.grad(out, inputs, cotangent) for out in (blocked, dense))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_blocked_attention_in_bfloat16_sums_gradients_in_float32() -> None:
    index = index_of([training_layout([64], 8, 2)] * 2)
    inputs = [x.bfloat16().requires_grad_() for x in heads(index.copy_BT.shape[1])]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    mask = blocked_mask(index, query_tile=8, key_tile=8)
    cotangent = torch.ones(inputs[0].shape)
    found = torch.autograd.grad(BlockedAttend(mask)(0, *inputs), inputs, cotangent.bfloat16())
    expected = torch.autograd.grad(DenseAttend(dense_mask(index))(0, *wide), wide, cotangent.double())
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert float((mine - theirs).norm() / theirs.norm()) < 0.004


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("documents", "block_size", "copies"), LAYOUTS[:2])
def test_flex_attention_equals_dense(documents: list[int], block_size: int, copies: int) -> None:
    index = index_of([training_layout(documents, block_size, copies), training_layout(documents[::-1], block_size, copies)])
    rows, length = index.copy_BT.shape
    q, k, v = heads(length)
    block_mask = create_block_mask(flex_mask_mod(index), rows, None, length, length, device="cpu")
    dense = DenseAttend(dense_mask(index))(0, q, k, v)
    torch.testing.assert_close(FlexAttend(block_mask)(0, q, k, v), dense, atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(rows_of(max_length=8))
def test_flex_mask_mod_equals_the_table(rows: list[list[Place]]) -> None:
    mask_mod = flex_mask_mod(index_of(rows))
    length = len(rows[0])
    at = torch.arange(length)
    head = torch.zeros((), dtype=torch.int64)
    found = torch.stack([mask_mod(torch.tensor(b), head, at[:, None], at[None, :]) for b in range(len(rows))])
    assert torch.equal(found, brute_force(rows))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 9))
def test_block_causal_mask(num_queries: int, num_keys: int, block_size: int, start: int) -> None:
    expected = [[k // block_size <= (start + q) // block_size for k in range(num_keys)] for q in range(num_queries)]
    assert block_causal_mask(num_queries, num_keys, block_size, start=start).tolist() == expected


def test_block_size_one_is_causal() -> None:
    assert torch.equal(block_causal_mask(6, 6, 1), torch.ones(6, 6, dtype=torch.bool).tril())
