"""Denoising: the NELBO of block diffusion, with confidence-aware training (CAP) and alignment to the parent if wanted.

Owns pre-training and supervised fine-tuning, which differ by data, bandwidth and block sizes only.

Legend: B rows, T stream positions, R rows, L row length, N predictions, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.diffusion.corrupt import corrupt
from unmask.diffusion.masks import CLEAN, StreamIndex
from unmask.diffusion.objectives import TokenScores, alignment, nelbo
from unmask.errors import ConfigError
from unmask.train.forward import layer_outputs, make_attend
from unmask.train.objectives.base import Figure, LossTerm, MicroBatch, Objective, Output, Setting, WeightedNll
from unmask.train.objectives.masking import MaskingSection, held_out_nelbo
from unmask.train.parallel.dims import ParallelDims
from unmask.train.sections import DataSection, Section, TrainSection


class CapSection(Section):
    """Confidence-aware parallel training (CAP): sharpens predictions that are correct already."""

    weight: float = Field(2.0, ge=0, description="lambda; 0 logs the figures and trains as without")
    temperature: float = Field(1.0, gt=0, description="divides the logits before the entropy")
    threshold: float = Field(0.95, gt=0, lt=1, description="decoding threshold that the log counts predictions above")


class RandomMaskSection(MaskingSection):
    """How masks are drawn where tokens are denoised, and the noise on their embedding."""

    complementary: bool = True
    mask_noise_steps: int = Field(50, ge=0, description="steps over which mask-embedding noise decays to zero; 0: none")
    mask_noise_scale: float = Field(1.0, ge=0, description="initial noise norm, in mean norms of the embedding rows")


class DenoiseSection(RandomMaskSection):
    """`kind: denoise`, the NELBO: conversion and supervised fine-tuning."""

    kind: Literal["denoise"] = "denoise"
    cap: CapSection | None = None
    align: float = Field(
        0.0,
        ge=0,
        description="mu, of 1 - cos between the hidden states of masked tokens and those by which the model as the run finds "
        "it, frozen and causal, predicts the same tokens",
    )

    @property
    def needs_reference(self) -> bool:
        return self.align > 0

    def check(self, data: DataSection, train: TrainSection, blocks: BlockSchedule) -> None:
        """A parent that stays as it is."""
        if self.align > 0 and train.gated_lora_rank is not None:
            raise ConfigError("objective.align goes with all weights or LoRA, not with train.gated_lora_rank; leave one out")
        check_adapted_parent("align", self.align, train)

    def check_dims(self, dims: ParallelDims) -> None:
        """Alignment takes whole models and rows."""
        check_whole(dims, align=self.align)

    def build(self, setting: Setting) -> DenoiseObjective:
        """The objective; raises ConfigError for what alignment does not go with."""
        if self.align > 0 and setting.model.config.gated_lora_rank is not None:
            raise ConfigError("objective.align goes with all weights or LoRA, and the model has gated LoRA; set it to 0")
        self.check_dims(setting.world.dims)
        return DenoiseObjective(setting, self, cap=self.cap, align=self.align)


def check_whole(dims: ParallelDims, **weights: float) -> None:
    """Raise ConfigError where terms of these weights, by key, take whole models and rows and the ranks have parts."""
    divided = [name for name in ("tensor", "context", "pipeline") if getattr(dims, name) > 1]
    for name, weight in weights.items():
        if weight > 0 and divided:
            raise ConfigError(
                f"objective.{name} is {weight:g}, which takes whole models and rows on every rank, but "
                f"parallel.{divided[0]} divides them; leave one of them out"
            )


def check_adapted_parent(name: str, weight: float, train: TrainSection) -> None:
    """Raise ConfigError where the model without its adapter is the parent of a term, and would change."""
    if weight > 0 and train.lora is not None and not train.freeze_embeddings:
        raise ConfigError(
            f"objective.{name} with LoRA takes the model without its adapter as parent, so the embedding must not "
            "change; set train.freeze_embeddings to true"
        )


class DenoiseObjective(Objective):
    """`NELBO + lambda * L_conf + mu * L_align`.

    Source: LLaDA2.0 Eqs 1, 5 and section 4.2; REPR-ALIGN (2605.06885).
    """

    def __init__(
        self, setting: Setting, masks: RandomMaskSection, *, cap: CapSection | None = None, align: float = 0.0
    ) -> None:
        super().__init__(setting)
        self._masks, self._cap, self._align, self._noise = masks, cap, align, MaskNoise(setting, masks)

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        setting, noise_norm = self.setting, self._noise.norm(step)
        config = self._masks.corruption(setting, phase, complementary=self._masks.complementary)
        stream = setting.own_predictions(corrupt(rows, config, setting.train.seed))
        batch = WeightedNll(setting, stream, stream.num_maskable, noise_norm=noise_norm)
        if self._cap is not None:
            batch = CapBatch(setting, stream, stream.num_maskable, noise_norm=noise_norm, cap=self._cap)
        return AlignedBatch(batch, rows, self._align) if self._align > 0 else batch

    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        return held_out_nelbo(self.setting, rows, phase)


class MaskNoise:
    """Noise on the embeddings of masks in the first steps of a run, which decays linearly to zero.

    Source: LLaDA2.0 section 3; scale and length are ours.
    """

    def __init__(self, setting: Setting, masks: RandomMaskSection) -> None:
        self._steps, self._initial = masks.mask_noise_steps, _mean_embedding_norm(setting) * masks.mask_noise_scale

    def norm(self, step: int) -> float:
        """Its norm in optimiser step `step` (from 0)."""
        return self._initial * max(0.0, 1 - step / self._steps) if self._steps else 0.0


def _mean_embedding_norm(setting: Setting) -> float:
    """Mean norm of the rows of the embedding, which the first stage of a pipeline has."""
    rows_VD, norm = setting.model.embed.weight.detach(), 0.0
    if not rows_VD.is_meta:
        # Summed first and gathered then; not a mean, since tensor ranks pad the vocabulary with zeros.
        norms = rows_VD.float().norm(dim=1).double().sum()
        norm = float(setting.world.full(norms)) / setting.model.config.vocab_size
    return norm if setting.pipeline is None else setting.pipeline.from_first(norm)


@dataclass(frozen=True, eq=False)
class CapBatch(WeightedNll):
    """NELBO, and `lambda` times the mean entropy of the masked positions whose most probable token is correct (`L_conf`).

    The count of the second term, correct predictions, is known only after a forward pass: `counts` runs one without gradient.

    Source: LLaDA2.0 section 4.2 (confidence-aware parallel training).
    """

    cap: CapSection = field(kw_only=True)

    def counts(self) -> tuple[float, ...]:
        with torch.no_grad():
            return (self.count, int(self._scores().correct_N.sum()))

    def forward(self, hidden_ND: Tensor | None = None) -> Output:
        scores = self._scores(hidden_ND)
        terms = (
            LossTerm(nelbo(scores.nll_N, self.stream.weight_N), self.count),
            LossTerm(self.cap.weight * scores.entropy_N.sum(), int(scores.correct_N.sum())),
        )
        return Output(terms, {**self._confidence_figures(scores), **self._noise_figure()})

    def _scores(self, hidden_ND: Tensor | None = None) -> TokenScores:
        return self.setting.scores(self.stream, self.noise_norm or 0.0, hidden_ND, temperature=self.cap.temperature)

    def _confidence_figures(self, scores: TokenScores) -> dict[str, Figure]:
        """Figures of predictions: how many are correct, how sure the model is of those, and how many it is confident of.

        `accuracy`: share whose most probable token is correct; `correct_entropy`: mean entropy (nats) of these;
        `confident_share`: share above the decoding threshold; `confident_accuracy`: share of those that are correct.
        """
        correct_N, confident_N = scores.correct_N, scores.confidence_N > self.cap.threshold
        num_correct, num_confident = int(correct_N.sum()), int(confident_N.sum())
        return {
            "accuracy": Figure(num_correct, len(correct_N)),
            "confident_share": Figure(num_confident, len(correct_N)),
            "correct_entropy": Figure(float(scores.entropy_N.detach().sum()), num_correct),
            "confident_accuracy": Figure(int((confident_N & correct_N).sum()), num_confident),
        }


@dataclass(frozen=True, eq=False)
class AlignedBatch(MicroBatch):
    """A batch's loss, and `mu` times the mean of `1 - cos` of hidden states behind each layer (`L_align`).

    The state of a masked token at position p is compared with the parent's at p - 1, which reads the clean text causally and
    predicts the same token. A document's first token, which the parent does not predict, is left out.

    Source: REPR-ALIGN (2605.06885). Departs: the parent is run beside, since an unshifted clean copy is not causal.

    Attributes:
        batch: what is aligned.
        rows: clean, as the parent reads them.
        weight: mu.
    """

    batch: WeightedNll
    rows: PackedRows
    weight: float

    def counts(self) -> tuple[float, ...]:
        return (*self.batch.counts(), int(self._is_predicted_N.sum()))

    def forward(self) -> Output:
        batch, setting = self.batch, self.batch.setting
        with layer_outputs(setting.model) as outputs:
            hidden_ND = setting.hidden(batch.stream, batch.noise_norm or 0.0)
        output = batch.forward(hidden_ND)
        row_N, column_N, parent_N = (
            place_N[self._is_predicted_N] for place_N in (*batch.stream.predict, self._parent_column_N)
        )
        pairs = zip(outputs, self._parent_outputs(), strict=True)
        own, parent = zip(*((x_BTD[row_N, column_N], y_RLD[row_N, parent_N]) for x_BTD, y_RLD in pairs), strict=True)
        total, count = alignment(own, parent), len(row_N)
        figures = {**output.figures, "align": Figure(float(total.detach()), count)}
        return Output((*output.terms, LossTerm(self.weight * total, count)), figures)

    @cached_property
    def _parent_column_N(self) -> Tensor:
        """Where in the rows the parent predicts the token of each prediction; behind the document where it does not."""
        rows, stream = self.rows, self.batch.stream
        row_RL = torch.arange(rows.num_rows, device=rows.segment_RL.device)[:, None].expand_as(rows.segment_RL)
        column_RL = torch.arange(rows.segment_RL.shape[1], device=row_RL.device).expand_as(row_RL)
        first_RD = torch.zeros(rows.num_rows, int(rows.segment_RL.max()) + 1, dtype=torch.int64, device=row_RL.device)
        first_RD[row_RL, rows.segment_RL] = column_RL - rows.position_RL
        row_N, _ = stream.predict
        return first_RD[row_N, stream.index.document_BT[stream.predict]] + stream.position_BT[stream.predict] - 1

    @cached_property
    def _is_predicted_N(self) -> Tensor:
        return self.batch.stream.position_BT[self.batch.stream.predict] > 0

    def _parent_outputs(self) -> list[Tensor]:
        """What each layer of the parent gives on the clean rows, [R, L, D] each."""
        rows, setting = self.rows, self.batch.setting
        reference = setting.reference
        assert reference is not None
        index = StreamIndex(rows.segment_RL, rows.position_RL, torch.full_like(rows.segment_RL, CLEAN))
        with torch.no_grad(), reference.context(), layer_outputs(reference.model) as outputs:
            reference.model(rows.tokens_RL, rows.position_RL, make_attend(index, setting.backend))
        return outputs
