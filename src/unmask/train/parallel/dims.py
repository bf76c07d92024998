"""Parallel dimensions: over how many processes data, rows, matrices, layers and experts are divided.

Owns the recipe's `parallel:` section and the rules it obeys. Knows neither processes nor torch.distributed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from unmask.errors import ConfigError
from unmask.train.sections import Positive, Section

if TYPE_CHECKING:
    from unmask.models.arch.config import ModelConfig


PipelineSchedule = Literal["1f1b", "interleaved_1f1b", "zero_bubble"]


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of parallelism; their product, without `expert`, is the number of processes.

    Attributes:
        data_replicate: copies of the model, each trained on other rows: HSDP, or sums of gradients alone.
        data_shard: ranks that each hold a shard of every parameter and train on other rows (FSDP).
        context: ranks that divide the positions of a row.
        tensor: ranks that divide each matrix.
        pipeline: ranks that divide the layers.
        expert: ranks, among those of `data_shard` and `context`, that divide the experts of a mixture.
        pipeline_schedule: the order in which stages take micro-batches.
        pipeline_stages: stages of each rank of a pipeline.
    """

    data_replicate: int = 1
    data_shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    pipeline_schedule: PipelineSchedule = "1f1b"
    pipeline_stages: int = 1

    def __post_init__(self) -> None:
        if self.pipeline_schedule == "1f1b" and self.pipeline_stages > 1:
            raise ConfigError(
                f"parallel.pipeline_stages is {self.pipeline_stages}, but pipeline_schedule 1f1b takes one stage a rank; use "
                "interleaved_1f1b or zero_bubble"
            )
        if self.pipeline_schedule == "interleaved_1f1b" and self.pipeline_stages < 2:
            raise ConfigError(
                f"parallel.pipeline_stages is {self.pipeline_stages}, but pipeline_schedule interleaved_1f1b takes 2 stages a "
                "rank or more; use 1f1b"
            )
        if self.shards % self.expert:
            raise ConfigError(
                f"parallel.expert is {self.expert}; it must divide parallel.data_shard x parallel.context, {self.shards}"
            )

    @property
    def size(self) -> int:
        """Processes."""
        return prod((self.data_replicate, self.data_shard, self.context, self.tensor, self.pipeline))

    @property
    def data(self) -> int:
        """Ranks, or groups of ranks, that train on different rows."""
        return self.data_replicate * self.data_shard

    @property
    def shards(self) -> int:
        """Ranks over which FSDP divides a parameter."""
        return self.data_shard * self.context

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, on all of its ranks."""
        return self.pipeline * self.pipeline_stages

    def stage_layers(self, num_layers: int) -> list[range]:
        """The layers of each stage; where they do not divide, the first ones have one more, and the last one the head."""
        count, rest = divmod(num_layers, self.num_stages)
        starts = [count * stage + min(stage, rest) for stage in range(self.num_stages + 1)]
        return [range(start, stop) for start, stop in pairwise(starts)]

    def check_model(self, config: ModelConfig) -> None:
        """Raise ConfigError when the model cannot be divided so."""
        moe = config.moe
        if self.expert > 1 and moe is None:
            raise ConfigError(f"parallel.expert is {self.expert}, but the model has no routed experts; use 1")
        rules = [
            ("tensor", self.tensor, "key-value heads", config.num_kv_heads),
            ("tensor x parallel.context", self.tensor * self.context, "attention heads", config.num_heads),
        ]
        if moe is None or moe.num_dense_layers:
            rules.append(("tensor", self.tensor, "feed-forward channels", config.ffn_size))
        if moe is not None:
            rules.append(("tensor", self.tensor, "channels of shared experts", moe.expert_size * moe.num_shared))
            rules.append(("expert", self.expert, "experts", moe.num_experts))
            if self.expert > 1 and moe.num_experts % self.shards:
                # Ranks that hold the same experts divide each of them.
                ranks, what = self.shards // self.expert, "data_shard x parallel.context / parallel.expert"
                rules += [
                    (what, ranks, "hidden channels", config.hidden_size),
                    (what, ranks, "channels of an expert", 2 * moe.expert_size),
                ]
        for name, degree, parts, count in rules:
            if count % degree:
                raise ConfigError(f"parallel.{name} is {degree}; it must divide the model's {count} {parts}")
        if self.num_stages > config.num_layers:
            raise ConfigError(
                f"parallel.pipeline x pipeline_stages is {self.num_stages}, but the model has {config.num_layers} layers; use "
                "fewer"
            )

    def check_rows(self, batch_rows: int, *, pairs: bool) -> None:
        """Raise ConfigError when the ranks cannot have equally many rows of a batch, or pairs of rows."""
        unit = self.data * (2 if pairs else 1)
        if batch_rows % unit:
            what = "pairs of rows" if pairs else "rows"
            raise ConfigError(
                f"train.batch_rows is {batch_rows}, which {self.data} data ranks cannot divide into equally many {what}; use a "
                f"multiple of {unit}"
            )

    def check_micro_batches(self, batch_rows: int, micro_rows: int) -> None:
        """Raise ConfigError when the schedule of a pipeline cannot have so many micro-batches."""
        if self.pipeline == 1:
            return
        count = -(-batch_rows // self.data // micro_rows)
        where = f"train.batch_rows {batch_rows} and micro_rows {micro_rows} give each pipeline {count} micro-batches"
        if self.pipeline_schedule == "1f1b" and count < self.pipeline:
            raise ConfigError(
                f"{where}; 1f1b takes as many as parallel.pipeline, {self.pipeline}, or more: lower train.micro_rows"
            )
        rounds = max(1, count // self.pipeline)
        if self.pipeline_schedule != "1f1b" and count % rounds:
            raise ConfigError(
                f"{where}; {self.pipeline_schedule} on {self.pipeline} ranks takes them in {rounds} equal rounds: change "
                "train.batch_rows or micro_rows"
            )


_DEGREES = ("data_replicate", "data_shard", "context", "tensor", "pipeline", "expert")


def layout_name(dims: ParallelDims) -> str:
    """A layout as `--layout` takes it: the degrees above 1."""
    degrees = {name: degree for name in _DEGREES if (degree := vars(dims)[name]) > 1}
    return ",".join(f"{name}={degree}" for name, degree in degrees.items()) or "data_shard=1"


_NO_DEGREES = {"timeout", "auto"}


class ParallelSection(Section):
    """How a run is divided over processes; their number is given when it is started (`--nproc`, torchrun)."""

    data_replicate: Positive = Field(1, description="copies of the model, each trained on other rows")
    data_shard: Positive | Literal["auto"] = Field(
        "auto",
        description="ranks that each hold a shard of every parameter (FSDP) and train on other rows [default: the processes "
        "that the other keys leave]",
    )
    context: Positive = Field(1, description="ranks that divide the positions of a row")
    tensor: Positive = Field(1, description="ranks that divide each matrix")
    pipeline: Positive = Field(1, description="ranks that divide the layers")
    expert: Positive = Field(1, description="ranks, of data_shard and context, that divide the experts of a mixture")
    pipeline_schedule: PipelineSchedule = Field("1f1b", description="order in which stages take micro-batches")
    pipeline_stages: Positive | None = Field(
        None, description="stages of each rank, which alternate [default: with interleaved_1f1b 2, else 1]"
    )
    auto: bool = Field(
        False, description="choose the degrees: the fastest layout that fits, as `unmask plan` finds it (`parallel: auto`)"
    )
    timeout: float = Field(600, gt=0, description="seconds without an answer after which a rank counts as hung")

    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, values: Any) -> Any:
        """`parallel: auto`."""
        return {"auto": True} if values == "auto" else values

    @model_validator(mode="after")
    def _check(self) -> ParallelSection:
        degrees, defaults = self.model_dump(exclude=_NO_DEGREES), type(self).model_fields
        given = [name for name, value in sorted(degrees.items()) if value not in (1, defaults[name].default)]
        if self.auto and given:
            raise ConfigError(f"parallel.auto chooses the degrees, but {given[0]} is given; leave one of them out")
        return self

    def dims(self, num_processes: int) -> ParallelDims:
        """The dimensions of a run of `num_processes`; raises ConfigError when they make another number."""
        degrees = self.model_dump(exclude=_NO_DEGREES)
        if self.pipeline_stages is None:
            degrees["pipeline_stages"] = 2 if self.pipeline_schedule == "interleaved_1f1b" else 1
        named = prod(degrees[name] for name in ("data_replicate", "context", "tensor", "pipeline"))
        if self.data_shard == "auto":
            degrees["data_shard"] = max(num_processes // named, 1)
        dims = ParallelDims(**degrees)
        if dims.size != num_processes:
            names = ("data_replicate", "data_shard", "context", "tensor", "pipeline")
            product = " x ".join(f"{name} {degrees[name]}" for name in names if degrees[name] > 1)
            raise ConfigError(
                f"parallel makes {dims.size} processes ({product or 'all keys are 1'}), but the run has {num_processes}; "
                f"start {dims.size} (--nproc, or torchrun), or change the keys"
            )
        return dims


def parse_layout(text: str, num_processes: int | None = None) -> ParallelDims:
    """The dimensions of `data_shard=8,expert=8`; keys and values are those of the recipe's section.

    Args:
        text: the keys that are not at their default.
        num_processes: of which a missing `data_shard` is what the other keys leave; None: as many as the keys make.

    Raises:
        ConfigError: an unknown key, a wrong value, or a product that is not the number of processes.
    """
    try:
        section = ParallelSection.model_validate(dict(part.split("=") for part in filter(None, text.split(","))))
    except ValueError as error:
        keys = ", ".join(key for key in ParallelSection.model_fields if key not in _NO_DEGREES)
        raise ConfigError(f"layout {text!r} is not of the form data_shard=2,tensor=2 (keys: {keys})") from error
    if num_processes is None:
        shards = 1 if section.data_shard == "auto" else section.data_shard
        num_processes = prod((section.data_replicate, shards, section.context, section.tensor, section.pipeline))
    return section.dims(num_processes)
