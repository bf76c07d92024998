"""Recipes: a training run as YAML, validated by pydantic.

Owns the whole recipe, its loading and `section.key=value` overrides. Knows nothing of how a run is carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.errors import ConfigError
from unmask.train.objectives.denoise import DenoiseSection
from unmask.train.objectives.draft import DraftSection
from unmask.train.objectives.joint import JointSection
from unmask.train.objectives.next_token import NextTokenSection
from unmask.train.objectives.preference import PreferenceSection
from unmask.train.parallel.dims import ParallelSection
from unmask.train.sections import DataSection, Positive, ScheduleSection, Section, TrainSection


class Recipe(Section):
    """A training run: `unmask convert`, `sft` or `dpo` with `--recipe FILE`.

    With a `schedule` of block sizes the run is a conversion, which may start from an autoregressive model. Without one it
    trains a diffusion model at `decode_block_size`, or an autoregressive one (objective `next_token`).
    """

    model: str
    mask_token: str | None = Field(
        None, description="token that serves as [MASK] [default: the model's, or an unused special token]"
    )
    shift: bool = Field(
        False,
        description="conversion: make a shifted model, whose position p reads token p - 1 and predicts token p as its parent "
        "does, so that what the parent knows is not learnt anew; later stages stay shifted or not",
    )
    decode_block_size: Positive = 32
    data: DataSection
    schedule: ScheduleSection | None = None
    objective: DenoiseSection | NextTokenSection | DraftSection | JointSection | PreferenceSection = Field(
        DenoiseSection(), discriminator="kind"
    )
    train: TrainSection
    parallel: ParallelSection = ParallelSection()

    @property
    def block_size(self) -> int:
        """Block size of decoding: 1 for an autoregressive model, whatever `decode_block_size` says."""
        return 1 if self.objective.autoregressive else self.decode_block_size

    @property
    def blocks(self) -> BlockSchedule:
        """The block size over the run."""
        if self.schedule is None:
            return BlockSchedule((Phase("decay", self.block_size, self.train.tokens),))
        return self.schedule.build(self.train.tokens)

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.objective.autoregressive and (self.schedule is not None or self.mask_token or self.shift):
            raise ConfigError(
                f"objective.kind is {self.objective.kind}, which trains the autoregressive model as it is; leave schedule, "
                "shift and mask_token out"
            )
        blocks = self.blocks
        blocks.check_row_length(self.data.row_length)
        self.objective.check(self.data, self.train, blocks)
        if self.train.activation_checkpointing == "selective" and self.parallel.pipeline_schedule == "zero_bubble":
            raise ConfigError(
                "train.activation_checkpointing is selective, but pipeline_schedule zero_bubble computes a layer's gradients "
                "in two passes, and what is kept is there for one; use true, or another schedule"
            )
        return self


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides.

    Args:
        path: a YAML file.
        overrides: `section.key=value` strings; the value is YAML, a number is a list index (`data.sources.0.path=x`).

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
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r}: write it as section.key=value")
        try:
            _set(values, key.split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from error
        except ConfigError as error:
            raise ConfigError(f"override {override!r}: {error}") from error
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], where: str) -> Recipe:
    """Validate recipe values; `where` names their origin in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(
            f"{_key(problem['loc'])}: {problem['msg']} (got {problem['input']!r:.60})" for problem in error.errors()
        )
        raise ConfigError(f"recipe {where}: {problems}") from error


def _key(location: tuple[int | str, ...]) -> str:
    """The key that pydantic's location of an error means: without the kind of the objective, which it puts between."""
    if location[:1] == ("objective",):
        location = location[:1] + location[2:]
    return ".".join(map(str, location)) or "recipe"


def _set(section: Any, keys: list[str], value: Any) -> None:
    """Set the value at the path `keys` below a section or list; absent sections are made."""
    key, *rest = keys
    index: str | int = key
    if isinstance(section, list):
        if not key.isdigit() or int(key) >= len(section):
            raise ConfigError(f"'{key}' is not an index of a list of {len(section)}")
        index = int(key)
    if not rest:
        section[index] = value
        return
    if isinstance(section, dict) and section.get(key) is None:
        section[key] = {}
    if not isinstance(section[index], dict | list):
        raise ConfigError(f"'{key}' is a value, not a section")
    _set(section[index], rest, value)
