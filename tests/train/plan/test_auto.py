"""The layout that `parallel: auto` takes where no planner knows better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import tiny_folder, tiny_jsonl, tiny_recipe
from tiny import tiny_config
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.auto import divided_rows
from unmask.train.recipe import parse_recipe
from unmask.train.run import run_recipe


def dims(batch_rows: int, num_processes: int, **objective: Any) -> ParallelDims:
    values = {
        "model": "any",
        "shift": objective["kind"] == "joint",
        "data": {"row_length": 32, "sources": [{"kind": "jsonl", "path": "any"}]},
        "schedule": {"decay": [{"block_size": 4, "share": 1.0}]},
        "objective": objective,
        "train": {"tokens": 1000, "batch_rows": batch_rows, "micro_rows": 1},
    }
    return divided_rows(parse_recipe(values, "of the test"), tiny_config("llama"), num_processes)


@pytest.mark.parametrize("parent_kl", [0.0, 0.5])
def test_every_row_goes_to_a_rank_whatever_the_objective_compares_with(parent_kl: float) -> None:
    assert dims(4, 4, kind="joint", parent_kl=parent_kl) == ParallelDims(data_shard=4)


def test_ranks_beyond_the_rows_divide_positions() -> None:
    assert dims(2, 4, kind="denoise") == ParallelDims(data_shard=2, context=2)


def test_ranks_take_the_layout_that_their_launcher_has_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tiny_folder(tmp_path / "model"), tiny_jsonl(tmp_path / "data.jsonl"))
    monkeypatch.delattr("unmask.train.run.layout_of")
    assert not run_recipe(recipe, tmp_path / "run", should_stop=lambda: True, dims=ParallelDims()).finished
