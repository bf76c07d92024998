"""Drafting: training of the draft tokens of self-speculative decoding, from the text and from the tokens that verify them.

Owns the objective, its terms and its figures. The layout of the rows is `diffusion.drafts`'.

Legend: N predictions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.diffusion.corrupt import Stream
from unmask.diffusion.drafts import DraftConfig, draft_stream
from unmask.diffusion.objectives import alignment, nelbo, parent_divergence
from unmask.errors import ConfigError
from unmask.train.forward import DraftStates, draft_states
from unmask.train.objectives.base import Figure, MicroBatch, Objective, Output, Setting, WeightedNll, weighted_output
from unmask.train.objectives.denoise import DenoiseObjective, RandomMaskSection, check_whole
from unmask.train.parallel.dims import ParallelDims
from unmask.train.sections import DataSection, Positive, TrainSection

FEWEST_DRAFTS = 3
"""Drafts of a block of 4, the smallest in use: `accepted_of_3` counts no more, so that larger blocks compare with it."""


class DraftSection(RandomMaskSection):
    """`kind: draft`: blocks whose tokens behind the first are all masked, as self-speculative decoding drafts them."""

    kind: Literal["draft"] = "draft"
    cuts: Positive = Field(2, description="ways of cutting each row into blocks, evenly apart; they share its clean copy")
    decay: float = Field(
        0.9, gt=0, le=1, description="weight of a draft token relative to the one before, without which it is not accepted"
    )
    denoise_share: float = Field(
        0.0, ge=0, lt=1, description="share of the steps that denoise random masks instead, drawn as the other keys say"
    )
    nll: float = Field(1.0, ge=0, description="weight of the likelihood of the text's tokens, beside `kl` and `align`")
    kl: float = Field(
        0.0,
        ge=0,
        description="weight of KL(verify || draft) between the distributions of the tokens that verify drafts, which take no "
        "gradient from it, and of the drafts",
    )
    align: float = Field(
        0.0,
        ge=0,
        description="weight of 1 - cos between hidden states of drafts and of the tokens that verify them, behind each layer",
    )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that the loss has, by name."""
        weights = {"draft": self.nll, "kl": self.kl, "align": self.align}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def check(self, data: DataSection, train: TrainSection, blocks: BlockSchedule) -> None:
        """A block of one token drafts nothing, the whole sequence is no block, and something is learnt."""
        if self.nll != 1 and not self.weights.keys() & {"kl", "align"}:
            raise ConfigError(
                f"objective.nll is {self.nll:g} and neither objective.kl nor objective.align is set, beside which it weighs; "
                "set one of them, or leave nll out"
            )
        sizes = [phase.block_size for phase in blocks.phases]
        if any(size is None or size < 2 for size in sizes):
            raise ConfigError(f"block sizes are {sizes}; objective.kind draft takes blocks of 2 tokens or more in every phase")

    def check_dims(self, dims: ParallelDims) -> None:
        """What compares drafts with the tokens that verify them takes whole models and rows."""
        check_whole(dims, kl=self.kl, align=self.align)

    def eos_fill(self, block_size: int) -> int:
        """Nothing is drafted behind the end of an answer."""
        return 1

    def build(self, setting: Setting) -> DraftObjective:
        """The objective; raises ConfigError for a model that is not shifted, so that nothing would verify its drafts, or for
        ranks that a term cannot be divided over."""
        return DraftObjective(setting, self)


class DraftObjective(Objective):
    """Weighted mean negative log-likelihood of draft tokens, given the tokens before them and none of each other.

    Beside it or instead, drafts learn from the tokens that verify them (`TaughtDrafts`). A share of the steps denoises random
    masks, so that the model can fill holes, too.
    """

    def __init__(self, setting: Setting, section: DraftSection) -> None:
        super().__init__(setting)
        if not setting.model.config.shifted:
            raise ConfigError("objective.kind draft takes a shifted model; convert with shift: true, or use kind denoise")
        section.check_dims(setting.world.dims)
        self._section, self._denoise = section, DenoiseObjective(setting, section)

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        share = self._section.denoise_share
        if int((step + 1) * share) > int(step * share):
            return self._denoise.prepare(rows, phase, step)
        layout = draft_layout(self.setting, phase, self._section.cuts, self._section.decay)
        weights = self._section.weights
        if weights.keys() != {"draft"}:
            return TaughtDrafts(self.setting, draft_stream(rows, layout, verified=True), weights)
        stream = self.setting.own_predictions(draft_stream(rows, layout))
        return WeightedNll(self.setting, stream, float(stream.weight_N.double().sum()))

    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        """`nelbo`: nats per draft token, unweighted; the others as of `held_out_drafts`."""
        figures = held_out_drafts(self.setting, rows, phase)
        return {"nelbo": figures.pop("draft_nll"), **figures}


