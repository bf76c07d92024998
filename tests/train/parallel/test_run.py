"""Whole runs on several ranks: losses and held-out figures of one process; what happens on one rank concerns all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import refused
from processes import Pool
from runs import stage_recipe, tiny_recipe, untimed_records
from unmask.errors import ConfigError, TrainingError, UnmaskError
from unmask.train.loop import Trainer
from unmask.train.metrics import MetricRecord
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.ranks import Ranks
from unmask.train.recipe import Recipe
from unmask.train.run import build_components, run_recipe
from unmask.train.state import list_checkpoints

SHARD2 = ParallelDims(data_shard=2)


def run(recipe: Recipe, out: Path, dims: ParallelDims, stopping_rank: int | None, **options: Any) -> bool:
    """Run on this rank; `stopping_rank` asks to stop after the first step."""
    world = Ranks(dims, "cpu")
    return run_recipe(recipe, out, world=world, should_stop=lambda: world.rank == stopping_rank, **options).finished


def error_of(recipe: Recipe, out: Path, dims: ParallelDims) -> UnmaskError:
    """The error of this rank."""
    with pytest.raises(UnmaskError) as caught:
        run(recipe, out, dims, None)
    return caught.value


def error_with_another_seed(recipe: Recipe, out: Path, dims: ParallelDims) -> UnmaskError:
    train = recipe.train.model_copy(update={"seed": dist.get_rank()})
    return error_of(recipe.model_copy(update={"train": train}), out, dims)


def error_of_poisoned(recipe: Recipe, out: Path, dims: ParallelDims) -> TrainingError:
    """The error of this rank when the second one's hidden states are not finite in the third step."""
    world = Ranks(dims, "cpu")
    trainer = Trainer(build_components(recipe, world), out)

    def poison(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if world.rank == 1 and trainer.step == 2 else output

    trainer.components.model.norm.register_forward_hook(poison)
    with pytest.raises(TrainingError) as caught:
        trainer.fit()
    return caught.value


def assert_alike(found: list[MetricRecord], expected: list[MetricRecord]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        numbers = {name for name, value in theirs.items() if isinstance(value, float)}
        assert {name: ours[name] for name in numbers} == pytest.approx({name: theirs[name] for name in numbers}, rel=1e-4)
        assert {**ours, **dict.fromkeys(numbers)} == {**theirs, **dict.fromkeys(numbers)}


def test_a_run_of_two_ranks_has_the_figures_of_one_process(pool: Pool, recipe: Recipe, tmp_path: Path) -> None:
    assert run_recipe(recipe, tmp_path / "one").finished
    assert pool.run(2, run, recipe, tmp_path / "two", SHARD2, None) == [True, True]
    assert_alike(untimed_records(tmp_path / "two"), untimed_records(tmp_path / "one"))


@pytest.mark.slow
def test_bfloat16_and_lora_have_the_figures_of_one_process(pool: Pool, base: Path, recipe: Recipe, tmp_path: Path) -> None:
    changed = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"micro_rows": 1, "compute_dtype": "bfloat16"})}
    )
    tuned = stage_recipe(tmp_path / "one", base / "data.jsonl", lora={"rank": 2})
    for number, each in enumerate((changed, tuned)):
        assert run_recipe(each, tmp_path / ("one", "tuned")[number]).finished
        # Of copies in bfloat16 the masters are FSDP's.
        dims = (ParallelDims(data_replicate=4), ParallelDims(data_replicate=2, data_shard=2))[number]
        assert all(pool.run(4, run, each, tmp_path / f"ranks{number}", dims, None))
        ours, theirs = untimed_records(tmp_path / f"ranks{number}"), untimed_records(tmp_path / ("one", "tuned")[number])
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        tolerance = 2e-2 if number == 0 else 1e-4
        for name in ("loss", "nelbo"):
            assert [r[name] for r in ours if name in r] == pytest.approx([r[name] for r in theirs if name in r], rel=tolerance)


def test_one_rank_stops_all_in_a_resumable_state(pool: Pool, recipe: Recipe, tmp_path: Path) -> None:
    assert pool.run(2, run, recipe, tmp_path, SHARD2, 1) == [False, False]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000001"]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_with_one_message(pool: Pool, recipe: Recipe, tmp_path: Path) -> None:
    errors = pool.run(2, error_of_poisoned, recipe, tmp_path, SHARD2)
    assert str(errors[0]) == str(errors[1])
    with refused(TrainingError, "nan", "step 3", "step-0000002"):
        raise errors[0]
    assert list_checkpoints(tmp_path)[-1].name == "step-0000002"


def test_ranks_with_different_recipes_are_refused(pool: Pool, recipe: Recipe, tmp_path: Path) -> None:
    for error in pool.run(2, error_with_another_seed, recipe, tmp_path, SHARD2):
        with refused(ConfigError, "rank 1", "recipe"):
            raise error


def test_rows_that_ranks_cannot_share_are_refused_on_every_rank(pool: Pool, base: Path, tmp_path: Path) -> None:
    uneven = tiny_recipe(base / "model", base / "data.jsonl", batch_rows=5, micro_rows=1)
    for error in pool.run(2, error_of, uneven, tmp_path, SHARD2):
        with refused(ConfigError, "train.batch_rows", "5"):
            raise error
