"""What the main rank does for all, and the shape of the whole model beside a sharded one."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from unmask.errors import UnmaskError, error_of_user
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import parameter_dtype
from unmask.train.parallel.world import World


def skeleton_of(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy of the model before it is divided, adapters included: in `dtype` and on the meta device."""
    empty: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        data = torch.empty_like(parameter, dtype=parameter_dtype(name, dtype), device="meta")
        empty[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    return deepcopy(model, empty)


def on_main(world: World, action: Callable[[], object]) -> None:
    """Run an action on the main rank; an error there of the user's, the disk or the memory is raised on every rank."""
    error: UnmaskError | None = None
    if world.is_main:
        try:
            action()
        except Exception as caught:
            error = error_of_user(caught)
            if error is None:
                raise
    error = world.gather_all(error)[0]
    if error is not None:
        raise error
