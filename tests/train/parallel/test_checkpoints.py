"""Checkpoints of several processes: resumed at any other number, complete or not there, with the model of one process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import disk_full, refused
from processes import Pool, RanksFailed
from runs import tiny_folder, tiny_jsonl, tiny_preferences, tiny_values
from unmask.errors import CheckpointError, TrainingError
from unmask.models.weights.loading import load_model
from unmask.train.loop import Trainer
from unmask.train.metrics import read_metrics
from unmask.train.pack import pack_recipe
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.whole import on_main
from unmask.train.parallel.world import World
from unmask.train.recipe import parse_recipe
from unmask.train.run import ADAPTER, _save_result, build_components, run_recipe
from unmask.train.state import list_checkpoints

Values = dict[str, Any]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> Values:
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model")
    tiny_jsonl(folder / "data.jsonl")
    made = tiny_values(folder / "model", folder / "data.jsonl", tokens=1600, checkpoint_every=2, eval_every=100)
    made["data"]["validation_rows"] = 0
    return made


@pytest.fixture(scope="module")
def expected(values: Values, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run_recipe(parse_recipe(values, "test"), out).finished
    return out


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl")]


def killed(*_: object, **__: object) -> None:
    """Stands in for a function that writes."""
    os.kill(os.getpid(), signal.SIGKILL)


def train(values: Values, out: Path, world: World, steps: int | None, writing: Callable[..., None] | None = None) -> bool:
    """Train on this rank for some steps, or to the end; `writing` is what rank 1 does instead of writing shards."""
    trainer = Trainer(build_components(parse_recipe(values, "test"), world), out)
    trainer.resume()
    first = trainer.step
    trainer._should_stop = lambda: steps is not None and trainer.step >= first + steps
    if writing is not None and world.rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", writing)
            return trainer.fit()
    return trainer.fit()


def train_ranks(
    values: Values, out: Path, dims: ParallelDims, steps: int | None, writing: Callable[..., None] | None = None
) -> bool:
    from unmask.train.parallel.ranks import Ranks

    return train(values, out, Ranks(dims, "cpu"), steps, writing)


def assert_same_run(out: Path, expected: Path) -> None:
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(losses(expected)), rtol=1e-4, atol=1e-4)
    ours, theirs = (load_model(list_checkpoints(run)[-1] / "model", dtype=torch.float32) for run in (out, expected))
    assert ours.config == theirs.config
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_a_run_goes_on_at_other_numbers_of_processes(pool: Pool, values: Values, expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert not train(values, out, World.single(), 3)
    pool.run(2, train_ranks, values, out, ParallelDims(data_shard=2), 3)
    newest = list_checkpoints(out)[-1]
    assert {path.name for path in newest.iterdir()} == {"model", "shards", "state.json"}
    assert train(values, out, World.single(), None)
    assert_same_run(out, expected)


SECTIONS: dict[str, Values] = {
    "full": {},
    "lora": {"train": {"lora": {"rank": 2, "alpha": 4.0}}},
    "gated": {"shift": True, "train": {"gated_lora_rank": 2}},
    "pairs": {"objective": {"kind": "preference"}},
    "appended": {"mask_token": "<|newly_made|>"},
    "packed": {},
}
"""Changes of the recipe, by what is trained."""
LAYOUTS = [
    ("full", "llama", ParallelDims(tensor=2), ParallelDims(data_shard=2)),
    ("full", "llama", ParallelDims(data_shard=2, tensor=2), ParallelDims(tensor=2)),
    ("full", "llada2", ParallelDims(data_shard=2, expert=2), ParallelDims(data_replicate=2)),
    ("full", "llada2", ParallelDims(data_replicate=2), ParallelDims(data_shard=2, tensor=2)),
    ("full", "llada2", ParallelDims(data_shard=2, tensor=2), ParallelDims(data_shard=4, expert=2)),
    ("lora", "llama", ParallelDims(data_shard=2), ParallelDims(tensor=2)),
    ("gated", "llama", ParallelDims(data_replicate=2), ParallelDims(tensor=2)),
    ("pairs", "llama", ParallelDims(data_shard=2), ParallelDims(data_shard=2)),
    ("appended", "llama", ParallelDims(data_shard=2), ParallelDims(tensor=2)),
    ("packed", "llama", ParallelDims(data_shard=2), ParallelDims(data_shard=4)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "family", "first", "second"), LAYOUTS)
def test_any_layout_starts_from_files_and_goes_on_from_another(
    pool: Pool, tmp_path: Path, trained: str, family: str, first: ParallelDims, second: ParallelDims
) -> None:
    tiny_folder(tmp_path / "model", family=family, tied_head=family == "llama")
    data = (tiny_preferences if trained == "pairs" else tiny_jsonl)(tmp_path / "data.jsonl")
    values = tiny_values(tmp_path / "model", data, tokens=1600, checkpoint_every=100, eval_every=100)
    values["data"]["validation_rows"] = 0
    if trained == "pairs":
        values["data"]["overlong"] = "truncate"
    for key, change in SECTIONS[trained].items():
        values[key] = {**values[key], **change} if isinstance(change, dict) and key == "train" else change
    assert run_recipe(parse_recipe(values, "test"), tmp_path / "whole").finished
    if trained == "packed":
        pack_recipe(parse_recipe(values, "test"), tmp_path / "rows")
        values["data"]["sources"] = [{"kind": "packed", "path": str(tmp_path / "rows")}]
    pool.run(first.size, train_ranks, values, tmp_path / "run", first, 2)
    pool.run(second.size, train_ranks, values, tmp_path / "run", second, 2)
    assert train(values, tmp_path / "run", World.single(), None)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def finish(values: Values, out: Path) -> None:
    """Train on two ranks to the end, and write the result."""
    from unmask.train.parallel.ranks import Ranks

    world = Ranks(ParallelDims(data_shard=2), "cpu")
    components = build_components(parse_recipe(values, "test"), world)
    assert Trainer(components, out).fit()
    on_main(world, lambda: _save_result(components, out))


@pytest.mark.slow
def test_the_result_is_a_model_and_its_adapter(pool: Pool, values: Values, tmp_path: Path) -> None:
    adapted = {**values, "train": {**values["train"], "tokens": 700, "lora": {"rank": 2, "alpha": 4.0}}}
    pool.run(2, finish, adapted, tmp_path / "run")
    assert run_recipe(parse_recipe(adapted, "test"), tmp_path / "whole").finished
    whole = load_model(tmp_path / "whole", dtype=torch.float32)
    for folder in (tmp_path / "run", tmp_path / "run" / ADAPTER):
        model = load_model(folder, dtype=torch.float32)
        assert model.config == whole.config
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-3, msg=name)
    weights = list((list_checkpoints(tmp_path / "run")[-1] / "model").glob("*.safetensors"))
    assert weights
    assert all((tmp_path / "run" / path.name).samefile(path) for path in weights)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {path.name for path in (tmp_path / "whole").iterdir()} <= names | {"loss.png", "model.safetensors", ".lock"}


@pytest.mark.slow
def test_from_four_to_two_to_one_to_two_by_two(pool: Pool, values: Values, expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    pool.run(4, train_ranks, values, out, ParallelDims(data_shard=4), 3)
    pool.run(2, train_ranks, values, out, ParallelDims(data_shard=2), 3)
    train(values, out, World.single(), 2)
    pool.run(4, train_ranks, values, out, ParallelDims(data_replicate=2, data_shard=2), None)
    assert_same_run(out, expected)


def train_beside_a_save(values: Values, out: Path) -> None:
    """A step is trained while the checkpoint of the step before it is written; a new trainer resumes at the latter."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    from unmask.train.parallel.ranks import Ranks

    components = build_components(parse_recipe(values, "test"), Ranks(ParallelDims(data_shard=2), "cpu"))
    trainer, may_write, write = Trainer(components, out), threading.Event(), FileSystem.create_stream

    def later(*args: Any) -> Any:
        assert may_write.wait(20)
        return write(*args)

    trainer.train_step()
    before = [master.detach().clone() for master in trainer.optimizer.parameters]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystem, "create_stream", later)
        trainer.save()
        trainer.train_step()
        assert not list_checkpoints(out)
        may_write.set()
        trainer.checkpoints.wait()
    dist.barrier()
    resumed = Trainer(components, out)
    assert resumed.resume()
    assert resumed.step == 1
    assert all(torch.equal(new, old) for new, old in zip(resumed.optimizer.parameters, before, strict=True))


