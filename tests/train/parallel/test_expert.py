"""Expert parallelism: the losses, figures and gradients of one process, routers that learn of all ranks' tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from matrix import Case, assert_equals_one_process, cases
from processes import Pool
from tiny import tiny_config, tiny_model
from unmask.models.arch.config import MoEConfig
from unmask.models.arch.moe import MoE
from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.apply import parallelize
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.check import fake_world

EXPERT2 = ParallelDims(data_shard=2, expert=2)
EXPERT4 = ParallelDims(data_shard=4, expert=4)
SHARDED = ParallelDims(data_shard=4, expert=2)
HYBRID = ParallelDims(data_replicate=2, data_shard=2, expert=2)

FEW = MoEConfig(num_experts=2, num_active=1, expert_size=16)

QUICK = [
    Case(EXPERT2, family="llada2", router="bias", train={"activation_checkpointing": "selective"}),
    Case(SHARDED, "cap", family="llada2", router="aux"),
]
SLOW = [
    *(Case(EXPERT2, family="llada2", block_size=size) for size in (1, None)),
    Case(EXPERT4, family="llada2", router="aux"),
    Case(EXPERT4, "preference", family="llada2"),
    Case(EXPERT4, "next_token", family="llada2"),
    Case(HYBRID, "draft", family="llada2", router="frozen"),
    Case(SHARDED, "preference", "lora", family="llada2", router="frozen"),
    Case(SHARDED, "denoise", "lora", family="llada2"),
    Case(SHARDED, family="llada2", model={"moe": FEW}),
    Case(ParallelDims(data_shard=4), family="llada2", model={"moe": FEW}),
    Case(ParallelDims(data_replicate=2, context=2), "cap", family="llada2", model={"moe": replace(FEW, num_experts=3)}),
    Case(EXPERT2, "joint", family="llada2", router="aux", train={"activation_checkpointing": True}),
]


@pytest.mark.parametrize("case", cases(QUICK, SLOW))
def test_ranks_train_as_one_process(pool: Pool, case: Case) -> None:
    assert_equals_one_process(pool, case)


@pytest.mark.parametrize(
    ("num_experts", "size", "dim"),
    [(8, 16, 0), (2, 16, 1), (6, 16, 1), (6, 18, 0)],
    ids=["equally many", "fewer than shards", "not equally many", "no equal parts of the channels"],
)
def test_without_expert_ranks_shards_are_parts_of_experts_where_these_do_not_divide(
    num_experts: int, size: int, dim: int
) -> None:
    moe = replace(FEW, num_experts=num_experts, expert_size=size)
    with torch.device("meta"):
        model = Transformer(tiny_config("llada2", moe=moe))
    with fake_world(ParallelDims(data_shard=8)) as world:
        parallelize(model, world, compute_dtype=torch.bfloat16)
        gate_up = model.blocks[1].mlp.gate_up
    assert isinstance(gate_up, DTensor)
    assert gate_up.placements == (Shard(dim),)
    assert dim == 0 or gate_up.to_local().shape == (num_experts, 2 * size // 8, 32)


def of_all_experts(numbers: list[int], tokens: slice) -> tuple[Tensor, list[Tensor]]:
    """Outputs of a routed layer and gradients of tokens and experts, when every token goes to two of these experts."""
    model = tiny_model("llada2", 0, torch.float64)
    moe = model.blocks[1].mlp
    assert isinstance(moe, MoE)
    moe.expert_bias[numbers] += 9.0
    x_BTD = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:, tokens].requires_grad_()
    return _outputs(moe, x_BTD)


def of_own_experts(numbers: list[int], tokens_of_ranks: list[slice]) -> tuple[Tensor, list[Tensor]]:
    from unmask.train.parallel.expert import apply_expert
    from unmask.train.parallel.ranks import Ranks

    world = Ranks(EXPERT2, "cpu")
    model = tiny_model("llada2", 0, torch.float64)
    apply_expert(model, world)
    moe = model.blocks[1].mlp
    assert isinstance(moe, MoE)
    moe.expert_bias[numbers] += 9.0
    x_BTD = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, gradients = _outputs(moe, x_BTD[:, tokens_of_ranks[world.rank]].requires_grad_())
    return out, [world.full(gradient) for gradient in gradients]


def _outputs(moe: MoE, x_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = moe(x_BTD)
    return out.detach(), list(torch.autograd.grad(out.square().sum(), (x_BTD, moe.gate_up, moe.down)))


@pytest.mark.parametrize("empty", ["no tokens for a rank", "no tokens of a rank"])
def test_ranks_without_tokens_take_part(pool: Pool, empty: str) -> None:
    """Experts 0-3 are on rank 0. All tokens go there, or all come from there."""
    numbers, tokens = (
        ([0, 1], [slice(0, 3), slice(3, 6)]) if empty == "no tokens for a rank" else ([0, 6], [slice(0, 6), slice(0)])
    )
    (first, first_grads), (second, second_grads) = pool.run(2, of_own_experts, numbers, tokens)
    out, (grad_x, grad_gate_up, grad_down) = of_all_experts(numbers, slice(None))
    torch.testing.assert_close(torch.cat((first, second), dim=1), out)
    torch.testing.assert_close(torch.cat((first_grads[0], second_grads[0]), dim=1), grad_x)
    torch.testing.assert_close(first_grads[1], grad_gate_up)
    torch.testing.assert_close(second_grads[2], grad_down)
