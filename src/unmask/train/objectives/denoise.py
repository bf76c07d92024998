"""Denoising: the NELBO of block diffusion, with confidence-aware training (CAP) if wanted.

Owns pre-training and supervised fine-tuning, which differ by data, bandwidth and block sizes only.

Legend: N predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.diffusion.corrupt import corrupt
from unmask.diffusion.objectives import TokenScores, nelbo
from unmask.errors import ConfigError
from unmask.train.objectives.base import Figure, LossTerm, MicroBatch, Objective, Output, Setting, WeightedNll
from unmask.train.objectives.masking import MaskingSection, held_out_nelbo
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
    ar_loss_weight: float = Field(
        0.0,
        ge=0,
        description="shifted models: weight of the next-token loss of the clean copy, which keeps what the parent knew",
    )
    cap: CapSection | None = None

    def check(self, data: DataSection, train: TrainSection, blocks: BlockSchedule) -> None:
        """The next-token loss trains the weights that a gated LoRA freezes."""
        if self.ar_loss_weight and train.gated_lora_rank is not None:
            raise ConfigError(
                f"objective.ar_loss_weight is {self.ar_loss_weight:g}, but train.gated_lora_rank freezes what it trains; leave "
                "one of them out"
            )

    def build(self, setting: Setting) -> DenoiseObjective:
        """The objective; raises ConfigError for a next-token loss of a model that is not shifted."""
        return DenoiseObjective(setting, self, ar_loss_weight=self.ar_loss_weight, cap=self.cap)


class DenoiseObjective(Objective):
    """`NELBO + lambda * L_conf`.

    Source: LLaDA2.0 Eqs 1, 5 and section 4.2.
    """

    def __init__(
        self, setting: Setting, masks: RandomMaskSection, *, ar_loss_weight: float = 0.0, cap: CapSection | None = None
    ) -> None:
        super().__init__(setting)
        if ar_loss_weight and not setting.model.config.shifted:
            raise ConfigError(
                f"objective.ar_loss_weight is {ar_loss_weight:g}, which takes a shifted model; convert with shift: true, or "
                "leave it out"
            )
        self._masks, self._ar_loss_weight, self._cap = masks, ar_loss_weight, cap
        self._initial_noise = _mean_embedding_norm(setting) * masks.mask_noise_scale

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        setting, steps = self.setting, self._masks.mask_noise_steps
        config = self._masks.corruption(
            setting, phase, complementary=self._masks.complementary, ar_loss_weight=self._ar_loss_weight
        )
        stream = setting.own_predictions(corrupt(rows, config, setting.train.seed))
        # Linear decay to zero. Source: LLaDA2.0 section 3; scale and length are ours.
        noise_norm = self._initial_noise * max(0.0, 1 - step / steps) if steps else 0.0
        if self._cap is None:
            return WeightedNll(setting, stream, stream.num_maskable, noise_norm=noise_norm)
        return CapBatch(setting, stream, stream.num_maskable, noise_norm=noise_norm, cap=self._cap)

    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        return held_out_nelbo(self.setting, rows, phase)


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
            masked = self._scores().first(self.stream.num_masked)
        return (self.count, int(masked.correct_N.sum()))

    def forward(self, hidden_ND: Tensor | None = None) -> Output:
        scores = self._scores(hidden_ND)
        masked = scores.first(self.stream.num_masked)
        terms = (
            LossTerm(nelbo(scores.nll_N, self.stream.weight_N), self.count),
            LossTerm(self.cap.weight * masked.entropy_N.sum(), int(masked.correct_N.sum())),
        )
        return Output(terms, {**self._confidence_figures(masked), **self._noise_figure()})

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
