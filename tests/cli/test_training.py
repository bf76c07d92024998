"""How the options of a training verb become a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from unmask.cli.training import default_recipe, make_plan


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_fine_tuning_keeps_the_models_block_size_unless_told_otherwise(verb: str, diffusion_folder: Path) -> None:
    def size(*overrides: str, recipe: Path | None = None) -> int:
        return make_plan(verb, recipe, str(diffusion_folder), "x.jsonl", list(overrides), None).decode_block_size

    assert size() == 8
    assert size("decode_block_size=16") == 16
    assert size(recipe=default_recipe(verb)) == 32


def test_a_conversion_has_the_recipes_block_size(ar_folder: Path) -> None:
    assert make_plan("convert", None, str(ar_folder), "x.jsonl", [], None).decode_block_size == 32
