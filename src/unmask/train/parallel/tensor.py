"""Tensor parallelism: each rank computes with its share of every layer's heads, features and vocabulary.

Owns splitting a model in place, and the collectives around its layers. Which part a rank holds is `layouts`' matter.

Parameters become DTensors over the tensor ranks. Hooks put their local parts in their place for the time of a call, so that
activations are plain tensors throughout. Between blocks a rank holds its share of the positions ("sequence parallel": norms are
not computed twice); a layer gathers them and scatters its sums. Routed experts see all positions on every rank, so that routers
decide, and count, as they do in one process.

Legend: B rows, T stream positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from unmask.models.arch.attention import Attention
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.moe import MoE
from unmask.models.arch.transformer import Block, Transformer
from unmask.models.weights.adapter import LoraLinear
from unmask.train.parallel.layouts import Layout, tensor_layouts
from unmask.train.parallel.vocabulary import VocabularyShard
from unmask.train.parallel.world import World

WHOLE, SUMMED, POSITIONS = Replicate(), Partial(), Shard(1)
"""Of activations: all ranks have the same; each has a part of the sum; each has its share of the positions."""


def apply_tensor(model: Transformer, world: World) -> None:
    """Split a model over the tensor ranks, in place; each begins with all of it, be it on the meta device."""
    split_model(model, world.mesh["tensor"])


def split_model(model: Transformer, mesh: DeviceMesh) -> None:
    """Split a model over a mesh of one dimension, in place; `ParallelDims.check_model` says which can be."""
    size = mesh.size()
    layouts = tensor_layouts(model)
    for name, layout in layouts.items():
        owner, _, own = name.rpartition(".")
        parameters = model.get_submodule(owner)._parameters
        whole = parameters[own]
        assert whole is not None
        placement = WHOLE if layout.dim is None else Shard(layout.dim)
        part = DTensor.from_local(layout.part(whole, mesh.get_local_rank(), size), mesh, (placement,), run_check=False)
        parameters[own] = nn.Parameter(part, requires_grad=whole.requires_grad)
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.num_heads, module.num_kv_heads = module.num_heads // size, module.num_kv_heads // size
        elif isinstance(module, LoraLinear) and layouts[f"{name}.weight"].dim == 0:
            module.parts = tuple((rows // size, lora) for rows, lora in module.parts)
    _attach(model, mesh, layouts)


def local_length(length: int, world: World) -> int:
    """How many positions of a stream of `length` this rank holds between two blocks."""
    return Shard.local_shard_size_and_offset(length, world.dims.tensor, world.index("tensor"))[0]


def vocabulary_shard(config: ModelConfig, mesh: DeviceMesh) -> VocabularyShard:
    """The rank's share of the vocabulary: of the rows of embedding and head, and of the logits."""
    ((start, stop),) = Layout(0, (config.vocab_size,)).spans(mesh.get_local_rank(), mesh.size())
    return VocabularyShard(mesh.get_group(), start, stop)


def local_part(parameter: Tensor, layout: Layout) -> Tensor:
    """What a rank computes with: its part of a parameter. A gradient that is only its part of the sum is summed over ranks."""
    assert isinstance(parameter, DTensor)
    if not layout.partial:
        return parameter.to_local()
    local = parameter.redistribute(placements=(WHOLE,)).to_local(grad_placements=(SUMMED,))
    return local * float(parameter.device_mesh.get_local_rank() == 0) if layout.once else local


class _LocalParts:
    """A module's parameters as a rank computes with them, for the time of a call."""

    def __init__(self, module: nn.Module, layouts: Mapping[str, Layout]) -> None:
        """Take the parameters, with their layouts by name in `module`; register the hooks."""
        self._places: list[tuple[dict[str, nn.Parameter | None], str, Layout]] = []
        for name, _ in module.named_parameters():
            owner, _, own = name.rpartition(".")
            if name in layouts:
                self._places.append((module.get_submodule(owner)._parameters, own, layouts[name]))
        self._parameters: list[nn.Parameter | None] = []
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._parameters = [parameters[own] for parameters, own, _ in self._places]
        for (parameters, own, layout), parameter in zip(self._places, self._parameters, strict=True):
            assert parameter is not None
            parameters[own] = local_part(parameter, layout)  # type: ignore[assignment]

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        for (parameters, own, _), parameter in zip(self._places, self._parameters, strict=False):
            parameters[own] = parameter
        self._parameters = []


