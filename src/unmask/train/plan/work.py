"""Work of a training step: what the rows of a recipe become, and the parameters and products of a model.

Owns counts of positions, predictions, parameters and floating-point operations (FLOP: a multiplication and an addition are
two). Knows nothing of devices. A document is taken to fill its row: shorter ones need less attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from unmask.diffusion.blocks import Phase
from unmask.diffusion.corrupt import CorruptionConfig
from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Checkpointing
from unmask.train.objectives.denoise import DenoiseSection
from unmask.train.objectives.draft import DraftSection
from unmask.train.objectives.joint import JointSection
from unmask.train.objectives.masking import MaskingSection
from unmask.train.objectives.next_token import NextTokenSection
from unmask.train.objectives.preference import PreferenceSection
from unmask.train.recipe import Recipe


@dataclass(frozen=True)
class RowWork:
    """What a row is in one phase of a run.

    Attributes:
        share: of the run's tokens in this phase.
        length: clean tokens.
        positions: of the stream, noisy copies and clean copy; those that a gradient passes through.
        predictions: positions whose token is predicted.
        pairs: of a query and a key that it may attend to.
        frozen, frozen_pairs: of the clean copy, where it passes through frozen weights alone (gated LoRA): no gradient.
        scored, scored_predictions, scored_pairs: of the stream that a frozen reference reads.
    """

    share: float
    length: int
    positions: int
    predictions: int
    pairs: int
    frozen: int = 0
    frozen_pairs: int = 0
    scored: int = 0
    scored_predictions: int = 0
    scored_pairs: int = 0


@dataclass(frozen=True)
class Trained:
    """What trains: all weights; or adapters of rank `lora` or, where the config has it, gated LoRA.

    `vocabulary`: embedding and head do; `reference`: a frozen copy of the model is held beside it.
    """

    lora: int | None = None
    vocabulary: bool = True
    reference: bool = False

    def adapts(self, config: ModelConfig) -> bool:
        """Whether the layers' own weights are frozen."""
        return self.lora is not None or config.gated_lora_rank is not None


class StageOptions(TypedDict):
    """What memory and work of a stage depend on beside its rows."""

    recompute: Checkpointing
    trained: Trained


def as_trained(recipe: Recipe, config: ModelConfig) -> Recipe:
    """The recipe with the gated LoRA that the model brings, which training continues."""
    if config.gated_lora_rank is None or recipe.train.gated_lora_rank is not None:
        return recipe
    train = recipe.train.model_copy(update={"gated_lora_rank": config.gated_lora_rank})
    return recipe.model_copy(update={"train": train})


def trained_of(recipe: Recipe) -> Trained:
    """What a recipe trains."""
    train = recipe.train
    rank = None if train.lora is None else train.lora.rank
    vocabulary = not train.freeze_embeddings and train.gated_lora_rank is None
    return Trained(rank, vocabulary, recipe.objective.needs_reference and rank is None)


def row_works(recipe: Recipe) -> list[RowWork]:
    """What a row is in each phase of the recipe; where steps of a phase differ, one for each kind of step.

    Raises:
        ConfigError: an objective that plans are not made for.
    """
    return [row for rows in phase_works(recipe) for row in rows]


def phase_works(recipe: Recipe) -> list[list[RowWork]]:
    """`row_works`, phase by phase."""
    phases = recipe.blocks.phases
    total = sum(phase.tokens for phase in phases)
    return [_rows_of(recipe, phase, phase.tokens / total) for phase in phases]


def is_planned(recipe: Recipe) -> bool:
    """Whether plans are made for a recipe's objective."""
    objective = recipe.objective
    if isinstance(objective, DraftSection) and objective.kl > 0:
        return False
    return not isinstance(objective, (JointSection, DenoiseSection, DraftSection)) or objective.align == 0


def mean_row(rows: list[RowWork]) -> RowWork:
    """A row of the whole run: what takes time grows with each count in proportion."""
    total = sum(row.share for row in rows)
    columns = zip(*(list(vars(row).values())[1:] for row in rows), strict=True)
    means = (sum(row.share * count for row, count in zip(rows, column, strict=True)) / total for column in columns)
    return RowWork(total, *(round(mean) for mean in means))


class _Part(NamedTuple):
    """Copies of a row in the stream: their positions, predictions and pairs."""

    positions: int = 0
    predictions: int = 0
    pairs: int = 0