def test_training_goes_on_beside_a_save(pool: Pool, values: Values, tmp_path: Path) -> None:
    pool.run(2, train_beside_a_save, values, tmp_path / "run")


@pytest.mark.slow
def test_from_two_stages_to_one_process_to_stages_of_shards(pool: Pool, values: Values, expected: Path, tmp_path: Path) -> None:
    out, values = tmp_path / "run", {**values, "train": {**values["train"], "micro_rows": 1}}
    pool.run(2, train_ranks, values, out, ParallelDims(pipeline=2), 3)
    train(values, out, World.single(), 2)
    pool.run(4, train_ranks, values, out, ParallelDims(pipeline=2, data_shard=2), 2)
    pool.run(2, train_ranks, values, out, ParallelDims(pipeline=2, pipeline_schedule="zero_bubble"), None)
    assert_same_run(out, expected)


def test_a_disk_that_is_full_on_one_rank_stops_all(pool: Pool, values: Values, tmp_path: Path) -> None:
    out, dims = tmp_path / "run", ParallelDims(data_shard=2)
    pool.run(2, train_ranks, values, out, dims, 2)
    before = list_checkpoints(out)
    with pytest.raises(RanksFailed) as failed:
        pool.run(2, train_ranks, values, out, dims, 2, disk_full)
    assert failed.value.errors.keys() == {0, 1}
    for text in failed.value.errors.values():
        line = text.splitlines()[-1]
        assert line.startswith(f"unmask.errors.{TrainingError.__name__}")
        assert "rank 1" in line
        assert "No space left" in line
    assert list_checkpoints(out) == before
    assert [path.name for path in (out / "checkpoints").iterdir()] == [before[-1].name]


