"""Recipes: what is accepted, and that every rejection says what, why and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import refused
from runs import tiny_values
from unmask.errors import ConfigError
from unmask.train.objectives.denoise import DenoiseSection
from unmask.train.recipe import Recipe, load_recipe, parse_recipe


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return tiny_values(tmp_path / "model", tmp_path / "data.jsonl")


def written(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_round_trip_through_json(values: dict[str, Any]) -> None:
    recipe = parse_recipe(values, "test")
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_overrides_reach_sections_and_lists(tmp_path: Path, values: dict[str, Any]) -> None:
    overrides = ["train.tokens=777", "data.sources.0.path=other.jsonl", "train.lora.rank=4", "objective.bandwidth=[0.3, 0.8]"]
    recipe = load_recipe(written(tmp_path, values), overrides)
    assert recipe.train.tokens == 777
    assert recipe.data.sources[0].path == "other.jsonl"
    assert recipe.train.lora is not None
    assert recipe.train.lora.rank == 4
    assert isinstance(recipe.objective, DenoiseSection)
    assert recipe.objective.bandwidth == (0.3, 0.8)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.tokenz=5", ["train.tokenz"]),
        ("nonsense=1", ["nonsense"]),
        ("train.tokens=-5", ["train.tokens", 0]),
        ("train.tokens=0", ["train.tokens"]),
        ("train.learning_rate=0", ["train.learning_rate"]),
        ("train.batch_rows=0", ["train.batch_rows"]),
        ("train.compute_dtype=float8", ["train.compute_dtype"]),
        ("objective.kind=other", ["objective", "'other'", "next_token"]),
        ("objective={}", ["objective", "'kind'"]),
        ("objective.cap.weights=1", ["objective.cap.weights"]),
        ("data.row_length=100", ["row length", 100, 96, 112]),
        ("train.micro_rows=3", ["train.batch_rows", 4, "train.micro_rows", 3]),
        ("objective.bandwidth=[0.8, 0.3]", ["bandwidth", "[0.8, 0.3]"]),
        ("schedule.decay.0.block_size=4", ["decay", "shrink"]),
        ("data.sources=[]", ["data.sources"]),
        ("train.tokens", ["section.key=value"]),
        ("data.sources.7.path=x", ["'7'", "index"]),
        ("model.x=1", ["'model'", "not a section"]),
        ("train.activation_checkpointing=some", ["train.activation_checkpointing", "'some'", "'selective'"]),
    ],
)
def test_bad_values_are_named(tmp_path: Path, values: dict[str, Any], override: str, names: list[object]) -> None:
    with refused(ConfigError, *names):
        load_recipe(written(tmp_path, values), [override])


def test_selective_checkpointing_takes_one_backward_pass(tmp_path: Path, values: dict[str, Any]) -> None:
    overrides = ["train.activation_checkpointing=selective", "parallel.pipeline_schedule=zero_bubble"]
    with refused(ConfigError, "selective", "zero_bubble"):
        load_recipe(written(tmp_path, values), overrides)


def test_unreadable_files(tmp_path: Path) -> None:
    with refused(ConfigError, "absent.yaml"):
        load_recipe(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1, 2")
    with refused(ConfigError, "broken.yaml", "YAML"):
        load_recipe(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with refused(ConfigError, "list.yaml", "mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).train.tokens > 0
