"""`unmask plan`: what it prints, and one line for what cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "scale" / "llada2-mini_8_h200.yaml"


@pytest.fixture
def small(diffusion_folder: Path) -> tuple[object, ...]:
    return ("plan", "--recipe", RECIPE, "--model", diffusion_folder, "--set", "schedule=null", "--gpus", 4)


def test_layouts_of_a_small_model(run, small, tmp_path: Path) -> None:
    facts = json.loads(run(*small, "--price", 2, "--plot", tmp_path / "plot.svg", "--json").stdout)
    assert (facts["gpus"], facts["gpu"]["name"]) == (4, "h100-80gb")
    assert {plan["layout"] for plan in facts["plans"]} >= {"data_shard=4", "data_replicate=4", "data_shard=2,tensor=2"}
    assert facts["plans"][0]["cost"] > 0
    assert facts["refused"]
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_a_layout_in_detail(run, small) -> None:
    result = run(*small, "--layout", "data_shard=2,tensor=2")
    assert result.exit_code == 0, result.output
    assert "data_shard=2,tensor=2" in result.stdout
    assert "optimizer" in result.stdout


def test_a_pipeline_is_checked(run, small) -> None:
    result = run(*small, "--layout", "data_shard=2,pipeline=2", "--check")
    assert result.exit_code == 0, result.output
    assert "tracked" in result.stdout


def test_what_cannot_be_planned_is_one_line(fails, small) -> None:
    fails(*small, "--gpu", "z9", names=("z9", "h100-80gb"))
    fails(*small, "--layout", "tensor=8", names=("8 processes", 4))
    fails("plan", "--recipe", RECIPE, "--gpu", "a100-40gb", "--gpus", 1, names=("nothing fits", "micro_rows"))