def _rows_of(recipe: Recipe, phase: Phase, share: float) -> list[RowWork]:
    length, objective, block = recipe.data.row_length, recipe.objective, phase.block_size
    causal = _Part(length, length, length * (length + 1) // 2)
    # Every token sees its own block and, on average, half of the others.
    clean = _Part() if block is None else _Part(length, 0, length * (length + block) // 2)

    def row(share: float, *noisy: _Part, clean: _Part = clean, scored: _Part = _Part()) -> RowWork:
        frozen = clean if recipe.train.gated_lora_rank is not None else _Part()
        positions, predictions, pairs = map(sum, zip(*noisy, clean if frozen == _Part() else _Part(), strict=True))
        return RowWork(share, length, positions, predictions, pairs, frozen.positions, frozen.pairs, *scored)

    if not is_planned(recipe):
        raise ConfigError("objective.align, or objective.kl of kind draft, is set; plans are made without them: set them to 0")
    match objective:
        case NextTokenSection():
            return [row(share, clean=causal)]
        case PreferenceSection():
            masked = _masked(length, objective, block, complementary=False)
            return [row(share, masked, scored=_Part(*map(sum, zip(masked, clean, strict=True))))]
        case JointSection():
            drafts = _drafts(length, objective.cuts, block) if "draft" in objective.weights else _Part()
            masked = _masked(length, objective, block, complementary=objective.complementary)
            parts = (drafts, masked if "denoise" in objective.weights else _Part())
            return [row(share, *parts, clean=causal, scored=causal if objective.needs_reference else _Part())]
    masked, noise = _masked(length, objective, block, complementary=objective.complementary), 1.0
    rows = []
    if isinstance(objective, DraftSection):
        noise = objective.denoise_share
        rows.append(row(share * (1 - noise), _drafts(length, objective.cuts, block), clean=causal._replace(predictions=0)))
    return [*rows, *([row(share * noise, masked)] if noise else [])]


def _masked(length: int, masking: MaskingSection, block: int | None, *, complementary: bool) -> _Part:
    """Noisy copies with random masks."""
    copies = CorruptionConfig(0, block, complementary=complementary, mask_samples=masking.mask_samples).num_copies
    rate = 1.0 if block == 1 else 0.5 if complementary else sum(masking.bandwidth) / 2
    pairs = length**2 if block is None else length * (length + block) // 2
    return _Part(copies * length, round(copies * length * rate), copies * pairs)


def _drafts(length: int, cuts: int, block: int | None) -> _Part:
    """Noisy copies of drafts: of each block all tokens but the first."""
    assert block is not None
    drafts = length // block * (block - 1)
    # A draft sees the clean tokens before its block, half of them on average, one in it, and the block's drafts.
    return _Part(cuts * drafts, cuts * drafts, cuts * drafts * (length + block) // 2)


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


def adapter_parameters(config: ModelConfig, layer: int, lora: int | None) -> int:
    """Parameters of a layer's LoRA of this rank; None: of the gated LoRA that the config has, one for each fused matrix."""
    rank, apart = (config.gated_lora_rank or 0, (1, 1)) if lora is None else (lora, (3, 2))
    size, heads, moe = config.hidden_size, config.num_heads * config.head_dim, config.moe
    ffn = moe.expert_size * moe.num_shared if moe is not None and config.is_moe_layer(layer) else config.ffn_size
    attention = apart[0] * size + config.qkv_size + heads + size
    return rank * (attention + (apart[1] * size + 2 * ffn + ffn + size if ffn else 0))


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


def adapter_flops(config: ModelConfig, layers: LayerCount, positions: float, lora: int | None) -> Flops:
    """FLOP of the forward pass of the layers' adapters over so many positions."""
    return Flops(2.0 * positions * sum(adapter_parameters(config, layer, lora) * count for layer, count in layers.items()))


def backward(flops: Flops, *, frozen: bool = False) -> Flops:
    """FLOP of the backward pass of what took `flops`: two products for each, one for frozen matrices; attention also computes
    its scores again."""
    products = 1 if frozen else 2
    return Flops(products * flops.matrices, products * flops.experts, 2.5 * flops.attention)


def model_flops(config: ModelConfig, row: RowWork, rows: int, trained: Trained = Trained()) -> float:
    """FLOP that the rows need on one device, without anything computed twice: what MFU counts."""
    layers = layer_count(config, 0, config.num_layers)
    forward = layer_flops(config, layers, rows * row.positions, rows * row.pairs)
    head = head_flops(config, rows * row.predictions)
    unlearnt = layer_flops(config, layers, rows * (row.frozen + row.scored), rows * (row.frozen_pairs + row.scored_pairs))
    unlearnt += head_flops(config, rows * row.scored_predictions)
    adapters = adapter_flops(config, layers, rows * row.positions, trained.lora)
    learnt = forward * 3 + head * (3 if trained.vocabulary else 2) + adapters * 3
    if trained.adapts(config):
        learnt += Flops(-forward.matrices, -forward.experts)
    return (learnt + unlearnt).total
