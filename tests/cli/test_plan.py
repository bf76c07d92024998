"""`unmask plan`: what it prints, and one line for what cannot be planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def test_the_fastest_plan_without_a_pipeline_is_checked(run, small, monkeypatch: pytest.MonkeyPatch) -> None:
    from unmask.train.plan import planner

    find = planner.find_plans

    def pipelines_first(*args: Any) -> planner.Plans:
        plans = find(*args)
        return replace(plans, fitting=sorted(plans.fitting, key=lambda plan: (plan.dims.pipeline == 1, plan.seconds)))

    monkeypatch.setattr(planner, "find_plans", pipelines_first)
    result = run(*small, "--check", "--top", 1)
    assert result.exit_code == 0, result.output
    assert "without a pipeline" in result.stdout
    assert "tracked" in result.stdout


def test_what_cannot_be_planned_is_one_line(fails, small) -> None:
    fails(*small, "--gpu", "z9", names=("z9", "h100-80gb"))
    fails(*small, "--layout", "tensor=8", names=("8 processes", 4))
    fails(*small, "--layout", "pipeline=2", "--check", names=("parallel.pipeline", 2))
    fails("plan", "--recipe", RECIPE, "--gpu", "a100-40gb", "--gpus", 1, names=("nothing fits", "micro_rows"))
