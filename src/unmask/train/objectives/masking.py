"""Random masks in training: the recipe keys that say how they are drawn, and the NELBO of held-out rows under fixed ones."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.diffusion.corrupt import CorruptionConfig, corrupt
from unmask.diffusion.objectives import nelbo
from unmask.diffusion.schedule import Bandwidth
from unmask.train.objectives.base import Figure, ObjectiveSection, Setting
from unmask.train.sections import Positive

VALIDATION_SEED = 20_251_215
"""Noise of every evaluation, in every run: figures compare across runs."""


class MaskingSection(ObjectiveSection):
    """Keys of the objectives that mask tokens at random."""

    bandwidth: tuple[float, float] = (0.0, 1.0)
    sampling: Literal["bernoulli", "fixed_count"] = "fixed_count"
    mask_samples: Positive = Field(
        1, description="masks, or complementary pairs, per row; they share its clean copy: cheap where answers are short"
    )

    @model_validator(mode="after")
    def _check_bandwidth(self) -> MaskingSection:
        Bandwidth(*self.bandwidth)
        return self

    def corruption(self, setting: Setting, phase: Phase, **changes: Any) -> CorruptionConfig:
        """The masks of one phase; `changes` are further fields of `CorruptionConfig`."""
        assert setting.mask_id is not None
        return CorruptionConfig(
            mask_id=setting.mask_id,
            start_id=setting.model.config.start_id,
            block_size=phase.block_size,
            bandwidth=Bandwidth(*self.bandwidth),
            sampling=self.sampling,
            mask_samples=self.mask_samples,
            **changes,
        )


def held_out_nelbo(setting: Setting, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
    """`nelbo` per maskable token; `ce_t25` to `ce_t100`: mean cross-entropy of masked tokens by quarter of the mask rate."""
    assert setting.mask_id is not None
    start_id = setting.model.config.start_id
    config = CorruptionConfig(setting.mask_id, phase.block_size, complementary=True, sampling="fixed_count", start_id=start_id)
    stream = setting.own_predictions(corrupt(rows, config, VALIDATION_SEED))
    nll_N = setting.nll(stream)
    figures = {"nelbo": Figure(float(nelbo(nll_N, stream.weight_N)), stream.num_maskable)}
    quarter_N = (stream.t_N * 4).ceil().clamp(1, 4).long().cpu()
    for quarter in range(1, 5):
        nll_Q = nll_N.double().cpu()[quarter_N == quarter]
        if len(nll_Q):
            figures[f"ce_t{25 * quarter}"] = Figure(float(nll_Q.sum()), len(nll_Q))
    return figures
