"""Recipes: what a run does, as YAML checked by pydantic.

Owns the schema, its loading and `--set a.b=c` overrides. Knows nothing of how a run is carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unmask.data.packing import Overlong
from unmask.data.sources import SourceConfig
from unmask.diffusion.blocks import BlockSchedule, Phase, wsd_schedule
from unmask.diffusion.corrupt import CorruptionConfig
from unmask.diffusion.schedule import Bandwidth
from unmask.errors import ConfigError
from unmask.train.router import RouterPolicy

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of every part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Where text comes from and how it is packed."""

    sources: list[SourceConfig] = Field(min_length=1)
    validation_share: float = Field(0.02, ge=0, lt=1, description="share of each source's documents never trained on")
    validation_rows: int = Field(16, ge=0, description="rows of held-out text scored at every evaluation; 0 turns it off")
    row_length: Positive = 384
    document_mask: bool = Field(True, description="false: documents packed into a row see each other, for comparison")
    overlong: Overlong = Field("split", description="a document longer than a row: split into rows, truncate or drop it")


class PhaseSection(Section):
    """One step of warmup or decay: a block size and its share of the tokens."""

    block_size: Positive
    share: Share


class ScheduleSection(Section):
    """Warmup-Stable-Decay of the block size; shares are relative to each other."""

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


class CapSection(Section):
    """Confidence-aware parallel training: sharpens predictions that are right already."""

    weight: float = Field(2.0, ge=0, description="lambda; 0 logs the figures and trains as without")
    temperature: float = Field(1.0, gt=0, description="divides the logits before the entropy")
    threshold: float = Field(0.95, gt=0, lt=1, description="decoding threshold that the log counts predictions above")


class DraftSection(Section):
    """Training of drafts alone, as verified decoding asks for them: all behind what is known is masked, a block far."""

    draws: Positive = Field(2, description="places at which each row is cut into blocks; they share its clean copy")
    decay: float = Field(
        0.9, gt=0, le=1, description="weight of a draft relative to the one before it, without which it would not count"
    )
    masks: float = Field(
        0.0, ge=0, lt=1, description="share of the steps that denoise masks drawn at random, as the rest of this section says"
    )


class ObjectiveSection(Section):
    """How documents are corrupted, and what is added to the NELBO."""

    bandwidth: tuple[float, float] = (0.0, 1.0)
    complementary: bool = True
    sampling: Literal["bernoulli", "fixed_count"] = "fixed_count"
    draws: Positive = Field(
        1, description="masks, or complementary pairs, per row; they share its clean copy: cheap where answers are short"
    )
    mask_noise_steps: int = Field(50, ge=0, description="steps over which mask-embedding noise decays to zero; 0: none")
    mask_noise_scale: float = Field(1.0, ge=0, description="initial noise norm, in mean norms of the embedding rows")
    ar_loss_weight: float = Field(
        0.0,
        ge=0,
        description="shifted models: weight of the next-token loss of the clean copy, which keeps what the parent knew",
    )
    cap: CapSection | None = None
    drafts: DraftSection | None = Field(
        None, description="shifted models: train what verified decoding checks, in place of masks drawn at random"
    )

    def corruption(
        self, mask_id: int, start_id: int | None, block_size: int | None, *, draws: int | None = None
    ) -> CorruptionConfig:
        """The corruption of one phase, `draws` times (None: the section's own) over the same clean copy."""
        return CorruptionConfig(
            mask_id=mask_id,
            start_id=start_id,
            ar_loss_weight=self.ar_loss_weight,
            block_size=block_size,
            bandwidth=Bandwidth(*self.bandwidth),
            complementary=self.complementary,
            sampling=self.sampling,
            draws=draws or self.draws,
        )


class PreferenceSection(Section):
    """Preference optimisation (DPO) over the ELBO."""

    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference")
    samples: Positive = Field(8, description="noise samples (mask rate and mask) per response; the report uses 1")


class RouterSection(Section):
    """What becomes of a mixture's routers."""

    policy: RouterPolicy | None = Field(None, description="frozen, bias or aux; left out: bias, or frozen with LoRA")
    rate: float = Field(1e-3, gt=0, description="bias: how far the selection bias moves in a step")
    aux_weight: float = Field(1e-3, gt=0, description="aux: weight of the load-balancing loss")


class LoraSection(Section):
    """Low-rank adapters instead of full training. The embedding (with a tied head) trains in full unless frozen."""

    rank: Positive = 16
    alpha: float = Field(32.0, gt=0)
    train_embedding: bool = True


class TrainSection(Section):
    """The loop: budget, batch, optimiser, dtypes, checkpoints."""

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
    activation_checkpointing: bool = False
    lora: LoraSection | None = None
    gated_lora_rank: Positive | None = Field(
        None,
        description="shifted models: freeze the model and train low-rank updates that only the rows being decoded pass; what "
        "the model says decoding token by token stays as it is",
    )
    router: RouterSection = RouterSection()
    eval_every: Positive = 50
    checkpoint_every: Positive = 50
    keep_checkpoints: Positive = 2
    seed: int = 0


