"""Work of a training step: what the rows of a recipe become, and the parameters and products of a model.

Owns counts of positions, predictions, parameters and floating-point operations (FLOP: a multiplication and an addition are
two). Knows nothing of devices. A document is taken to fill its row: shorter ones need less attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unmask.diffusion.blocks import Phase
from unmask.diffusion.corrupt import CorruptionConfig
from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.train.objectives.denoise import DenoiseSection
from unmask.train.recipe import Recipe


@dataclass(frozen=True)
class RowWork:
    """What a row is in one phase of a run.

    Attributes:
        share: of the run's tokens in this phase.
        length: clean tokens.
        positions: of the stream, noisy copies and clean copy.
        predictions: positions whose token is predicted.
        pairs: of a query and a key that it may attend to.
    """

    share: float
    length: int
    positions: int
    predictions: int
    pairs: int


def row_works(recipe: Recipe) -> list[RowWork]:
    """What a row is in each phase of the recipe.

    Raises:
        ConfigError: an objective that plans are not made for.
    """
    phases = recipe.blocks.phases
    total = sum(phase.tokens for phase in phases)
    return [_row_work(recipe, phase, phase.tokens / total) for phase in phases]


def is_planned(recipe: Recipe) -> bool:
    """Whether plans are made for a recipe's objective, and all weights train."""
    full = recipe.train.lora is None and recipe.train.gated_lora_rank is None
    return full and recipe.objective.kind in ("denoise", "next_token")


def mean_row(rows: list[RowWork]) -> RowWork:
    """A row of the whole run: what takes time grows with each count in proportion."""
    counts = (
        round(sum(row.share * count for row, count in zip(rows, column, strict=True)))
        for column in zip(*((row.length, row.positions, row.predictions, row.pairs) for row in rows), strict=True)
    )
    return RowWork(1.0, *counts)


def _row_work(recipe: Recipe, phase: Phase, share: float) -> RowWork:
    length, objective = recipe.data.row_length, recipe.objective
    if objective.kind == "next_token":
        return RowWork(share, length, length, length, length * (length + 1) // 2)
    if not isinstance(objective, DenoiseSection):
        raise ConfigError(
            f"objective.kind is {objective.kind}; plans are made for denoise and next_token: plan with one of them"
        )
    block = phase.block_size
    masks = CorruptionConfig(0, block, complementary=objective.complementary, mask_samples=objective.mask_samples)
    copies = masks.num_copies
    rate = 1.0 if block == 1 else 0.5 if objective.complementary else sum(objective.bandwidth) / 2
    predictions = round(copies * length * rate)
    if block is None:
        return RowWork(share, length, copies * length, predictions, copies * length**2)
    before, own = length * (length - block) // 2, length * block
    return RowWork(share, length, (copies + 1) * length, predictions, (copies + 1) * (before + own))


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of a layer: those that tensor parallelism divides, routed experts, router, and the rest (norms, biases)."""

    matrices: int
    experts: int
    router: int
    rest: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.experts + self.router + self.rest


LayerCount = Mapping[int, int]
"""How many layers there are of each kind, named by one of them: all dense layers are alike, and all routed ones."""


def layer_count(config: ModelConfig, first: int, last: int) -> LayerCount:
    """The kinds of the layers `first` to `last - 1`."""
    dense = 0 if config.moe is None else min(max(config.moe.num_dense_layers - first, 0), last - first)
    dense = last - first if config.moe is None else dense
    return {layer: count for layer, count in ((first, dense), (last - 1, last - first - dense)) if count}


def layer_parameters(config: ModelConfig, layer: int) -> LayerParameters:
    """Parameters of layer `layer` (from 0)."""
    size, moe = config.hidden_size, config.moe
    matrices = size * config.qkv_size + config.num_heads * config.head_dim * size
    rest = 2 * size + (2 * config.head_dim if config.qk_norm else 0) + (config.qkv_size if config.qkv_bias else 0)
    rest += size if config.out_bias else 0
    if moe is None or not config.is_moe_layer(layer):
        biases = 2 * config.ffn_size + size if config.mlp_bias else 0
        return LayerParameters(matrices + 3 * size * config.ffn_size, 0, 0, rest + biases)
    shared = 3 * size * moe.expert_size * moe.num_shared
    experts = 3 * size * moe.expert_size * moe.num_experts
    return LayerParameters(matrices + shared, experts, size * moe.num_experts, rest)


def end_parameters(config: ModelConfig) -> int:
    """Parameters of embedding and head, a tied one counted once."""
    return config.vocab_size * config.hidden_size * (1 if config.tied_head else 2)


def num_parameters(config: ModelConfig) -> int:
    """All parameters of a model."""
    kinds = layer_count(config, 0, config.num_layers)
    layers = sum(layer_parameters(config, layer).total * count for layer, count in kinds.items())
    return layers + end_parameters(config) + config.hidden_size


@dataclass(frozen=True)
class Flops:
    """FLOP by the kind of product, whose efficiencies differ."""

    matrices: float = 0.0
    experts: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.matrices + self.experts + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.matrices + other.matrices, self.experts + other.experts, self.attention + other.attention)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.matrices * factor, self.experts * factor, self.attention * factor)


def layer_flops(config: ModelConfig, layers: LayerCount, positions: float, pairs: float) -> Flops:
    """FLOP of the forward pass of layers over so many positions and visible pairs."""
    total, moe = Flops(), config.moe
    for layer, count in layers.items():
        parameters = layer_parameters(config, layer)
        active = 0.0 if moe is None else parameters.experts * moe.num_active / moe.num_experts
        attention = 4.0 * config.num_heads * config.head_dim * pairs
        total += Flops(2 * (parameters.matrices + parameters.router) * positions, 2 * active * positions, attention) * count
    return total


def head_flops(config: ModelConfig, predictions: float) -> Flops:
    """FLOP of the logits of so many predictions."""
    return Flops(matrices=2.0 * config.vocab_size * config.hidden_size * predictions)


def backward(flops: Flops) -> Flops:
    """FLOP of the backward pass of what took `flops`: two products for each; attention also computes its scores again."""
    return Flops(2 * flops.matrices, 2 * flops.experts, 2.5 * flops.attention)


def model_flops(config: ModelConfig, row: RowWork, rows: int) -> float:
    """FLOP that the rows need on one device, without anything computed twice: what MFU counts."""
    layers = layer_count(config, 0, config.num_layers)
    forward = layer_flops(config, layers, rows * row.positions, rows * row.pairs)
    return 3 * (forward + head_flops(config, rows * row.predictions)).total
