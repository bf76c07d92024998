"""Objectives as the loop sees them: micro-batches that give sums and counts, and the setting they run in.

Owns the interface between objectives and loop. Knows nothing of optimisers, checkpoints or the order of data.

An objective never divides by a batch. Each term of its loss, and each figure, is a sum and a count per micro-batch; the loop
adds them up and divides by the counts of the *global* batch (`loop.accumulate`). So neither loss nor gradient depends on how a
batch is split, over micro-batches or over devices. The counts of the loss are needed before the first
backward pass: gradients are then right as they accumulate, together with those of router losses, which are normalised already,
and are never scaled afterwards.

Legend: N predictions, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.diffusion.corrupt import Stream, embedding_noise
from unmask.diffusion.objectives import TokenScores, nelbo, token_nll, token_scores
from unmask.models.arch.transformer import Transformer
from unmask.train.forward import AttentionBackend, predicted_hidden, stage_hidden, stage_lengths
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.world import World
from unmask.train.passes import Pass, Pipeline, StageLayers
from unmask.train.router import RouterMonitor
from unmask.train.sections import DataSection, Section, TrainSection

if TYPE_CHECKING:
    from unmask.train.parallel.context import ContextShard
    from unmask.train.parallel.vocabulary import VocabularyShard


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LossTerm:
    """A micro-batch's part of one term of the loss: a differentiable scalar (nats), and what it counts in the denominator."""

    sum: Tensor
    count: float


@dataclass(frozen=True)
class Figure:
    """A part of a mean to log: numerator and denominator."""

    sum: float
    count: float


@dataclass(frozen=True, eq=False)
class Output:
    """What the forward pass of a micro-batch gives: the terms of the loss, whose means add up to it, and figures to log."""

    terms: tuple[LossTerm, ...]
    figures: Mapping[str, Figure] = field(default_factory=dict)


