"""Memory of one rank in a training step, of a model that `parallelize` has divided.

Owns what is held when: FSDP's shards and gathered blocks, activations, logits. What a layer keeps is measured (`footprint`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from unmask.diffusion.objectives import PREDICTIONS_AT_ONCE
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Checkpointing
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.footprint import Footprint, layer_footprint
from unmask.train.plan.work import LayerCount, RowWork, Trained, adapter_parameters, layer_count, layer_parameters

T = TypeVar("T")

_SHARD, _GATHERED = 4, 2
"""Bytes of a float32 weight of a shard (moments and gradients are float32, too) and of a gathered one in bfloat16."""
_LOGITS = 6
"""Bytes for each logit: itself or its gradient in bfloat16, and log p in float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds at the moment of its peak.

    Attributes:
        weights, gradients, optimizer: shards, float32; gradients as far as they are there.
        gathered: blocks in bfloat16 that are being used or fetched, and their gradients on the way to the shards; with one
            process all blocks.
        activations: kept for the backward pass, and the workspace of one layer.
        logits: logits and what the loss makes of them.
        reference: weights of a frozen copy, shards and what stays gathered.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float
    reference: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return math.fsum(vars(self).values())


@dataclass(frozen=True)
class Stage:
    """Layers of one pipeline rank, `first` to `last - 1`, of all of them; `place` is that of the rank in the pipeline."""

    first: int
    last: int
    num_layers: int
    place: int

    def kinds(self, config: ModelConfig) -> LayerCount:
        """How many there are of each kind."""
        return layer_count(config, self.first, self.last)

    @property
    def has_embedding(self) -> bool:
        """Whether the embedding is here."""
        return self.first == 0

    @property
    def has_head(self) -> bool:
        """Whether norm and head are here."""
        return self.last == self.num_layers


def stages(config: ModelConfig, dims: ParallelDims) -> list[Stage]:
    """The layers of each pipeline rank, which has one stage."""
    every = enumerate(dims.stage_layers(config.num_layers))
    return [Stage(layers.start, layers.stop, config.num_layers, place) for place, layers in every]


