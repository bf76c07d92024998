"""Expert parallelism."""

from __future__ import annotations

from unmask.errors import ConfigError
from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.world import World


def apply_expert(model: Transformer, world: World) -> None:
    """Not there yet."""
    raise ConfigError(f"parallel.expert is {world.dims.expert}, which is not there yet; use 1")
