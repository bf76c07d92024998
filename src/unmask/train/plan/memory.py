"""Memory of one rank in a training step, of a model that `parallelize` has divided.

Owns what is held when: FSDP's shards and gathered blocks, activations, logits. What a layer keeps is measured (`footprint`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from unmask.diffusion.objectives import PREDICTIONS_AT_ONCE
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Checkpointing
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.footprint import Footprint, layer_footprint
from unmask.train.plan.work import LayerCount, RowWork, layer_count, layer_parameters

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
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.logits


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
    """Parameters of a layer that a rank gathers."""
    parameters = layer_parameters(config, layer)
    dense, experts = parameters.matrices / dims.tensor + parameters.rest, parameters.experts / dims.expert
    return LocalParameters(dense, experts, parameters.router)


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
    """
    layers = _each_layer(config, stage, lambda layer: local_layer(config, layer, dims))
    prints = _each_layer(config, stage, lambda layer: _layer_print(config, layer, dims, recompute))
    ends = local_ends(config, stage, dims)
    shard = sum(layers, start=ends).shard(dims)
    tokens = micro_rows * row.positions / dims.context
    # Between two layers each tensor rank holds a part of the positions.
    stream = _GATHERED * config.hidden_size * tokens / dims.tensor
    kept = [0.0 if recompute is True else each.kept * tokens for each in prints]
    in_flight = min(micro_batches, dims.pipeline - stage.place)
    inputs = stream * (len(layers) + stage.has_head)
    others = (in_flight - 1) * (inputs + sum(kept))
    if dims.pipeline > 1:
        # PyTorch has a buffer for what each micro-batch of a step receives; those in flight are the inputs of a first layer.
        others += stream * (micro_batches * (not stage.has_head) + (micro_batches - in_flight) * (not stage.has_embedding))
    predictions = min(micro_rows * row.predictions / dims.context, PREDICTIONS_AT_ONCE) if stage.has_head else 0
    logits = _LOGITS * predictions * config.vocab_size / dims.tensor
    resident = _resident(layers, ends, dims)
    # The first micro-batch of a step finds no gradients: they come with the layers, the last one's first.
    arrived = _SHARD * shard if micro_batches > 1 else 0.0
    weights, moments_bytes = _SHARD * shard, 2 * _SHARD * shard
    moments = [Memory(weights, arrived, moments_bytes, resident, others + inputs + sum(kept), logits)]
    for number, layer in enumerate(layers):
        # The layer at work, the one being fetched and, on their way to the shards in float32, the gradients of the one before.
        at_work, fetched = layer.gathered, layers[number - 1].gathered if number else 0.0
        leaving = layers[number + 1].gathered if number + 1 < len(layers) else 0.0
        buffers = _SHARD * leaving + (_GATHERED * (at_work + fetched) if dims.pipeline == 1 else 0.0)
        if dims.size == 1:
            # The gradient of a matrix, on its way to float32.
            buffers = _SHARD * at_work / 2
        held = stream * (number + 2) + sum(kept[:number])
        work = prints[number].peak * tokens
        if micro_batches == 1:
            arrived = _SHARD * sum(each.shard(dims) for each in layers[number + 1 :])
        moments.append(Memory(weights, arrived, moments_bytes, resident + buffers, others + held + work, 0.0))
    return max(moments, key=lambda memory: memory.total)


def _each_layer(config: ModelConfig, stage: Stage, of: Callable[[int], T]) -> list[T]:
    """What `of` gives for each layer of a stage; it is asked once for each kind of layer."""
    kinds = {config.is_moe_layer(layer): of(layer) for layer in stage.kinds(config)}
    return [kinds[config.is_moe_layer(layer)] for layer in range(stage.first, stage.last)]


def _resident(layers: Sequence[LocalParameters], ends: LocalParameters, dims: ParallelDims) -> float:
    """Bytes in bfloat16 that stay from layer to layer."""
    # Embedding and head stay gathered, and the head's gradient waits for the embedding's; in a pipeline so do all layers.
    resident = 1.5 * _GATHERED * ends.gathered
    if dims.pipeline > 1:
        resident += 2 * _GATHERED * sum(layer.gathered for layer in layers)
    if dims.size == 1:
        # One process gathers nothing: it computes with a copy of the weights in bfloat16.
        resident += _GATHERED * sum(layer.gathered for layer in layers)
    return resident


def _layer_print(config: ModelConfig, layer: int, dims: ParallelDims, recompute: Checkpointing) -> Footprint:
    return layer_footprint(config, layer, dims.tensor, torch.bfloat16, selective=recompute == "selective")