def train_into_a_bug(values: Values, out: Path) -> None:
    """The weight files of rank 1 meet an error that nobody has foreseen."""
    from unmask.train.parallel.ranks import Ranks

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no such layer")

    world = Ranks(ParallelDims(data_shard=2), "cpu")
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            patch.setattr("unmask.train.parallel.export.write_weights", broken)
        train(values, out, world, 1)


def test_an_unforeseen_error_on_one_rank_stops_all(pool: Pool, values: Values, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        pool.run(2, train_into_a_bug, values, tmp_path / "run")
    assert failed.value.errors.keys() == {0, 1}
    for text in failed.value.errors.values():
        line = text.splitlines()[-1]
        assert line.startswith(f"unmask.errors.{TrainingError.__name__}")
        assert "rank 1: ZeroDivisionError: no such layer" in line
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("damage", [b"", b"no pickle", b"\x80\x04cno.such\nmodule\n."])
def test_a_damaged_index_of_shards_is_one_line(tmp_path: Path, damage: bytes) -> None:
    from unmask.train.parallel.dcp import stored_shapes

    (tmp_path / ".metadata").write_bytes(damage)
    with refused(CheckpointError, tmp_path):
        stored_shapes(tmp_path)


def test_a_rank_killed_while_it_saves_leaves_the_checkpoint_before(
    pool: Pool, values: Values, expected: Path, tmp_path: Path
) -> None:
    out, dims = tmp_path / "run", ParallelDims(data_shard=2)
    pool.run(2, train_ranks, values, out, dims, 2)
    before = list_checkpoints(out)
    with pytest.raises(RanksFailed) as failed:
        pool.run(2, train_ranks, values, out, dims, 2, killed)
    assert "died" in failed.value.errors[1]
    assert list_checkpoints(out) == before
    assert train(values, out, World.single(), None)
    assert_same_run(out, expected)
