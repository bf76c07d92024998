"""Tensor parallelism."""

from __future__ import annotations

from unmask.errors import ConfigError
from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.world import World


def apply_tensor(model: Transformer, world: World) -> None:
    """Not there yet."""
    raise ConfigError(f"parallel.tensor is {world.dims.tensor}, which is not there yet; use 1")
