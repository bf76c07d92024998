"""Context parallelism."""

from __future__ import annotations

from unmask.errors import ConfigError
from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.world import World


def apply_context(model: Transformer, world: World) -> None:
    """Not there yet."""
    raise ConfigError(f"parallel.context is {world.dims.context}, which is not there yet; use 1")
