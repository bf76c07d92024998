"""Joint training: the next-token loss of clean rows and the diffusion loss of noisy ones, for one checkpoint of three modes.

Owns the objective, its terms and its figures. The layout of the rows is `diffusion.joint`'s.

Legend: N predictions, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.diffusion.corrupt import Stream
from unmask.diffusion.joint import JointConfig, clean_columns, joint_stream, without_fill
from unmask.diffusion.masks import CLEAN
from unmask.diffusion.objectives import alignment, nelbo, parent_divergence
from unmask.errors import ConfigError
from unmask.train.forward import layer_outputs
from unmask.train.objectives.base import Figure, MicroBatch, Objective, Output, Setting, StreamBatch, weighted_output
from unmask.train.objectives.denoise import MaskNoise, RandomMaskSection, check_adapted_parent, check_whole
from unmask.train.objectives.draft import draft_layout, held_out_drafts
from unmask.train.objectives.masking import held_out_nelbo
from unmask.train.parallel.dims import ParallelDims
from unmask.train.sections import DataSection, Positive, TrainSection


class JointSection(RandomMaskSection):
    """`kind: joint`, for shifted models: next-token loss of the clean copy, and drafts and random masks over it."""

    kind: Literal["joint"] = "joint"
    diffusion_weight: float = Field(0.3, ge=0, description="lambda, of the diffusion loss beside the next-token loss")
    draft_share: float = Field(
        0.5, ge=0, le=1, description="share of the diffusion loss that drafts have; random masks have the rest"
    )
    cuts: Positive = Field(1, description="ways of cutting each row into draft blocks, evenly apart")
    decay: float = Field(0.9, gt=0, le=1, description="weight of a draft token relative to the one before")
    align: float = Field(
        0.0,
        ge=0,
        description="mu, of 1 - cos between the hidden states of noisy rows and of the clean rows that predict the same",
    )
    parent_kl: float = Field(
        0.0,
        ge=0,
        description="nu, of KL(parent || child) on the clean rows; the parent is the model as the run finds it, frozen",
    )

    @property
    def needs_reference(self) -> bool:
        return self.parent_kl > 0

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term that the loss has, by name."""
        diffusion = self.diffusion_weight
        all_terms = {
            "ar": 1.0,
            "draft": diffusion * self.draft_share,
            "denoise": diffusion * (1 - self.draft_share),
            "align": self.align * (diffusion > 0),
            "kl": self.parent_kl,
        }
        return {name: weight for name, weight in all_terms.items() if weight > 0}

    def check(self, data: DataSection, train: TrainSection, blocks: BlockSchedule) -> None:
        """All weights train, and drafts take blocks."""
        if train.gated_lora_rank is not None:
            raise ConfigError("train.gated_lora_rank freezes what objective.kind joint trains; use kind draft, or leave it out")
        sizes = [phase.block_size for phase in blocks.phases]
        if self.draft_share > 0 and any(size is None or size < 2 for size in sizes):
            raise ConfigError(
                f"block sizes are {sizes}; objective.draft_share is {self.draft_share:g}, which takes blocks of 2 tokens or "
                "more in every phase"
            )
        check_adapted_parent("parent_kl", self.parent_kl, train)

    def check_dims(self, dims: ParallelDims) -> None:
        """Some terms take whole models and rows."""
        check_whole(dims, align=self.align, parent_kl=self.parent_kl)

    def eos_fill(self, block_size: int) -> int:
        """Random masks learn whole blocks; the others leave out what fills them."""
        return block_size if self.draft_share < 1 else 1

    def build(self, setting: Setting) -> JointObjective:
        """The objective; raises ConfigError for a model that is not shifted, or ranks that a term cannot be divided over."""
        return JointObjective(setting, self)


