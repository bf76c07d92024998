"""Next-token prediction: the autoregressive control that a conversion is compared with."""

from __future__ import annotations

from typing import ClassVar, Literal

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.diffusion.corrupt import next_token_stream
from unmask.errors import ConfigError
from unmask.train.objectives.base import Figure, MicroBatch, Objective, ObjectiveSection, Setting, WeightedNll
from unmask.train.sections import DataSection, TrainSection


class NextTokenSection(ObjectiveSection):
    """`kind: next_token`: trains an autoregressive model as it is, one token after the other."""

    autoregressive: ClassVar[bool] = True
    kind: Literal["next_token"] = "next_token"

    def check(self, data: DataSection, train: TrainSection, blocks: BlockSchedule) -> None:
        """A gated LoRA belongs to a diffusion model."""
        if train.gated_lora_rank is not None:
            raise ConfigError("train.gated_lora_rank has no effect on objective.kind next_token; leave it out")

    def build(self, setting: Setting) -> NextTokenObjective:
        return NextTokenObjective(setting)


class NextTokenObjective(Objective):
    """Mean negative log-likelihood of the next token under causal attention."""

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        stream = self.setting.own_predictions(next_token_stream(rows))
        return WeightedNll(self.setting, stream, stream.num_maskable)

    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        stream = self.setting.own_predictions(next_token_stream(rows))
        return {"nelbo": Figure(float(self.setting.nll(stream).sum()), stream.num_maskable)}
