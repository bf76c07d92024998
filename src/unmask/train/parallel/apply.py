"""Parallelism from outside: what turns a model of one process into that of one rank.

Owns the order in which the dimensions are applied. Each is a module of its own; context parallelism divides the stream instead
of the model (`train.forward`).
"""

from __future__ import annotations

import torch

from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.world import World


def parallelize(model: Transformer, world: World, *, compute_dtype: torch.dtype) -> Transformer:
    """Divide a model over the ranks, in place.

    Args:
        model: whole, its parameters in the dtype of the master weights: float32, or float64 in tests.
        world: the ranks. With one process nothing happens.
        compute_dtype: of matrix products.

    Returns:
        `model`.

    Raises:
        ConfigError: the model cannot be divided so.
    """
    dims = world.dims
    dims.check_model(model.config)
    if world.size == 1:
        return model
    # Imported here: a run of one process needs none of it.
    from unmask.train.parallel.expert import apply_expert
    from unmask.train.parallel.fsdp import apply_fsdp
    from unmask.train.parallel.pipeline import apply_pipeline
    from unmask.train.parallel.tensor import apply_tensor

    if dims.tensor > 1:
        apply_tensor(model, world)
    if dims.expert > 1:
        apply_expert(model, world)
    if dims.pipeline > 1:
        apply_pipeline(model, world)
    apply_fsdp(model, world, compute_dtype)
    return model
