"""Drafting: training of the draft tokens of self-speculative decoding.

Owns the objective and its figures. The layout of the rows is `diffusion.drafts`'.

Legend: N predictions.
"""

from __future__ import annotations

from itertools import groupby
from typing import Literal

import torch
from pydantic import Field

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.diffusion.corrupt import Stream
from unmask.diffusion.drafts import DraftConfig, draft_stream
from unmask.errors import ConfigError
from unmask.train.objectives.base import Figure, MicroBatch, Objective, Setting, WeightedNll
from unmask.train.objectives.denoise import DenoiseObjective, RandomMaskSection
from unmask.train.sections import DataSection, Positive, TrainSection


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

    def check(self, data: DataSection, train: TrainSection, blocks: BlockSchedule) -> None:
        """A block of one token drafts nothing; the whole sequence is no block."""
        sizes = [phase.block_size for phase in blocks.phases]
        if any(size is None or size < 2 for size in sizes):
            raise ConfigError(f"block sizes are {sizes}; objective.kind draft takes blocks of 2 tokens or more in every phase")

    def eos_fill(self, block_size: int) -> int:
        """Nothing is drafted behind the end of an answer."""
        return 1

    def build(self, setting: Setting) -> DraftObjective:
        """The objective; raises ConfigError for a model that is not shifted, so that nothing would verify its drafts."""
        return DraftObjective(setting, self)


class DraftObjective(Objective):
    """Weighted mean negative log-likelihood of draft tokens, given the tokens before them and none of each other.

    A share of the steps denoises random masks, so that the model can fill holes, too.
    """

    def __init__(self, setting: Setting, section: DraftSection) -> None:
        super().__init__(setting)
        if not setting.model.config.shifted:
            raise ConfigError("objective.kind draft takes a shifted model; convert with shift: true, or use kind denoise")
        self._section, self._denoise = section, DenoiseObjective(setting, section)

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        share = self._section.denoise_share
        if int((step + 1) * share) > int(step * share):
            return self._denoise.prepare(rows, phase, step)
        layout = draft_layout(self.setting, phase, self._section.cuts, self._section.decay)
        stream = self.setting.own_predictions(draft_stream(rows, layout))
        return WeightedNll(self.setting, stream, float(stream.weight_N.double().sum()))

    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        """`nelbo`: nats per draft token, unweighted; `accepted_length` as of `held_out_drafts`."""
        figures = held_out_drafts(self.setting, rows, phase)
        return {"nelbo": figures["draft_nll"], "accepted_length": figures["accepted_length"]}


def draft_layout(setting: Setting, phase: Phase, cuts: int = 1, decay: float = 1.0) -> DraftConfig:
    """The drafts of one phase of a shifted model."""
    start_id = setting.model.config.start_id
    assert phase.block_size is not None
    assert start_id is not None
    assert setting.mask_id is not None
    return DraftConfig(setting.mask_id, start_id, phase.block_size, cuts, decay)


def held_out_drafts(setting: Setting, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
    """`draft_nll`: nats per draft token, unweighted; `accepted_length`: mean number of correct drafts of a block."""
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