@dataclass(frozen=True)
class LocalParameters:
    """Parameters that a rank works with, before FSDP divides them: over all shards, experts over fewer, routers not at all."""

    dense: float
    experts: float = 0.0
    routers: float = 0.0

    @property
    def gathered(self) -> float:
        """Those that FSDP gathers."""
        return self.dense + self.experts

    def shard(self, dims: ParallelDims) -> float:
        """Those that a rank holds."""
        return self.dense / dims.shards + self.experts / (dims.shards // dims.expert) + self.routers

    def __add__(self, other: LocalParameters) -> LocalParameters:
        return LocalParameters(self.dense + other.dense, self.experts + other.experts, self.routers + other.routers)

    def __mul__(self, number: int) -> LocalParameters:
        return LocalParameters(self.dense * number, self.experts * number, self.routers * number)


def local_layer(config: ModelConfig, layer: int, dims: ParallelDims) -> LocalParameters:
    """Parameters of a layer that a rank gathers, without adapters."""
    parameters = layer_parameters(config, layer)
    dense, experts = parameters.matrices / dims.tensor + parameters.rest, parameters.experts / dims.expert
    return LocalParameters(dense, experts, parameters.router)


def learnt_layer(config: ModelConfig, layer: int, dims: ParallelDims, trained: Trained) -> LocalParameters:
    """Parameters of a layer that train; of adapters tensor ranks are taken to hold all, and hold more than half."""
    if trained.adapts(config):
        return LocalParameters(adapter_parameters(config, layer, trained.lora))
    return local_layer(config, layer, dims)


def local_ends(config: ModelConfig, stage: Stage, dims: ParallelDims) -> LocalParameters:
    """Parameters of embedding, last norm and head that a rank of the stage gathers."""
    matrix = config.vocab_size * config.hidden_size / dims.tensor
    tied = config.tied_head and stage.has_embedding
    dense = matrix * stage.has_embedding + (config.hidden_size + (0 if tied else matrix)) * stage.has_head
    return LocalParameters(dense)


def stage_memory(
    config: ModelConfig,
    row: RowWork,
    dims: ParallelDims,
    stage: Stage,
    *,
    micro_rows: int,
    micro_batches: int,
    recompute: Checkpointing,
    trained: Trained = Trained(),
) -> Memory:
    """Memory of a rank of one pipeline stage.

    Args:
        config: the model.
        row: what a row is.
        dims: the layout.
        stage: its layers.
        micro_rows: rows in a micro-batch.
        micro_batches: of a step.
        recompute: activation checkpointing. With True each layer keeps its input only, and runs again in the backward pass.
        trained: what trains.
    """
    held = _held(config, dims, stage, trained)
    prints = _each_layer(config, stage, lambda layer: _layer_print(config, layer, dims, recompute, trained))
    tokens, frozen = (micro_rows * count / dims.context for count in (row.positions, row.frozen))
    # Between two layers each tensor rank holds a part of the positions; between two stages both copies travel.
    stream = _GATHERED * config.hidden_size * (tokens + frozen * (dims.pipeline > 1)) / dims.tensor
    # Of what passes without a gradient, keys and values.
    kv = _GATHERED * 2 * config.num_kv_heads * config.head_dim * frozen / dims.tensor
    kept = [kv + (0.0 if recompute is True else each.kept * tokens) for each in prints]
    in_flight = _in_flight(dims, stage, micro_batches)
    inputs = stream * (len(prints) + stage.has_head)
    others = (in_flight - 1) * (inputs + sum(kept))
    if not stage.has_embedding:
        others += min(micro_batches, stage.place + 1) * sum(each.delayed for each in prints) * tokens
    if dims.pipeline > 1:
        # PyTorch has a buffer for what each micro-batch of a step receives; those in flight are the inputs of a first layer.
        others += stream * (micro_batches * (not stage.has_head) + (micro_batches - in_flight) * (not stage.has_embedding))
    predictions = min(micro_rows * row.predictions / dims.context, PREDICTIONS_AT_ONCE) if stage.has_head else 0
    logits = _LOGITS * predictions * config.vocab_size / dims.tensor
    # The first micro-batch of a step finds no gradients: they come with the layers, the last one's first.
    arrived = held.gradients if micro_batches > 1 else 0.0
    moments = [(arrived, held.resident, others + inputs + sum(kept), logits)]
    for number, each in enumerate(prints):
        if micro_batches == 1:
            arrived = _SHARD * sum(layer.shard(dims) for layer in held.learnt[number + 1 :])
        activations = others + stream * (number + 2) + sum(kept[:number]) + each.peak * tokens + 2 * kv
        moments.append((arrived, held.resident + held.buffers(number, dims), activations, 0.0))
    every = (Memory(held.weights, moment[0], 2 * held.gradients, *moment[1:], held.reference) for moment in moments)
    return max(every, key=lambda memory: memory.total)


@dataclass(frozen=True)
class _Held:
    """Weights of a stage: each layer's, all and those that train; bytes of shards, of gradients and of what stays gathered."""

    layers: list[LocalParameters]
    learnt: list[LocalParameters]
    weights: float
    gradients: float
    resident: float
    reference: float

    def buffers(self, number: int, dims: ParallelDims) -> float:
        """Bytes of weights and gradients on their way while layer `number` is at work in the backward pass."""
        if dims.size == 1:
            # The gradient of a matrix, on its way to float32.
            return _SHARD * self.learnt[number].gathered / 2
        # On their way to the shards in float32, the gradients of the layer before; one layer is at work, one being fetched.
        leaving = self.learnt[number + 1].gathered if number + 1 < len(self.learnt) else 0.0
        if _stays_gathered(dims):
            return _SHARD * leaving
        fetched = self.layers[number - 1].gathered if number else 0.0
        return _SHARD * leaving + _GATHERED * (self.layers[number].gathered + fetched)


def _held(config: ModelConfig, dims: ParallelDims, stage: Stage, trained: Trained) -> _Held:
    plain = _each_layer(config, stage, lambda layer: local_layer(config, layer, dims))
    learnt = _each_layer(config, stage, lambda layer: learnt_layer(config, layer, dims, trained))
    layers = [each + own for each, own in zip(plain, learnt, strict=True)] if trained.adapts(config) else plain
    ends = local_ends(config, stage, dims)
    learnt_ends = ends * trained.vocabulary
    gradients = _SHARD * sum(learnt, start=learnt_ends).shard(dims)
    # Embedding and head stay gathered, and the head's gradient waits for the embedding's.
    resident = _GATHERED * (ends.gathered + learnt_ends.gathered / 2)
    # One process gathers nothing: it computes with a copy of the weights in bfloat16.
    copies = _GATHERED * sum(layer.gathered for layer in layers) * _stays_gathered(dims)
    if dims.pipeline > 1:
        resident += _GATHERED * sum(layer.gathered for layer in learnt)
    weights = gradients if dims.size == 1 else _SHARD * sum(layers, start=ends).shard(dims)
    reference = 0.0
    if trained.reference:
        whole = sum(plain, start=ends)
        reference = _GATHERED * (whole if _stays_gathered(dims) else ends).gathered
        reference += 0.0 if dims.size == 1 else _SHARD * whole.shard(dims)
    return _Held(layers, learnt, weights, gradients, resident + copies, reference)


def _stays_gathered(dims: ParallelDims) -> bool:
    """Whether a rank has whole layers in bfloat16 all through a step."""
    return dims.pipeline > 1 or dims.shards == 1


def _in_flight(dims: ParallelDims, stage: Stage, micro_batches: int) -> int:
    """Micro-batches of which a rank holds activations at once."""
    return min(micro_batches, dims.pipeline - (0 if _splits(dims) else stage.place))


def _splits(dims: ParallelDims) -> bool:
    """Whether gradients of weights are computed later than those of inputs, by as many micro-batches as ranks come before."""
    return dims.pipeline > 1 and dims.pipeline_schedule == "zero_bubble"


def _each_layer(config: ModelConfig, stage: Stage, of: Callable[[int], T]) -> list[T]:
    """What `of` gives for each layer of a stage; it is asked once for each kind of layer."""
    kinds = {config.is_moe_layer(layer): of(layer) for layer in stage.kinds(config)}
    return [kinds[config.is_moe_layer(layer)] for layer in range(stage.first, stage.last)]


def _layer_print(config: ModelConfig, layer: int, dims: ParallelDims, recompute: Checkpointing, trained: Trained) -> Footprint:
    options = {"selective": recompute == "selective", "split": _splits(dims)}
    return layer_footprint(config, layer, dims.tensor, torch.bfloat16, lora=trained.lora, **options)