def weighted_output(weights: Mapping[str, float], sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> Output:
    """The terms of a loss that is a weighted sum of means, and each unweighted mean as a figure; all by the terms' names."""
    terms = tuple(LossTerm(weight * sums[name], counts[name]) for name, weight in weights.items())
    return Output(terms, {name: Figure(float(sums[name].detach()), counts[name]) for name in weights})


class MicroBatch(ABC):
    """Rows prepared for one forward pass."""

    @abstractmethod
    def counts(self) -> tuple[float, ...]:
        """The count of each term that `forward` will give, without its gradient."""

    @abstractmethod
    def forward(self) -> Output:
        """Run the model, with gradient."""


@dataclass(frozen=True, eq=False)
class ReferencePolicy:
    """The model that an objective compares with: a frozen copy, or (inside `context`) one without its adapter."""

    model: Transformer
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    pipeline: Pipeline | None = None


@dataclass(frozen=True, eq=False)
class Setting:
    """What objectives work with.

    `router`: None for a dense model; `mask_id`: None for one that stays autoregressive; `world`: the ranks that share the rows;
    `pipeline`: None where this rank has all layers.
    """

    model: Transformer
    train: TrainSection
    backend: AttentionBackend
    router: RouterMonitor | None = None
    mask_id: int | None = None
    reference: ReferencePolicy | None = None
    world: World = field(default_factory=World.single)
    pipeline: Pipeline | None = None

    def share(self, batch_rows: int) -> slice:
        """Which rows of a global batch this rank trains on; every data rank has equally many."""
        count, rest = divmod(batch_rows, self.world.dims.data)
        assert not rest, f"{batch_rows} rows for {self.world.dims.data} data ranks"
        first = self.world.index("data") * count
        return slice(first, first + count)

    def micro_batches(self, rows: PackedRows) -> Iterator[PackedRows]:
        """The rows in parts of `train.micro_rows`, on the model's device."""
        size = self.train.micro_rows
        for start in range(0, rows.num_rows, size):
            yield rows.rows(start, start + size).to(self.model.inv_freq.device)

    def nll(self, stream: Stream, noise_norm: float = 0.0, hidden_ND: Tensor | None = None) -> Tensor:
        """Negative log-likelihood [N] (float32, nats) of the targets.

        Args:
            stream: the input and its targets.
            noise_norm: norm of the noise on masked embeddings.
            hidden_ND: the hidden states of the predictions, where the model has run already.
        """
        if hidden_ND is None and self.pipeline is not None:
            (nll_N,) = self.pipeline.score(self.stages(stream, noise_norm, lambda found: (self.nll(stream, hidden_ND=found),)))
            return nll_N
        hidden_ND = self.hidden(stream, noise_norm) if hidden_ND is None else hidden_ND
        target_N, mask_id, vocabulary = stream.target_N, self.mask_id, self._vocabulary

        def score(head: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> Tensor:
            if vocabulary is None:
                return token_nll(head, hidden_ND, target_N, mask_id)
            from unmask.train.parallel.vocabulary import parallel_nll

            return parallel_nll(head, hidden_ND, target_N, mask_id, vocabulary)

        return self.model.with_head(score, hidden_ND)

    def scores(
        self, stream: Stream, noise_norm: float = 0.0, hidden_ND: Tensor | None = None, *, temperature: float = 1.0
    ) -> TokenScores:
        """Scores of the predictions: likelihood, entropy at `temperature`, confidence; other arguments as of `nll`."""
        if hidden_ND is None and self.pipeline is not None:

            def finish(hidden_ND: Tensor) -> tuple[Tensor, ...]:
                return self.scores(stream, hidden_ND=hidden_ND, temperature=temperature)

            return TokenScores(*self.pipeline.score(self.stages(stream, noise_norm, finish)))
        hidden_ND = self.hidden(stream, noise_norm) if hidden_ND is None else hidden_ND
        target_N, mask_id, vocabulary = stream.target_N, self.mask_id, self._vocabulary

        def score(head: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> TokenScores:
            if vocabulary is None:
                return token_scores(head, hidden_ND, target_N, mask_id, temperature=temperature)
            from unmask.train.parallel.vocabulary import parallel_scores

            return parallel_scores(head, hidden_ND, target_N, mask_id, vocabulary, temperature=temperature)

        return self.model.with_head(score, hidden_ND)

    def hidden(self, stream: Stream, noise_norm: float = 0.0) -> Tensor:
        """Hidden states [N, D] of the predictions, where this rank has all layers."""
        noise_BTD = self.embedding_noise(stream, noise_norm)
        return predicted_hidden(self.model, stream, self.backend, noise_BTD, self.counting_router, self.context)

    def stages(self, stream: Stream, noise_norm: float, finish: Callable[[Tensor], T]) -> Pass[T]:
        """The pass of a stream through the stages of a pipeline; `finish` takes the predictions' hidden states [N, D]."""
        gated, context = self.model.config.gated_lora_rank is not None, self.context

        def run(layers: StageLayers, received: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
            noise_BTD = self.embedding_noise(stream, noise_norm) if received is None else None
            return stage_hidden(layers, received, stream, self.backend, noise_BTD, self.counting_router, context, gated=gated)

        at = stream.predict if context is None else context.local(stream).predict
        lengths = stage_lengths(stream, self.world.dims.context, gated=gated)
        return Pass(stream.tokens_BT.shape[0], lengths, run, lambda hidden_BTD: finish(hidden_BTD[at]))

    def embedding_noise(self, stream: Stream, norm: float) -> Tensor | None:
        """Noise [B, T, D] of this norm for masked embeddings; None for norm 0."""
        if norm <= 0:
            return None
        assert self.mask_id is not None
        return embedding_noise(stream, self.mask_id, self.model.config.hidden_size, norm, self.train.seed)

    def own_predictions(self, stream: Stream) -> Stream:
        """The stream with the predictions of this rank's positions; what is counted once, one rank counts."""
        return stream if self.context is None else self.context.share(stream)

    def over_context(self, part: Tensor) -> Tensor:
        """The sum, with its gradient, of what each of the ranks that divide the positions has a part of."""
        return part if self.context is None else self.context.sum(part)

    @property
    def counts_rows(self) -> bool:
        """Whether this rank counts what all ranks that divide the positions of its rows have."""
        return self.world.index("context") == 0

    @cached_property
    def context(self) -> ContextShard | None:
        """This rank's share of the positions; None: all of them."""
        if self.world.dims.context == 1:
            return None
        from unmask.train.parallel.context import ContextShard

        return ContextShard(self.world.group("context"), self.world.index("context"), self.world.dims.context)

    @cached_property
    def _vocabulary(self) -> VocabularyShard | None:
        """This rank's share of the vocabulary; None: all of it."""
        if self.world.dims.tensor == 1:
            return None
        from unmask.train.parallel.tensor import vocabulary_shard

        return vocabulary_shard(self.model.config, self.world.mesh["tensor"])

    @property
    def counting_router(self) -> RouterMonitor | None:
        """The monitor of the routers; None without gradient: only forward passes that train count in their load."""
        return self.router if torch.is_grad_enabled() else None


@dataclass(frozen=True, eq=False)
class StreamBatch(MicroBatch):
    """A micro-batch whose loss is a function of one stream's hidden states.

    `noise_norm` is that of the mask-embedding noise; None: without, and not logged.
    """

    setting: Setting
    stream: Stream
    noise_norm: float | None = field(default=None, kw_only=True)

    @abstractmethod
    def forward(self, hidden_ND: Tensor | None = None) -> Output:
        """Run the model, with gradient, or go on from the `hidden_ND` that stages of a pipeline have computed."""

    def stages(self, finish: Callable[[Output], Tensor]) -> Pass[Tensor]:
        """The pass through the stages of a pipeline; `finish` makes the loss to differentiate of what `forward` gives."""
        return self.setting.stages(self.stream, self.noise_norm or 0.0, lambda hidden_ND: finish(self.forward(hidden_ND)))

    def _noise_figure(self) -> dict[str, Figure]:
        return {} if self.noise_norm is None else {"mask_noise": Figure(self.noise_norm, 1)}


@dataclass(frozen=True, eq=False)
class WeightedNll(StreamBatch):
    """A loss of one term, `sum_i weight_i nll_i / count`, over the predictions of a stream."""

    count: float

    def counts(self) -> tuple[float, ...]:
        return (self.count,)

    def forward(self, hidden_ND: Tensor | None = None) -> Output:
        nll_N = self.setting.nll(self.stream, self.noise_norm or 0.0, hidden_ND)
        return Output((LossTerm(nelbo(nll_N, self.stream.weight_N), self.count),), self._noise_figure())


class Objective(ABC):
    """What a training stage minimises."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        """Lay the rows of a micro-batch out for optimiser step `step` (from 0); the model does not run yet."""

    @abstractmethod
    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        """Figures of held-out rows under fixed noise, among them `nelbo` (nats per token); called without gradient."""


class ObjectiveSection(Section, ABC):
    """Base class of the objectives' recipe sections. Each has a `kind` of its own and is listed in `Recipe.objective`."""

    autoregressive: ClassVar[bool] = False
    """The model is trained as the autoregressive one it is: no mask token, no blocks."""
    pairs: ClassVar[bool] = False
    """Rows are pairs of a chosen and a rejected answer."""

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen model, as the run finds it, scores the rows, too."""
        return False

    @abstractmethod
    def build(self, setting: Setting) -> Objective:
        """The objective; raises ConfigError when the model does not fit it."""

    def check(self, data: DataSection, train: TrainSection, blocks: BlockSchedule) -> None:
        """Raise ConfigError when the rest of the recipe does not fit the objective."""

    def check_dims(self, dims: ParallelDims) -> None:
        """Raise ConfigError when a run cannot be divided so over ranks."""

    def eos_fill(self, block_size: int) -> int:
        """To a multiple of how many tokens documents are filled with end-of-text tokens: whole blocks are learnt."""
        return block_size
