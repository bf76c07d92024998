"""Packed rows: what a run on the data themselves reads, whatever the processes and interruptions; other recipes are refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import disk_full, refused
from runs import tiny_folder, tiny_jsonl, tiny_preferences, tiny_recipe, tiny_values
from unmask.data.packed import MANIFEST, PackedFolder, RowFile, read_manifest
from unmask.data.packing import PackedRows, RowStream
from unmask.data.tokenizer import load_tokenizer
from unmask.errors import CheckpointError, ConfigError, DataError
from unmask.lock import locked
from unmask.models.weights.checkpoint import read_model_config
from unmask.train.metrics import read_metrics
from unmask.train.pack import PROGRESS, pack_recipe
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.rows import open_stream, training_rows, validation_rows
from unmask.train.run import run_recipe
from unmask.train.tokens import training_config


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_folder(folder / "model")
    tiny_jsonl(folder / "data.jsonl")
    tiny_preferences(folder / "pairs.jsonl")
    return folder


@pytest.fixture(scope="module")
def recipe(base: Path) -> Recipe:
    return tiny_recipe(base / "model", base / "data.jsonl")


@pytest.fixture(scope="module")
def packed(base: Path, recipe: Recipe) -> Path:
    pack_recipe(recipe, base / "packed")
    return base / "packed"


def with_data(recipe: Recipe, **data: Any) -> Recipe:
    values = recipe.model_dump(mode="json")
    values["data"] |= data
    return parse_recipe(values, "test")


def on_packed(recipe: Recipe, folder: Path, **data: Any) -> Recipe:
    return with_data(recipe, sources=[{"kind": "packed", "path": str(folder)}], **data)


def dpo_recipe(base: Path) -> Recipe:
    values = tiny_values(base / "model", base / "pairs.jsonl")
    values["data"] |= {"overlong": "truncate", "validation_share": 0.2}
    return parse_recipe(values | {"objective": {"kind": "preference"}}, "test")


def rows_of(recipe: Recipe) -> tuple[RowStream, PackedRows | None]:
    tokenizer = load_tokenizer(Path(recipe.model))
    training_config(read_model_config(Path(recipe.model)), tokenizer, recipe)
    return training_rows(recipe, tokenizer), validation_rows(recipe, tokenizer)


def same(left: PackedRows | None, right: PackedRows | None) -> bool:
    assert left is not None
    assert right is not None
    return all(torch.equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(PackedRows))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def losses(run: Path) -> list[tuple[str, float]]:
    return [(r["kind"], r["loss"] if r["kind"] == "train" else r["nelbo"]) for r in read_metrics(run / "metrics.jsonl")]


def test_rows_are_those_of_the_data_and_so_are_the_losses(recipe: Recipe, packed: Path, tmp_path: Path) -> None:
    assert not (packed / PROGRESS).exists()
    (theirs, their_held_out), (ours, our_held_out) = rows_of(recipe), rows_of(on_packed(recipe, packed))
    assert same(our_held_out, their_held_out)
    for _ in range(3):
        assert same(ours.next_rows(4), theirs.next_rows(4))
        assert ours.batch_tokens == theirs.batch_tokens
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": 700})})
    assert run_recipe(short, tmp_path / "data").finished
    assert run_recipe(on_packed(short, packed), tmp_path / "packed").finished
    assert losses(tmp_path / "data") == losses(tmp_path / "packed")


def test_pairs_stay_together_and_are_those_of_the_data(base: Path, tmp_path: Path) -> None:
    recipe = dpo_recipe(base)
    manifest = pack_recipe(recipe, tmp_path / "pairs", epochs=1)
    (theirs, their_held_out), (ours, our_held_out) = rows_of(recipe), rows_of(on_packed(recipe, tmp_path / "pairs"))
    assert same(our_held_out, their_held_out)
    assert same(ours.next_rows(manifest.num_rows), theirs.next_rows(manifest.num_rows))
    again = ours.next_rows(manifest.num_rows)
    assert torch.equal(again.ordinal_RL[::2, 0], again.ordinal_RL[1::2, 0])


def test_parts_of_batches_are_the_rows_of_whole_ones(recipe: Recipe, packed: Path) -> None:
    whole, halves = (PackedFolder(packed, seed=0) for _ in range(2))
    state = halves.state_dict()
    for _ in range(40):  # several passes
        rows, first = whole.next_rows(4), halves.next_rows(4, slice(0, 2))
        assert same(rows.rows(0, 2), first)
        assert whole.batch_tokens == halves.batch_tokens == rows.num_tokens
    resumed = PackedFolder(packed, seed=0)
    resumed.load_state_dict(whole.state_dict())
    assert same(resumed.next_rows(4, slice(1, None, 2)), PackedFolderFrom(halves).next_rows(4, slice(1, None, 2)))
    halves.load_state_dict(state)
    assert same(halves.next_rows(4), PackedFolder(packed, seed=0).next_rows(4))


def PackedFolderFrom(other: PackedFolder) -> PackedFolder:
    """A folder that goes on where another is."""
    copy = PackedFolder(other.folder, seed=0)
    copy.load_state_dict(other.state_dict())
    return copy


def test_only_the_rows_of_a_part_are_read(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = RowFile.row
    monkeypatch.setattr(RowFile, "row", lambda self, number: read.append(number) or whole(self, number))
    folder = PackedFolder(packed, seed=0)
    folder.next_rows(4, slice(2, 4))
    folder.next_rows(4, slice(0, 2))
    assert read == [2, 3, 4, 5]


def test_a_later_pass_has_the_same_documents_in_another_order_under_other_noise(recipe: Recipe, packed: Path) -> None:
    folder = PackedFolder(packed, seed=0)
    passes = [folder.next_rows(folder.manifest.num_rows) for _ in range(3)]
    keys = [set(zip(rows.epoch_RL.flatten().tolist(), rows.ordinal_RL.flatten().tolist(), strict=True)) for rows in passes]
    assert keys[0] & keys[1] <= {(0, 0)}
    assert keys[1] & keys[2] <= {(0, 0)}
    contents = [sorted(rows.tokens_RL.tolist()) for rows in passes]
    assert contents[0] == contents[1] == contents[2]
    assert passes[1].tokens_RL.tolist() != passes[2].tokens_RL.tolist()


def test_files_do_not_depend_on_processes_or_interruptions(base: Path, recipe: Recipe, tmp_path: Path) -> None:
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": 20_000})})
    options: dict[str, Any] = {"file_bytes": 1}
    pack_recipe(longer, tmp_path / "whole", **options)
    pack_recipe(longer, tmp_path / "parallel", nproc=2, **options)
    assert contents(tmp_path / "whole") == contents(tmp_path / "parallel")

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int | None) -> None:
        assert total == 20_000
        if done > 17_000:
            raise StoppedError

    with pytest.raises(StoppedError):
        pack_recipe(longer, tmp_path / "resumed", on_progress=stop, **options)
    assert not (tmp_path / "resumed" / MANIFEST).exists()
    with refused(DataError, "manifest.json"):
        read_manifest(tmp_path / "resumed")
    with refused(ConfigError, "unfinished"):
        pack_recipe(longer, tmp_path / "resumed", **options)
    with refused(ConfigError, "row_length"):
        pack_recipe(with_data(longer, row_length=128), tmp_path / "resumed", resume=True, **options)
    pack_recipe(longer, tmp_path / "resumed", resume=True, **options)
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")
    assert pack_recipe(longer, tmp_path / "resumed", resume=True) == read_manifest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"row_length": 128}, ("row_length", 64, 128)),
        ({"overlong": "drop"}, ("overlong", "split", "drop")),
        ({"validation_share": 0.3}, ("validation_share", 0.1, 0.3)),
        ({"validation_rows": 9}, ("validation_rows", 2, 9)),
    ],
)
def test_other_settings_are_refused(recipe: Recipe, packed: Path, changes: dict[str, Any], names: tuple[object, ...]) -> None:
    with refused(ConfigError, *names):
        rows_of(on_packed(recipe, packed, **changes))


def test_another_tokenizer_or_kind_of_training_is_refused(base: Path, recipe: Recipe, packed: Path, tmp_path: Path) -> None:
    with refused(ConfigError, "preference", "pairs"):
        rows_of(on_packed(dpo_recipe(base), packed))
    shutil.copytree(base / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with refused(ConfigError, "tokenizer", "template"):
        rows_of(on_packed(recipe.model_copy(update={"model": str(tmp_path / "model")}), packed))
    with refused(ConfigError, "packed", "sources"):
        with_data(recipe, sources=[{"kind": "packed", "path": str(packed)}, {"kind": "text", "path": "a"}])
    with refused(ConfigError, "supervise", "packed"):
        with_data(recipe, sources=[{"kind": "packed", "path": str(packed), "supervise": "all"}])
    with refused(ConfigError, "packed"):
        pack_recipe(on_packed(recipe, packed), tmp_path / "again")


def test_damaged_folders_are_refused(recipe: Recipe, packed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(packed, tmp_path / "copy")
    rows = copy / "rows-00000.arrow"
    rows.write_bytes(rows.read_bytes()[:-100])
    with refused(DataError, "rows-00000.arrow"):
        rows_of(on_packed(recipe, copy))
    (copy / MANIFEST).write_text("{}")
    with refused(DataError, "manifest.json"):
        rows_of(on_packed(recipe, copy))


def test_a_full_disk_ends_the_job_in_a_resumable_state(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("unmask.train.pack.record_batch", disk_full)
        with refused(CheckpointError, "space"):
            pack_recipe(recipe, tmp_path / "rows")
    assert {path.name for path in (tmp_path / "rows").iterdir()} == {PROGRESS, ".lock"}
    pack_recipe(recipe, tmp_path / "rows", resume=True)


def test_data_that_end_with_a_file_end_the_job(base: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "' + "one two " * 50 + '"}\n' + '{"text": "' + "three " * 90 + '"}\n')
    values = tiny_values(base / "model", tmp_path / "data.jsonl")
    values["data"] |= {"validation_rows": 0, "overlong": "truncate"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmask.train.pack.BATCH_ROWS", 2)
        manifest = pack_recipe(parse_recipe(values, "test"), tmp_path / "rows", epochs=2, file_bytes=1)
    assert [file.rows for file in manifest.files] == [2, 2]


def test_one_pass_has_every_document_once_wherever_it_ends(base: Path) -> None:
    """The last documents of a pass may be held out: the first of the next pass does not take their place."""
    values = tiny_values(base / "model", base / "data.jsonl")
    tokenizer = load_tokenizer(base / "model")
    for seed in range(6):
        chosen = with_data(parse_recipe(values | {"train": values["train"] | {"seed": seed}}, "test"), validation_share=0.3)
        trained, kept = (
            [sample.document for sample in open_stream(chosen, tokenizer, held_out=side, epochs=1)] for side in (False, True)
        )
        assert len(trained) + len(kept) == len((base / "data.jsonl").read_text().splitlines())


def test_a_used_folder_is_refused(recipe: Recipe, packed: Path, tmp_path: Path) -> None:
    with refused(ConfigError, "packed"):
        pack_recipe(recipe, packed)
    (tmp_path / "mine.txt").write_text("mine")
    with refused(ConfigError, "empty"):
        pack_recipe(recipe, tmp_path)
    with refused(ConfigError, "file"):
        pack_recipe(recipe, tmp_path / "mine.txt")
    with locked(packed), refused(ConfigError, "another job", packed):
        pack_recipe(recipe, packed, resume=True)


@pytest.mark.slow
def test_a_killed_job_goes_on(base: Path, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"tokens": 40_000})}).model_dump_json()
    )
    program = (
        "import sys; from pathlib import Path; from unmask.train.pack import pack_recipe; "
        "from unmask.train.recipe import load_recipe\n"
        "if __name__ == '__main__': pack_recipe(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), nproc=2, file_bytes=1, "
        "resume=True)"
    )
    (tmp_path / "program.py").write_text(program)

    def start(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, tmp_path / "program.py", tmp_path / "recipe.yaml", tmp_path / out])

    assert start("whole").wait(300) == 0
    process = start("killed")
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "killed" / "rows-00000.arrow").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed" / MANIFEST).exists()
    assert start("killed").wait(300) == 0
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")