class JointObjective(Objective):
    """`L_AR + lambda * (s * L_draft + (1 - s) * NELBO) + mu * L_align + nu * KL(parent || child)`, one forward for all rows.

    Source: TiDAR (2511.08923) for both kinds of rows in one forward; REPR-ALIGN (2605.06885).
    """

    def __init__(self, setting: Setting, section: JointSection) -> None:
        super().__init__(setting)
        config = setting.model.config
        if not config.shifted or config.gated_lora_rank is not None:
            raise ConfigError(
                "objective.kind joint takes a shifted model without gated LoRA; convert with shift: true, or use kind denoise"
            )
        section.check_dims(setting.world.dims)
        self._section, self._noise = section, MaskNoise(setting, section)

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        setting, section = self.setting, self._section
        config = self._layout(phase)
        stream = setting.own_predictions(joint_stream(rows, config, setting.train.seed))
        clean = joint_stream(rows, self._clean, 0) if section.parent_kl > 0 else None
        return JointBatch(setting, stream, section.weights, config.num_draft_copies, clean, noise_norm=self._noise.norm(step))

    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        """`ar_nll`: nats per token of the clean rows; `accepted_length` as of drafts; `nelbo` and its parts as of denoising."""
        clean = self.setting.own_predictions(joint_stream(rows, self._clean, 0))
        figures = {"ar_nll": Figure(float(self.setting.nll(clean).sum()), len(clean.target_N))}
        if phase.block_size is not None and phase.block_size > 1:
            ended = replace(rows, maskable_RL=without_fill(rows, self._clean.end_ids))
            figures |= held_out_drafts(self.setting, ended, phase)
        return {**figures, **held_out_nelbo(self.setting, rows, phase)}

    @property
    def _clean(self) -> JointConfig:
        """A stream of the clean copy alone."""
        config = self.setting.model.config
        assert config.start_id is not None
        return JointConfig(config.start_id, config.eos_ids)

    def _layout(self, phase: Phase) -> JointConfig:
        section, weights = self._section, self._section.weights
        drafts = draft_layout(self.setting, phase, section.cuts, section.decay) if "draft" in weights else None
        complementary = section.complementary
        masks = section.corruption(self.setting, phase, complementary=complementary) if "denoise" in weights else None
        return replace(self._clean, drafts=drafts, masks=masks)


@dataclass(frozen=True, eq=False)
class JointBatch(StreamBatch):
    """Rows of all kinds under one forward pass.

    Attributes:
        weights: of the terms.
        num_drafts: noisy copies that are drafts; they come first.
        clean: the clean copy alone, which the parent reads.
    """

    weights: dict[str, float]
    num_drafts: int
    clean: Stream | None

    def counts(self) -> tuple[float, ...]:
        return tuple(self._counts.values())

    def forward(self, hidden_ND: Tensor | None = None) -> Output:
        setting, stream, outputs = self.setting, self.stream, list[Tensor]()
        if hidden_ND is None:
            with layer_outputs(setting.model) if "align" in self.weights else nullcontext(outputs) as outputs:
                hidden_ND = setting.hidden(stream, self.noise_norm or 0.0)
        nll_N, rows_N = setting.nll(stream, hidden_ND=hidden_ND), self._rows_N
        sums = {name: nelbo(nll_N[at_N], stream.weight_N[at_N]) for name, at_N in rows_N.items() if name in self.weights}
        if "align" in self.weights:
            sums["align"] = self._alignment(outputs)
        if "kl" in self.weights:
            sums["kl"] = self._divergence(hidden_ND[rows_N["ar"]])
        output = weighted_output(self.weights, sums, self._counts)
        return replace(output, figures={**output.figures, **self._noise_figure()})

    @cached_property
    def _rows_N(self) -> dict[str, Tensor]:
        """Which predictions are those of the clean copy, of drafts, of random masks; bool."""
        copy_N = self.stream.copy_N
        clean_N, draft_N = copy_N == CLEAN, (copy_N != CLEAN) & (copy_N <= self.num_drafts)
        return {"ar": clean_N, "draft": draft_N, "denoise": ~clean_N & ~draft_N}

    @cached_property
    def _counts(self) -> dict[str, float]:
        """What each term is divided by: tokens, weights of drafts, maskable tokens of all copies, noisy predictions."""
        rows_N, weight_N = self._rows_N, self.stream.weight_N
        num_clean = int(rows_N["ar"].sum())
        counts = {
            "ar": num_clean,
            "draft": float(weight_N[rows_N["draft"]].double().sum()),
            "denoise": self.stream.num_maskable,
            "align": len(weight_N) - num_clean,
            "kl": num_clean,
        }
        return {name: counts[name] for name in self.weights}

    def _alignment(self, outputs: list[Tensor]) -> Tensor:
        """Sum over the noisy predictions of what the states behind each layer differ by from the clean copy's."""
        noisy_N = ~self._rows_N["ar"]
        row_N, column_N = (place_N[noisy_N] for place_N in self.stream.predict)
        clean_N = clean_columns(self.stream)
        return alignment([x_BTD[row_N, column_N] for x_BTD in outputs], [x_BTD[row_N, clean_N] for x_BTD in outputs])

    def _divergence(self, clean_ND: Tensor) -> Tensor:
        """Sum over the predictions of the clean copy, whose hidden states are given."""
        reference, mask_id = self.setting.reference, self.setting.mask_id
        assert reference is not None
        assert self.clean is not None
        with torch.no_grad(), reference.context():
            parent_ND = replace(self.setting, model=reference.model).hidden(self.clean)

        def score(head: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> Tensor:
            def against(parent_head: Callable[[Tensor], Tensor], parent_ND: Tensor) -> Tensor:
                return parent_divergence(head, parent_head, hidden_ND, parent_ND, mask_id)

            return reference.model.with_head(against, parent_ND)

        return self.setting.model.with_head(score, clean_ND).sum()
