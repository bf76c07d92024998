"""Recipe sections that every training stage has: data, block-size schedule, optimisation.

Owns keys, types, defaults and descriptions. The sections of the objectives are in `objectives`, the whole recipe in `recipe`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unmask.data.packing import Overlong
from unmask.data.sources import SourceConfig
from unmask.diffusion.blocks import BlockSchedule, wsd_schedule
from unmask.errors import ConfigError
from unmask.models.arch.transformer import Checkpointing
from unmask.train.router import RouterPolicy

Positive = Annotated[int, Field(gt=0)]
GatedLoraTarget = Literal["qkv", "out", "gate_up", "down"]


class Section(BaseModel):
    """Base class of the sections of a recipe: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """The training documents and how they are packed into rows."""

    sources: list[SourceConfig] = Field(min_length=1)
    validation_share: float = Field(0.02, ge=0, lt=1, description="share of each source's documents never trained on")
    validation_rows: int = Field(16, ge=0, description="rows of held-out documents scored at every evaluation; 0: none")
    row_length: Positive = 384
    document_mask: bool = Field(True, description="false: documents packed into a row attend to each other, for comparison")
    overlong: Overlong = Field("split", description="a document longer than a row: split into rows, truncate or drop it")

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        packed = [source.path for source in self.sources if source.kind == "packed"]
        if packed and len(self.sources) > 1:
            raise ConfigError(
                f"data.sources names packed rows ({packed[0]}) beside {len(self.sources) - 1} other sources; packed rows are "
                "read alone: pack the mixture"
            )
        return self


class PhaseSection(Section):
    """A phase of warmup or decay: a block size and its share of the tokens."""

    block_size: Positive
    share: float = Field(gt=0)


class ScheduleSection(Section):
    """Warmup-Stable-Decay (WSD) schedule of the block size; shares are relative to each other."""

    warmup: list[PhaseSection] = []
    stable: float = Field(0.0, ge=0, description="share of full-sequence diffusion (no clean copy)")
    decay: list[PhaseSection] = []

    def build(self, total_tokens: int) -> BlockSchedule:
        """The phases of a run of `total_tokens`."""
        return wsd_schedule(
            total_tokens,
            warmup=[(phase.block_size, phase.share) for phase in self.warmup],
            stable=self.stable,
            decay=[(phase.block_size, phase.share) for phase in self.decay],
        )


class RouterSection(Section):
    """How the routers of a mixture of experts are trained."""

    policy: RouterPolicy | None = Field(None, description="frozen, bias or aux [default: bias; with LoRA: frozen]")
    rate: float = Field(1e-3, gt=0, description="policy bias: change of the selection bias per step")
    aux_weight: float = Field(1e-3, gt=0, description="policy aux: weight of the load-balancing loss")


class LoraSection(Section):
    """Low-rank adapters instead of full training. The embedding (with a tied head) trains in full unless frozen."""

    rank: Positive = 16
    alpha: float = Field(32.0, gt=0)


class TrainSection(Section):
    """The training loop: budget, batch, optimiser, dtypes, checkpoints."""

    tokens: Positive
    batch_rows: Positive = 8
    micro_rows: Positive = 2
    learning_rate: float = Field(2e-4, gt=0)
    warmup_steps: int = Field(20, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    final_lr_share: float = Field(0.1, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: Literal["auto", "dense", "blocked", "flex"] = "auto"
    activation_checkpointing: Checkpointing = False
    compile: Literal["always"] | bool = Field(
        True,
        description="in a run of one process, fuse what layers compute beside attention; true: on a GPU; always: on a CPU, "
        "too, which takes a C++ compiler and a minute, and then a fifth less time a step; false: nothing is compiled",
    )
    lora: LoraSection | None = None
    freeze_embeddings: bool = Field(
        False, description="embedding and head stay as they are; a new mask token then keeps the vector that it begins with"
    )
    gated_lora_rank: Positive | None = Field(
        None,
        description="shifted models: freeze the model and train a gated LoRA of this rank, which only draft (mask) tokens pass "
        "through; autoregressive decoding stays exactly that of the parent",
    )
    gated_lora_targets: list[GatedLoraTarget] | None = Field(
        None,
        min_length=1,
        description="linear layers whose gated LoRA trains: `qkv` and `out` of attention, `gate_up` and `down` of the "
        "feed-forward; the others' stays as it is, zero in the beginning [default: all]",
    )
    router: RouterSection = RouterSection()
    eval_every: Positive = 50
    checkpoint_every: Positive = 50
    keep_checkpoints: Positive = 2
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        if self.batch_rows % self.micro_rows:
            raise ConfigError(f"train.batch_rows is {self.batch_rows}, not a multiple of train.micro_rows {self.micro_rows}")
        if self.gated_lora_rank is not None and self.lora is not None:
            raise ConfigError("train.gated_lora_rank freezes the model and train.lora adapts it; leave one of them out")
        if self.gated_lora_rank is not None and self.freeze_embeddings:
            raise ConfigError("train.gated_lora_rank freezes the embeddings in any case; leave train.freeze_embeddings out")
        return self