@dataclass(frozen=True, eq=False)
class TaughtDrafts(MicroBatch):
    """Drafts that learn from the verify tokens of the same stream: `a * NLL + b * KL(verify || draft) + c * L_align`.

    NLL and KL are means with the weights of the drafts, `L_align` is a plain one. The vocabulary is projected for drafts, once
    for NLL and once for KL, and with KL for the states that verify them.

    Source: TiDAR (2511.08923) for both kinds of tokens in one forward; REPR-ALIGN (2605.06885).

    Attributes:
        stream: with a verify token for every draft.
        weights: of the terms `draft`, `kl` and `align`.
    """

    setting: Setting
    stream: Stream
    weights: dict[str, float]

    def counts(self) -> tuple[float, ...]:
        return tuple(self._counts()[name] for name in self.weights)

    def forward(self) -> Output:
        setting, stream = self.setting, self.stream
        states = draft_states(setting.model, stream, setting.backend, setting.counting_router, layers="align" in self.weights)
        sums: dict[str, Tensor] = {}
        if "draft" in self.weights:
            sums["draft"] = nelbo(setting.nll(stream, hidden_ND=states.draft_ND), stream.weight_N)
        if "kl" in self.weights:
            sums["kl"] = nelbo(self._divergence(states), stream.weight_N)
        if "align" in self.weights:
            sums["align"] = alignment(states.draft_LND, states.verify_LND)
        return weighted_output(self.weights, sums, self._counts())

    def _counts(self) -> dict[str, float]:
        weights = float(self.stream.weight_N.double().sum())
        return {"draft": weights, "kl": weights, "align": len(self.stream.weight_N)}

    def _divergence(self, states: DraftStates) -> Tensor:
        """KL(verify || draft) [N] in nats."""

        def score(head: Callable[[Tensor], Tensor], draft_ND: Tensor) -> Tensor:
            return parent_divergence(head, head, draft_ND, states.verify_ND, self.setting.mask_id)

        return self.setting.model.with_head(score, states.draft_ND)


def draft_layout(setting: Setting, phase: Phase, cuts: int = 1, decay: float = 1.0) -> DraftConfig:
    """The drafts of one phase of a shifted model."""
    start_id = setting.model.config.start_id
    assert phase.block_size is not None
    assert start_id is not None
    assert setting.mask_id is not None
    return DraftConfig(setting.mask_id, start_id, phase.block_size, cuts, decay)


def held_out_drafts(setting: Setting, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
    """`draft_nll`: nats per draft token, unweighted; `accepted_length`: mean number of correct drafts of a block before the
    first wrong one; `accepted_of_3`: of at most three of them."""
    whole = draft_stream(rows, draft_layout(setting, phase))
    stream = setting.own_predictions(whole)
    scores = setting.scores(stream)
    correct_BT = torch.zeros(whole.tokens_BT.shape, device=whole.tokens_BT.device)
    correct_BT[stream.predict] = scores.correct_N.float()
    correct_N = setting.over_context(correct_BT)[whole.predict].bool()
    lengths = accepted_lengths(whole, correct_N) if setting.counts_rows else []
    return {
        "draft_nll": Figure(float(scores.nll_N.sum()), stream.num_maskable),
        "accepted_length": Figure(sum(lengths), len(lengths)),
        f"accepted_of_{FEWEST_DRAFTS}": Figure(sum(min(length, FEWEST_DRAFTS) for length in lengths), len(lengths)),
    }


def accepted_lengths(stream: Stream, correct_N: torch.Tensor) -> list[int]:
    """For every block of drafts in the stream, how many are correct before the first that is not."""
    index = stream.index
    labels = torch.stack([x_BT[stream.predict] for x_BT in (index.copy_BT, index.document_BT, index.block_BT)], dim=1)
    blocks = zip(stream.predict[0].tolist(), *labels.T.tolist(), strict=True)
    lengths = []
    for _, group in groupby(zip(blocks, correct_N.tolist(), strict=True), key=lambda pair: pair[0]):
        correct = [flag for _, flag in group]
        lengths.append(correct.index(False) if False in correct else len(correct))
    return lengths
