"""Parallel dimensions: what is left of the processes, and layouts that do not fit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from helpers import refused
from tiny import tiny_config
from unmask.errors import ConfigError
from unmask.train.parallel.dims import ParallelDims, ParallelSection


@pytest.mark.parametrize(
    ("keys", "processes", "shards"),
    [({}, 1, 1), ({}, 4, 4), ({"data_replicate": 2}, 4, 2), ({"tensor": 2}, 2, 1), ({"data_shard": 3}, 3, 3)],
)
def test_the_processes_left_shard_the_model(keys: dict[str, Any], processes: int, shards: int) -> None:
    dims = ParallelSection(**keys).dims(processes)
    assert (dims.size, dims.data_shard) == (processes, shards)


@pytest.mark.parametrize("keys", [{"data_shard": 2}, {"tensor": 3}, {"data_replicate": 8}])
def test_another_number_of_processes_is_refused(keys: dict[str, Any]) -> None:
    (name, degree), *_ = keys.items()
    with refused(ConfigError, f"{name} {degree}", "4", "--nproc"):
        ParallelSection(**keys).dims(4)


def test_experts_are_divided_over_data_and_context_ranks() -> None:
    assert ParallelDims(data_shard=2, context=2, expert=4).size == 4
    with refused(ConfigError, "parallel.expert", "4", "2"):
        ParallelDims(data_shard=2, expert=4)


@pytest.mark.parametrize(
    ("dims", "family", "words"),
    [
        (ParallelDims(tensor=4), "llama", ["parallel.tensor", "4", "2 key-value heads"]),
        (ParallelDims(tensor=2, context=4), "llama", ["parallel.tensor x parallel.context", "8", "4 attention heads"]),
        (ParallelDims(pipeline=4), "llama", ["parallel.pipeline", "4", "2 layers"]),
        (ParallelDims(data_shard=2, expert=2), "llama", ["parallel.expert", "no routed experts"]),
        (ParallelDims(data_shard=3, expert=3), "llada2", ["parallel.expert", "3", "8 experts"]),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(dims: ParallelDims, family: str, words: list[str]) -> None:
    with refused(ConfigError, *words):
        dims.check_model(tiny_config(family))


def test_ranks_have_equally_many_rows_or_pairs() -> None:
    dims = ParallelDims(data_replicate=2, data_shard=2)
    dims.check_rows(4, pairs=False)
    with refused(ConfigError, "train.batch_rows", "6", "multiple of 4"):
        dims.check_rows(6, pairs=False)
    with refused(ConfigError, "train.batch_rows", "4", "pairs", "multiple of 8"):
        dims.check_rows(4, pairs=True)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pipeline_stages": 2}, ["parallel.pipeline_stages", "2", "1f1b"]),
        (
            {"pipeline_schedule": "interleaved_1f1b", "pipeline_stages": 1},
            ["parallel.pipeline_stages", "1", "interleaved_1f1b"],
        ),
    ],
)
def test_stages_that_a_schedule_cannot_have_are_refused(keys: dict[str, Any], words: list[str]) -> None:
    with refused(ConfigError, *words):
        ParallelSection(pipeline=2, **keys).dims(2)
    assert ParallelSection(pipeline=2, pipeline_schedule="interleaved_1f1b").dims(2).pipeline_stages == 2


def test_schedules_take_certain_numbers_of_micro_batches() -> None:
    ParallelDims(pipeline=4, data_shard=2).check_micro_batches(16, 2)
    with refused(ConfigError, "train.batch_rows 16", "micro_rows 4", "2 micro-batches", "parallel.pipeline", "4"):
        ParallelDims(pipeline=4, data_shard=2).check_micro_batches(16, 4)
    interleaved = ParallelDims(pipeline=4, pipeline_schedule="zero_bubble")
    interleaved.check_micro_batches(10, 1)
    with refused(ConfigError, "9 micro-batches", "zero_bubble", "2 equal rounds"):
        interleaved.check_micro_batches(9, 1)


def test_one_process_does_not_import_what_only_several_need() -> None:
    heavy = "[name for name in sys.modules if name.startswith(('torch.distributed.fsdp', 'torch.distributed.tensor.'))]"
    command = [sys.executable, "-c", f"import sys, unmask.train.run; print({heavy})"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
