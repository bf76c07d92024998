"""Tensor parallelism: the losses, figures and gradients of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from matrix import Case, assert_equals_one_process, cases
from processes import Pool
from tiny import MASK, tiny_model
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.adapter import attach_lora
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.layouts import Layout, tensor_layouts
from unmask.train.parallel.tensor import split_model

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
    Case(TWO, "joint", "full", "qwen2"),
    Case(TWO, "denoise", "gated", "qwen2", train=CHECKPOINTING),
    Case(TWO, "draft", "lora", "qwen3"),
    Case(TWO, "denoise", "full", "llada2"),
    Case(TWO, "cap", "lora", "llada2"),
    Case(FOUR, "denoise", "full", "qwen3", train=CHECKPOINTING),
    Case(FOUR, "cap", "gated", "qwen3"),
    Case(FOUR, "next_token", "full", "llada2", model={"num_kv_heads": 4}),
    Case(SHARDED, "denoise", "full", "qwen2"),
    Case(SHARDED, "cap", "lora", train=CHECKPOINTING),
    Case(WITH_EXPERTS, family="llada2", router="aux", train={"activation_checkpointing": "selective"}),
    Case(SHARDED, "preference"),
    Case(SHARDED, "joint", "full", "llada2"),
    Case(WITH_CONTEXT, "denoise", "full", "qwen2", train=CHECKPOINTING),
    Case(WITH_CONTEXT, "cap", "lora", "llada2"),
    Case(WITH_CONTEXT, "draft", "gated"),
    Case(WITH_CONTEXT, "preference", "lora"),
    Case(WITH_CONTEXT, "next_token", "full", "qwen3"),
    Case(ParallelDims(tensor=2, pipeline=2), "draft", "gated", model={"num_layers": 4}),
    Case(WITH_EXPERTS, "cap", "full", "llada2", router="aux"),
    Case(TWO, "denoise", "full", "llada2", router="bias", train=CHECKPOINTING),
]


@pytest.mark.parametrize("case", cases(QUICK, SLOW))
def test_ranks_train_as_one_process(pool: Pool, case: Case) -> None:
    assert_equals_one_process(pool, case)


def model_of(family: str, trained: str) -> Transformer:
    model = tiny_model(family, 1, mask_id=MASK, start_id=1, **BIASES)
    if trained == "lora":
        attach_lora(model, rank=2, alpha=2.0, seed=0, train_embedding=True)
    return add_gated_lora(model, 2, seed=0) if trained == "gated" else model


def check_split(family: str, trained: str) -> None:
    """Split a model: what was trainable still is, no rank has all logits, and gathered parameters are what they were."""
    whole, model = model_of(family, trained), model_of(family, trained)
    split_model(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    assert model.head(torch.randn(3, 32)).shape == (3, 31)
    layouts, size = tensor_layouts(model), dist.get_world_size()
    expected = dict(whole.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(expected)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == expected[name].requires_grad
        gathered = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert torch.equal(layouts.get(name, Layout()).restore(gathered, size), expected[name]), name


@pytest.mark.parametrize(("family", "trained"), [("llama", "gated"), ("qwen2", "lora"), ("llada2", "lora")])
def test_gathered_parameters_have_the_names_and_rows_of_the_whole_model(pool: Pool, family: str, trained: str) -> None:
    pool.run(2, check_split, family, trained)