class Recipe(Section):
    """A whole run: `unmask convert`, `sft` or `dpo` with `--recipe FILE`.

    With a `schedule` of block sizes the run is a conversion, which may start from an autoregressive model. Without one it
    trains a diffusion model at `decode_block_size`. With `preference` it minimises DPO's loss over pairs.
    """

    model: str
    autoregressive: bool = Field(
        False, description="next-token training of an autoregressive model, as it is: what a conversion is compared with"
    )
    mask_token: str | None = Field(
        None, description="token to serve as [MASK]; default: the model's, or an unused special token"
    )
    shift: bool = Field(
        False,
        description="conversion: let position p read token p - 1, as the autoregressive parent does, and predict token p; what "
        "the parent knows is then not learnt anew. A converted model stays as it was converted",
    )
    decode_block_size: Positive = 32
    data: DataSection
    schedule: ScheduleSection | None = None
    objective: ObjectiveSection = ObjectiveSection()
    preference: PreferenceSection | None = None
    train: TrainSection

    @property
    def block_size(self) -> int:
        """That of decoding; an autoregressive model decodes one token at a time, whatever `decode_block_size` says."""
        return 1 if self.autoregressive else self.decode_block_size

    @property
    def blocks(self) -> BlockSchedule:
        """The phases of the run."""
        if self.schedule is None:
            return BlockSchedule((Phase("decay", self.block_size, self.train.tokens),))
        return self.schedule.build(self.train.tokens)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self.blocks.check_row_length(self.data.row_length)
        Bandwidth(*self.objective.bandwidth)
        if self.train.batch_rows % self.train.micro_rows:
            raise ConfigError(
                f"train.batch_rows {self.train.batch_rows} is not a multiple of train.micro_rows {self.train.micro_rows}"
            )
        if self.autoregressive:
            self._check_autoregressive()
        if self.preference is not None:
            self._check_preference()
        self._check_gated()
        return self

    def _check_gated(self) -> None:
        objective, gated = self.objective, self.train.gated_lora_rank is not None
        if gated and (self.train.lora is not None or self.autoregressive or objective.ar_loss_weight):
            raise ConfigError(
                "train.gated_lora_rank leaves the rest of the model as it is; leave train.lora, autoregressive and "
                "objective.ar_loss_weight out"
            )
        if objective.drafts is None:
            return
        if self.autoregressive or self.preference is not None or objective.cap is not None or objective.ar_loss_weight:
            raise ConfigError(
                "objective.drafts is an objective of its own; leave autoregressive, preference, objective.cap and "
                "objective.ar_loss_weight out"
            )
        if any(phase.block_size is None or phase.block_size < 2 for phase in self.blocks.phases):
            raise ConfigError("objective.drafts takes blocks of 2 tokens or more, in every phase of the schedule")

    def _check_autoregressive(self) -> None:
        sections = self.schedule is not None or self.preference is not None or self.objective.cap is not None
        if sections or self.mask_token or self.shift:
            raise ConfigError(
                "autoregressive training has no schedule, preference, objective.cap, shift or mask_token; leave them out"
            )

    def _check_preference(self) -> None:
        if self.train.micro_rows % 2:
            raise ConfigError(
                f"train.micro_rows is {self.train.micro_rows}; a preference pair takes two rows: use an even number"
            )
        if self.data.validation_rows % 2:
            raise ConfigError(f"data.validation_rows is {self.data.validation_rows}; a pair takes two rows: use an even number")
        if self.data.overlong == "split":
            raise ConfigError("data.overlong is split, which would tear a preference pair apart; use truncate or drop")
        objective = self.objective
        others = objective.draws > 1 or objective.cap is not None or objective.ar_loss_weight or objective.mask_noise_steps
        if objective.complementary or others:
            raise ConfigError(
                "preference training draws samples of its own; set objective.complementary to false, "
                "objective.mask_noise_steps to 0 and leave objective.draws, objective.ar_loss_weight and objective.cap out"
            )
        if self.train.lora is not None and self.train.lora.train_embedding:
            raise ConfigError(
                "preference training with LoRA takes the model without its adapter as reference, so the embedding must not "
                "move; set train.lora.train_embedding to false"
            )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file.
        overrides: `a.b=value` strings; the value is read as YAML, a number is a list index (`data.sources.0.path=x`).

    Raises:
        ConfigError: unreadable file, unknown key, or a value that breaks a rule; every problem is named.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {path} holds no mapping; see recipes/ for examples")
    for override in overrides:
        _set(values, override)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validate recipe values; `where` names their origin in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'recipe'}: {problem['msg']} (got {problem['input']!r:.60})"
            for problem in error.errors()
        )
        raise ConfigError(f"recipe {where}: {problems}") from error


def _set(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML") from error
    *path, last = key.split(".")
    target: Any = values
    for part in path:
        if isinstance(target, list):
            target = target[_index(part, target, override)]
            continue
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict | list):
            raise ConfigError(f"--set {override!r}: '{part}' is a value, not a section")
    if isinstance(target, list):
        target[_index(last, target, override)] = value
    else:
        target[last] = value


def _index(part: str, target: list[Any], override: str) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise ConfigError(f"--set {override!r}: '{part}' is not an index of a list of {len(target)}")
    return int(part)
