"""Pipeline parallelism: the losses, figures and gradients of one process, with every schedule."""

from __future__ import annotations

import pytest

from matrix import Case, assert_equals_one_process, cases
from processes import Pool
from unmask.train.parallel.dims import ParallelDims

TWO = ParallelDims(pipeline=2)
INTERLEAVED = ParallelDims(pipeline=2, pipeline_schedule="interleaved_1f1b", pipeline_stages=2)
ZERO = ParallelDims(pipeline=2, pipeline_schedule="zero_bubble")
ZERO_TWICE = ParallelDims(pipeline=2, pipeline_schedule="zero_bubble", pipeline_stages=2)
INTERLEAVED_FOUR = ParallelDims(pipeline=4, pipeline_schedule="interleaved_1f1b", pipeline_stages=2)
FOUR = ParallelDims(pipeline=4)
SHARDED = ParallelDims(pipeline=2, data_shard=2)
SHARDED_ZERO = ParallelDims(pipeline=2, data_shard=2, pipeline_schedule="zero_bubble", pipeline_stages=2)
EXPERTS = ParallelDims(pipeline=2, data_shard=2, expert=2)
TENSOR = ParallelDims(pipeline=2, tensor=2)
CONTEXT = ParallelDims(pipeline=2, context=2)

DEEP = {"num_layers": 5}
TIED = {"tied_head": True}
RECOMPUTED = {"activation_checkpointing": True}

QUICK = [
    Case(TWO, "cap", model=TIED),
    Case(SHARDED_ZERO, "draft", "gated", model=DEEP),
    Case(INTERLEAVED, "preference", "lora", model=DEEP),
]
SLOW = [
    *(Case(TWO, block_size=size) for size in (1, None)),
    *(Case(dims, model=DEEP | TIED) for dims in (TWO, INTERLEAVED, ZERO, ZERO_TWICE, FOUR, SHARDED, SHARDED_ZERO)),
    *(Case(dims, family="llada2", router="aux", model=DEEP, train=RECOMPUTED) for dims in (TWO, FOUR, EXPERTS)),
    *(Case(dims, family="llada2", router="bias", model=DEEP) for dims in (INTERLEAVED, ZERO_TWICE, SHARDED, EXPERTS)),
    *(Case(dims, "preference", model=DEEP) for dims in (FOUR, SHARDED)),
    *(Case(dims, "denoise", "gated", model=DEEP, train=RECOMPUTED) for dims in (TWO, FOUR, SHARDED)),
    *(Case(dims, model=DEEP, train={"activation_checkpointing": "selective"}) for dims in (INTERLEAVED, SHARDED)),
    *(Case(dims, "cap", "lora", model=DEEP | TIED) for dims in (FOUR, ZERO, SHARDED)),
    Case(SHARDED, "joint", model=DEEP),
    Case(ZERO_TWICE, model=DEEP, train={"micro_rows": 8}),
    *(Case(INTERLEAVED_FOUR, model={"num_layers": 9}, train={"micro_rows": rows}) for rows in (1, 4)),
    Case(FOUR, "next_token", model=DEEP | TIED),
    Case(ZERO, "draft", model=DEEP, train=RECOMPUTED),
    *(Case(dims, model=DEEP | TIED) for dims in (TENSOR, CONTEXT)),
    *(Case(dims, "preference", "lora", model=DEEP) for dims in (TENSOR, CONTEXT)),
    *(Case(dims, "cap", "gated", model=DEEP) for dims in (TENSOR, CONTEXT)),
    Case(TENSOR, family="llada2", router="bias", model=DEEP),
]


@pytest.mark.parametrize("case", cases(QUICK, SLOW))
def test_ranks_train_as_one_process(pool: Pool, case: Case) -> None:
    assert_equals_one_process(pool, case)
