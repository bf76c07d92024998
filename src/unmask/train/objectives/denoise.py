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
from unmask.diffusion.blocks import Phase
from unmask.diffusion.corrupt import corrupt
from unmask.diffusion.objectives import TokenScores, nelbo
from unmask.train.objectives.base import Figure, LossTerm, MicroBatch, Objective, Output, Setting, WeightedNll
from unmask.train.objectives.masking import MaskingSection, held_out_nelbo
from unmask.train.sections import Section


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

    def build(self, setting: Setting) -> DenoiseObjective:
        return DenoiseObjective(setting, self, cap=self.cap)


class DenoiseObjective(Objective):
    """`NELBO + lambda * L_conf`.

    Source: LLaDA2.0 Eqs 1, 5 and section 4.2.
    """

    def __init__(self, setting: Setting, masks: RandomMaskSection, *, cap: CapSection | None = None) -> None:
        super().__init__(setting)
        self._masks, self._cap, self._noise = masks, cap, MaskNoise(setting, masks)

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        setting, noise_norm = self.setting, self._noise.norm(step)
        config = self._masks.corruption(setting, phase, complementary=self._masks.complementary)
        stream = setting.own_predictions(corrupt(rows, config, setting.train.seed))
        if self._cap is None:
            return WeightedNll(setting, stream, stream.num_maskable, noise_norm=noise_norm)
        return CapBatch(setting, stream, stream.num_maskable, noise_norm=noise_norm, cap=self._cap)

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
