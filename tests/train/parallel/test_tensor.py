"""Tensor parallelism: the losses, figures and gradients of one process."""

from __future__ import annotations

import pytest

from matrix import Case, assert_equals_one_process
from processes import Pool
from unmask.train.parallel.dims import ParallelDims

TWO = ParallelDims(tensor=2)
FOUR = ParallelDims(tensor=4)
SHARDED = ParallelDims(data_shard=2, tensor=2)
WITH_CONTEXT = ParallelDims(context=2, tensor=2)
WITH_EXPERTS = ParallelDims(data_shard=2, tensor=2, expert=2)
CHECKPOINTING = {"activation_checkpointing": True}
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}

QUICK = [Case(TWO, "cap", model=BIASES), Case(SHARDED, "draft", "gated", model={"tied_head": True})]
SLOW = [
    *(Case(TWO, block_size=size) for size in (1, None)),
    Case(TWO, "preference", "full", "qwen2"),
    Case(TWO, "preference", "lora"),
    Case(TWO, "next_token", "lora", "qwen2", train=CHECKPOINTING),
    Case(TWO, "ar_loss", "full", "qwen2"),
    Case(TWO, "denoise", "gated", "qwen2", train=CHECKPOINTING),
    Case(TWO, "draft", "lora", "qwen3"),
    Case(TWO, "denoise", "full", "llada2"),
    Case(TWO, "cap", "lora", "llada2"),
    Case(FOUR, "denoise", "full", "qwen3", train=CHECKPOINTING),
    Case(FOUR, "cap", "gated", "qwen3"),
    Case(FOUR, "next_token", "full", "llada2", model={"num_kv_heads": 4}),
    Case(SHARDED, "denoise", "full", "qwen2"),
    Case(SHARDED, "cap", "lora", train=CHECKPOINTING),
    Case(SHARDED, "preference"),
    Case(SHARDED, "ar_loss", "full", "llada2"),
    Case(WITH_CONTEXT, "denoise", "full", "qwen2", train=CHECKPOINTING),
    Case(WITH_CONTEXT, "cap", "lora", "llada2"),
    Case(WITH_CONTEXT, "draft", "gated"),
    Case(WITH_CONTEXT, "preference", "lora"),
    Case(WITH_CONTEXT, "next_token", "full", "qwen3"),
    Case(WITH_EXPERTS, "cap", "full", "llada2", router="aux"),
    Case(TWO, "denoise", "full", "llada2", router="bias", train=CHECKPOINTING),
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_ranks_train_as_one_process(pool: Pool, case: Case) -> None:
    assert_equals_one_process(pool, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_further_objectives_train_as_one_process(pool: Pool, case: Case) -> None:
    assert_equals_one_process(pool, case)