@dataclass(eq=False)
class _Activations:
    """Layouts of activations [B, T, D] over the tensor ranks; `length` is T of the block that runs."""

    mesh: DeviceMesh
    length: int = 0

    def move(self, x: Tensor, source: Placement, target: Placement, gradient: Placement | None = None) -> Tensor:
        """The activation `x`, laid out as `source`, as `target`; `gradient`: how its gradient will come, if otherwise."""
        shape = x.shape if source != POSITIONS else torch.Size((x.shape[0], self.length, *x.shape[2:]))
        stride = torch.empty(shape, device="meta").stride()
        laid_out = DTensor.from_local(x, self.mesh, (source,), run_check=False, shape=shape, stride=stride)
        return laid_out.redistribute(placements=(target,)).to_local(grad_placements=(gradient or target,))

    def before(self, module: nn.Module, source: Placement, target: Placement, gradient: Placement | None = None) -> None:
        """Move the first argument of a module's calls."""
        module.register_forward_pre_hook(lambda _, args: (self.move(args[0], source, target, gradient), *args[1:]))

    def behind(self, module: nn.Module, source: Placement, target: Placement, gradient: Placement | None = None) -> None:
        """Move what a module returns."""
        module.register_forward_hook(lambda _, args, out: self.move(out, source, target, gradient))

    def record_length(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        """Note T before a block runs: the length of the cosines that it is given."""
        self.length = args[1].shape[2]


def _attach(model: Transformer, mesh: DeviceMesh, layouts: Mapping[str, Layout]) -> None:
    """Register what turns local products into those of all ranks."""
    activations = _Activations(mesh)
    model.embed.forward = partial(_embed, model, activations, layouts["embed.weight"])  # type: ignore[method-assign]
    model.head = partial(_head, model, layouts["embed.weight"])  # type: ignore[method-assign]
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        block.register_forward_pre_hook(activations.record_length)
        if number == 0:
            activations.before(block, WHOLE, POSITIONS)
        _LocalParts(block, _below(f"blocks.{number}.", layouts))
        _attach_layers(block, activations)
    _LocalParts(model.norm, _below("norm.", layouts))
    activations.behind(model.norm, POSITIONS, WHOLE, SUMMED)
    # FSDP warns of a module that returns a view.
    model.norm.register_forward_hook(lambda _, args, out: out.clone())


def _attach_layers(block: Block, activations: _Activations) -> None:
    """Gather the positions before the layers of a block, and scatter the sums behind them."""
    activations.behind(block.attention_norm, POSITIONS, WHOLE, SUMMED)
    activations.behind(block.attention.out, SUMMED, POSITIONS)
    if not isinstance(block.mlp, MoE):
        activations.behind(block.mlp_norm, POSITIONS, WHOLE, SUMMED)
        activations.behind(block.mlp, SUMMED, POSITIONS)
        return
    activations.behind(block.mlp_norm, POSITIONS, WHOLE)
    activations.behind(block.mlp, WHOLE, POSITIONS)
    if block.mlp.shared is not None:
        activations.before(block.mlp.shared, WHOLE, WHOLE, SUMMED)
        activations.behind(block.mlp.shared, SUMMED, WHOLE)


def _below(prefix: str, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    return {name.removeprefix(prefix): layout for name, layout in layouts.items() if name.startswith(prefix)}


def _embed(model: Transformer, activations: _Activations, layout: Layout, tokens_BT: Tensor) -> Tensor:
    """Embeddings [B, T, D] of tokens, each from the rank that has its row."""
    own_BT, row_BT = vocabulary_shard(model.config, activations.mesh).own(tokens_BT)
    rows_BTD = F.embedding(row_BT, local_part(model.embed.weight, layout))
    return activations.move(rows_BTD.masked_fill(~own_BT[..., None], 0.0), SUMMED, WHOLE)


def _head(model: Transformer, layout: Layout, hidden: Tensor) -> Tensor:
    """The logits of the rank's share of the vocabulary."""
    return F.linear(hidden, local_part(model.head_weight, layout))
