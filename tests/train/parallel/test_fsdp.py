"""FSDP and HSDP: the losses, figures and gradients of one process."""

from __future__ import annotations

import pytest

from matrix import Case, assert_equals_one_process, cases
from processes import Pool
from unmask.train.parallel.dims import ParallelDims

SHARD2 = ParallelDims(data_shard=2)
HYBRID, COPIES = ParallelDims(data_replicate=2, data_shard=2), ParallelDims(data_replicate=2)

QUICK = [
    Case(SHARD2, model={"tied_head": True}),
    Case(SHARD2, "cap", "lora", train={"activation_checkpointing": True}),
    # Copies sum the gradients of two micro-batches once.
    Case(HYBRID, "draft", "gated", train={"micro_rows": 1}),
    # Ranks have different numbers of chunks: of 8 rows the last is padding, and the noise differs.
    Case(SHARD2, chunk=3),
    Case(COPIES, "denoise", train={"micro_rows": 1}),
]
SLOW = [
    *(Case(SHARD2, block_size=size) for size in (1, None)),
    Case(SHARD2, "preference"),
    Case(SHARD2, "preference", "lora"),
    Case(SHARD2, "next_token", model={"tied_head": True}),
    Case(SHARD2, "joint", "full"),
    Case(SHARD2, "joint_to_parent", model={"tied_head": True}, train={"activation_checkpointing": True}, chunk=3),
    Case(SHARD2, "joint_to_parent", "lora", train={"freeze_embeddings": True}),
    Case(SHARD2, "denoise", "gated", train={"activation_checkpointing": True}),
    Case(SHARD2, "draft", "lora"),
    Case(SHARD2, "taught_draft", model={"tied_head": True}, train={"activation_checkpointing": True}, chunk=3),
    Case(HYBRID, "taught_draft", "gated", train={"micro_rows": 1}),
    Case(SHARD2, "denoise", "full", "llada2"),
    Case(HYBRID, "denoise", "lora", train={"activation_checkpointing": "selective"}),
    Case(HYBRID, "cap", "full", "llada2", train={"micro_rows": 1}),
    Case(HYBRID, "preference"),
    Case(HYBRID, "next_token", "lora"),
    Case(COPIES, "joint"),
    Case(COPIES, "draft", "gated", train={"activation_checkpointing": True}),
    Case(COPIES, "cap", "full", "llada2", train={"micro_rows": 1}),
    Case(COPIES, "preference", "lora"),
    Case(SHARD2, "cap", "lora", train={"activation_checkpointing": True}, chunk=3),
    Case(SHARD2, "preference", chunk=3),
    Case(SHARD2, "draft", "gated", model={"tied_head": True}, chunk=3),
    Case(ParallelDims(data_shard=2, tensor=2), chunk=3),
    Case(ParallelDims(data_shard=2, tensor=2), "cap", chunk=3),
    Case(ParallelDims(data_shard=2, context=2), chunk=3),
    Case(ParallelDims(data_shard=2, pipeline=2), chunk=3),
]


@pytest.mark.parametrize("case", cases(QUICK, SLOW))
def test_ranks_train_as_one_process(pool: Pool, case: Case) -> None:
    assert_equals_one_process(pool, case)
