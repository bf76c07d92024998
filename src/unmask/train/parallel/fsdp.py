"""Fully sharded data parallelism (FSDP2), and with replicas HSDP.

Owns which parameters are gathered together, and their precision. Shards are float32 (or float64) and *are* the master weights;
they are gathered in the compute dtype, and gradients are summed, never averaged, in the dtype of the shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import parameter_dtype
from unmask.train.parallel.expert import expert_placement
from unmask.train.parallel.pipeline import Stage
from unmask.train.parallel.world import World


def apply_fsdp(model: Transformer, world: World, compute_dtype: torch.dtype, stages: Sequence[Stage] = ()) -> None:
    """Shard the model in place: every block by itself, and the rest, which the head reads after the last block, as one.

    With the stages of a pipeline each of them is such a model. They, and whole copies of a model, stay gathered from the first
    forward pass of a step to the last backward pass.
    """
    mesh = world.mesh["data_replicate", "shard"] if world.dims.data_replicate > 1 else world.mesh["shard"]
    shard_dtype = model.embed.weight.dtype
    # Inputs are in the compute dtype already, but for what must stay wide.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=shard_dtype, cast_forward_inputs=False)
    # Routers compute in float32 whatever the others do; small, they are on every rank.
    wide = {parameter for name, parameter in model.named_parameters() if parameter_dtype(name, compute_dtype) != compute_dtype}
    placement = None if model.config.moe is None else expert_placement(model, world)
    roots: Sequence[Stage | Transformer] = stages or [model]
    modules: list[nn.Module] = [module for root in roots for module in (*root.blocks, root)]
    for module in modules:
        sharded = fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=wide,
            shard_placement_fn=placement,
            reshard_after_forward=False if stages or world.dims.shards == 1 else None,
        )
        sharded.set_gradient_divide_factor(1.0)
        # Other operations than the sum exist on NCCL only.
        sharded.set_force_sum_reduction_for_comms(True)
    if stages:
        for stage in stages:
            stage.relink(model)
    else:
        # Not `head`: ranks call it for different numbers of predictions, and must communicate equally often.
        register_fsdp_forward_method(model, "with_head")
