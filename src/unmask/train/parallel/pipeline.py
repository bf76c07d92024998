"""Pipeline parallelism."""

from __future__ import annotations

from unmask.errors import ConfigError
from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.world import World


def apply_pipeline(model: Transformer, world: World) -> None:
    """Not there yet."""
    raise ConfigError(f"parallel.pipeline is {world.dims.pipeline}, which is not there yet; use 1")
