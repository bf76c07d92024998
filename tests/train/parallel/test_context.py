"""Context parallelism: positions dealt over ranks, and the losses, figures and gradients of one process."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from matrix import Case, assert_equals_one_process, cases
from processes import Pool
from tiny import MASK, pack, text
from unmask.diffusion.corrupt import CorruptionConfig, Stream, corrupt
from unmask.models.arch.attention import Attend, DenseAttend
from unmask.train.parallel.context import ContextShard
from unmask.train.parallel.dims import ParallelDims

TWO = ParallelDims(context=2)
FOUR = ParallelDims(context=4)
SHARDED = ParallelDims(data_shard=2, context=2)
CHECKPOINTING = {"activation_checkpointing": True}
SELECTIVE = {"activation_checkpointing": "selective"}

QUICK = [Case(TWO, "cap", "lora", train=SELECTIVE), Case(SHARDED, "draft", "gated")]
SLOW = [
    *(Case(TWO, block_size=size) for size in (1, None)),
    Case(TWO, "preference"),
    Case(TWO, "preference", "lora"),
    Case(TWO, "next_token"),
    Case(TWO, "denoise", "gated", train=CHECKPOINTING),
    Case(TWO, "denoise", "full", "llada2"),
    Case(FOUR, "joint"),
    Case(FOUR, "draft", "lora"),
    Case(FOUR, "cap", "gated"),
    Case(FOUR, "denoise", "full", "qwen3"),
    Case(SHARDED, "denoise"),
    Case(SHARDED, "cap", "full", "llada2"),
    Case(SHARDED, "preference"),
    Case(SHARDED, "next_token", "lora"),
    Case(ParallelDims(context=2, expert=2), "denoise", "full", "llada2", router="bias", train=CHECKPOINTING),
    Case(FOUR, "cap", "full", "llada2", router="aux"),
]


@pytest.mark.parametrize("case", cases(QUICK, SLOW))
def test_ranks_train_as_one_process(pool: Pool, case: Case) -> None:
    assert_equals_one_process(pool, case)


def attended(context: ContextShard | None, heads: tuple[int, int], length: int) -> list[Tensor]:
    """Attention under a random mask and the gradients of its inputs: of all positions, or of those of this rank."""
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, heads[0], length, 4), (2, heads[1], length, 4), (2, heads[1], length, 4))
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    mask_BTT = torch.rand(2, length, length, generator=generator) < 0.5
    mask_BTT |= torch.eye(length, dtype=torch.bool)
    weight = torch.randn(whole[0].shape, generator=generator, dtype=torch.float64)
    attend: Attend = DenseAttend(mask_BTT)
    inputs = whole
    if context is not None:
        inputs, weight = [of_rank(context, x) for x in whole], of_rank(context, weight)
        attend = context.attend(attend, length)
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = attend(0, *inputs)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), inputs)]


def of_rank(context: ContextShard, x_BHTS: Tensor) -> Tensor:
    return context.take(x_BHTS.transpose(1, 2)).transpose(1, 2)


def attended_on_ranks(heads: tuple[int, int], length: int) -> list[tuple[Tensor, Tensor]]:
    """What a rank has of outputs and gradients, and what it should have."""
    context = ContextShard(dist.group.WORLD, dist.get_rank(), dist.get_world_size())  # type: ignore[arg-type]
    real = context.positions(length) < length
    found = attended(context, heads, length)
    expected = [of_rank(context, x) for x in attended(None, heads, length)]
    return [(a[:, :, real], b[:, :, real]) for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(("size", "heads", "length"), [(2, (4, 2), 7), (2, (4, 1), 1), (4, (4, 2), 9)])
def test_attention_is_exact_under_any_mask(pool: Pool, size: int, heads: tuple[int, int], length: int) -> None:
    """Also where ranks outnumber kv heads or positions, or do not divide the positions."""
    for pairs in pool.run(size, attended_on_ranks, heads, length):
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def shards(size: int) -> list[ContextShard]:
    """Every rank's share; nothing here is exchanged."""
    return [ContextShard(cast(Any, None), rank, size) for rank in range(size)]


def stream_of(length: int) -> Stream:
    rows = pack([[text(length, 0, prompt=2)], [text(length // 2, 1)]], length)
    return corrupt(rows, CorruptionConfig(MASK, 4, complementary=True), 0)


@given(st.integers(1, 5), st.integers(1, 40))
def test_every_position_has_one_rank_and_all_ranks_equally_many(size: int, length: int) -> None:
    dealt = [shard.positions(length) for shard in shards(size)]
    assert len({len(positions) for positions in dealt}) == 1
    together = torch.cat(dealt)
    assert sorted(together[together < length].tolist()) == list(range(length))
    assert len(together) < length + size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_predictions_are_shared_out_evenly_with_their_targets(size: int) -> None:
    stream = stream_of(512)
    shares = [shard.share(stream) for shard in shards(size)]
    counts = [len(share.target_N) for share in shares]
    assert sum(counts) == len(stream.target_N)
    assert max(counts) - min(counts) <= 0.2 * sum(counts) / size
    assert sum(share.num_maskable for share in shares) == stream.num_maskable
    taken = [
        (int(row), int(column), int(target))
        for share in shares
        for row, column, target in zip(*share.predict, share.target_N, strict=True)
    ]
    row_N, column_N = stream.predict
    assert sorted(taken) == sorted(zip(row_N.tolist(), column_N.tolist(), stream.target_N.tolist(), strict=True))


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_runs_its_positions_and_padding_is_no_document(size: int) -> None:
    stream = stream_of(21)
    for shard in shards(size):
        local = shard.local(stream)
        positions = shard.positions(stream.tokens_BT.shape[1])
        real = positions < stream.tokens_BT.shape[1]
        assert torch.equal(local.tokens_BT[:, real], stream.tokens_BT[:, positions[real]])
        assert not local.index.document_BT[:, ~real].any()
        row_N, column_N = local.predict
        assert torch.equal(positions[column_N], shard.share(stream).predict[1])
        assert bool((local.tokens_BT[row_N, column_N] == MASK).all())
