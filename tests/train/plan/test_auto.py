"""The layout that `parallel: auto` takes where no planner knows better."""

from __future__ import annotations

from typing import Any

import pytest

from tiny import tiny_config
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.auto import divided_rows
from unmask.train.recipe import parse_recipe


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
