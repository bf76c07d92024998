"""Parallelism from outside: what turns a model of one process into that of one rank.

Owns the order in which the dimensions are applied. Each is a module of its own; context parallelism divides the stream instead
of the model (`train.forward`).
"""

from __future__ import annotations

import torch

from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.world import World
from unmask.train.passes import Pipeline


def parallelize(model: Transformer, world: World, *, compute_dtype: torch.dtype) -> Pipeline | None:
    """Divide a model over the ranks, in place.

    Args:
        model: whole, its parameters in the dtype of the master weights: float32, or float64 in tests.
        world: the ranks. With one process nothing happens, nor where each has a whole copy in the compute dtype.
        compute_dtype: of matrix products.

    Returns:
        What runs the model where its layers are on several ranks; else None: it is called as ever.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    dims = world.dims
    dims.check_model(model.config)
    # Whole copies that compute in the dtype of their masters: nothing is gathered, and `World.sum_gradients` sums.
    whole = dims.data_replicate == world.size and compute_dtype == model.embed.weight.dtype
    if world.size == 1 or whole:
        return None
    # Imported here: a run of one process needs none of it.
    from unmask.train.parallel.expert import apply_expert
    from unmask.train.parallel.fsdp import apply_fsdp
    from unmask.train.parallel.pipeline import TorchPipeline, split_stages
    from unmask.train.parallel.tensor import apply_tensor

    if dims.tensor > 1:
        apply_tensor(model, world)
    if dims.expert > 1:
        apply_expert(model, world)
    stages = split_stages(model, world) if dims.pipeline > 1 else []
    apply_fsdp(model, world, compute_dtype, stages)
    return TorchPipeline(model, stages, world, compute_dtype) if stages else None
