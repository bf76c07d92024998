"""Preference optimisation: direct preference optimisation (DPO) over the ELBO.

Legend: R rows, N predictions, P pairs (R = 2P: chosen and rejected alternate), S noise samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.diffusion.corrupt import corrupt
from unmask.diffusion.objectives import elbo_gains, preference_loss
from unmask.errors import ConfigError
from unmask.train.objectives.base import Figure, LossTerm, Objective, Output, Setting, StreamBatch
from unmask.train.objectives.masking import VALIDATION_SEED, MaskingSection, held_out_nelbo
from unmask.train.passes import Pass
from unmask.train.sections import DataSection, Positive, TrainSection


class PreferenceSection(MaskingSection):
    """`kind: preference`, DPO over the ELBO: makes a chosen answer more likely than a rejected one."""

    pairs: ClassVar[bool] = True
    kind: Literal["preference"] = "preference"
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    mask_samples: Positive = Field(8, description="noise samples (mask rate and mask) per response; the report uses 1")

    @property
    def needs_reference(self) -> bool:
        return True

    def check(self, data: DataSection, train: TrainSection, blocks: BlockSchedule) -> None:
        """A pair takes two rows and is not torn apart; the reference does not move."""
        for name, rows in (("train.micro_rows", train.micro_rows), ("data.validation_rows", data.validation_rows)):
            if rows % 2:
                raise ConfigError(f"{name} is {rows}; a preference pair takes two rows: use an even number")
        if data.overlong == "split":
            raise ConfigError("data.overlong is split, which would tear a preference pair apart; use truncate or drop")
        if train.lora is not None and not train.freeze_embeddings:
            raise ConfigError(
                "preference training with LoRA takes the model without its adapter as reference, so the embedding must not "
                "change; set train.freeze_embeddings to true"
            )

    def build(self, setting: Setting) -> PreferenceObjective:
        return PreferenceObjective(setting, self)


class PreferenceObjective(Objective):
    """`-log sigmoid(beta * [dB(x_w) - dB(x_l)])`, policy and reference under the same noise.

    Rows come in pairs: chosen at 2i, rejected at 2i + 1. The S noise samples share one clean copy.

    Source: LLaDA2.0 Eq. 7; VRPO (2505.19223) for shared noise and several samples.
    """

    def __init__(self, setting: Setting, section: PreferenceSection) -> None:
        super().__init__(setting)
        self._section = section

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> PreferenceBatch:
        return self._batch(rows, phase, self.setting.train.seed)

    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        output = self._batch(rows, phase, VALIDATION_SEED).forward()
        (loss,) = output.terms
        losses = {"preference_loss": Figure(float(loss.sum), loss.count)}
        return {**held_out_nelbo(self.setting, rows, phase), **losses, **output.figures}

    def _batch(self, rows: PackedRows, phase: Phase, seed: int) -> PreferenceBatch:
        config = self._section.corruption(self.setting, phase)
        shape = (rows.num_rows, config.num_copies)
        stream = self.setting.own_predictions(corrupt(rows, config, seed))
        return PreferenceBatch(self.setting, stream, shape, self._section.beta)


@dataclass(frozen=True, eq=False)
class PreferenceBatch(StreamBatch):
    """Pairs of rows under noise; `shape` is (rows, noise samples)."""

    shape: tuple[int, int]
    beta: float

    def counts(self) -> tuple[float, ...]:
        return (self.shape[0] // 2 if self.setting.counts_rows else 0,)

    def stages(self, finish: Callable[[Output], Tensor]) -> Pass[Tensor]:
        """As of every batch, the reference having scored it before."""
        _ = self.reference_N
        return super().stages(finish)

    def forward(self, hidden_ND: Tensor | None = None) -> Output:
        margin_PS = self._margins(self.reference_N, self.setting.nll(self.stream, hidden_ND=hidden_ND))
        loss_P = preference_loss(margin_PS.mean(1), self.beta)
        # Ranks that divide the positions all have these losses: one of them counts.
        counted = float(self.setting.counts_rows)
        figures = self._figures(margin_PS.detach()) if counted else {}
        return Output((LossTerm(loss_P.sum() * counted, len(loss_P) * counted),), figures)

    @cached_property
    def reference_N(self) -> Tensor:
        """Negative log-likelihoods [N] (nats) of the reference."""
        reference = self.setting.reference
        assert reference is not None
        with torch.no_grad(), reference.context():
            return replace(self.setting, model=reference.model, pipeline=reference.pipeline).nll(self.stream)

    def _margins(self, reference_N: Tensor, policy_N: Tensor) -> Tensor:
        """`dB(x_w) - dB(x_l)` [P, S] in nats, by pair and noise sample."""
        stream = self.stream
        sample_N = stream.index.copy_BT[stream.predict] - 1
        own_RS = elbo_gains(policy_N, reference_N, stream.weight_N, stream.predict[0], sample_N, self.shape)
        gain_RS = self.setting.over_context(own_RS)
        return gain_RS[0::2] - gain_RS[1::2]

    def _figures(self, margin_PS: Tensor) -> dict[str, Figure]:
        """`reward_margin`: mean of beta * margin; `reward_accuracy`: share of pairs whose chosen answer gains more (tie: half);
        `margin_variance`: of one pair's margin estimate (squared nats, over noise, divided by the samples)."""
        num_pairs, num_samples = margin_PS.shape
        margin_P = margin_PS.mean(1)
        figures = {
            "reward_margin": Figure(self.beta * float(margin_P.sum()), num_pairs),
            "reward_accuracy": Figure(float(((margin_P > 0).double() + 0.5 * (margin_P == 0)).sum()), num_pairs),
        }
        if num_samples > 1:
            figures["margin_variance"] = Figure(float(margin_PS.var(1).sum()) / num_samples, num_pairs)
        return figures
