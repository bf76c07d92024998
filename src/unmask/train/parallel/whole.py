"""The whole model of a sharded one, gathered on the main rank to be saved."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from unmask.errors import UnmaskError
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import parameter_dtype
from unmask.train.parallel.layouts import Layout, tensor_layouts
from unmask.train.parallel.world import World


def skeleton_of(model: Transformer, dtype: torch.dtype) -> Transformer:
    """A copy of the model before it is divided, adapters included: in `dtype` and on the meta device."""
    empty: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        data = torch.empty_like(parameter, dtype=parameter_dtype(name, dtype), device="meta")
        empty[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    return deepcopy(model, empty)


def fill(skeleton: Transformer, model: Transformer, world: World) -> None:
    """Gather the parameters of a sharded model in its skeleton, on the main rank's CPU; all ranks take part."""
    state, dtypes = {}, {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
    layouts = tensor_layouts(skeleton)
    for name, tensor in model.state_dict().items():
        full = layouts.get(name, Layout()).restore(world.full(tensor.detach()), world.dims.tensor)
        if world.is_main:
            state[name] = full.to("cpu", dtypes[name])
    if world.is_main:
        skeleton.load_state_dict(state, strict=True, assign=True)


def on_main(world: World, action: Callable[[], None]) -> None:
    """Run an action on the main rank; an error of the user's there is raised on every rank."""
    error: UnmaskError | None = None
    if world.is_main:
        try:
            action()
        except UnmaskError as caught:
            error = caught
    error = world.gather_all(error)[0]
    if error is not None:
        raise error
