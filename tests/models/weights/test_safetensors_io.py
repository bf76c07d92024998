"""Folders of safetensors: the index, streaming, and writes that survive a crash at any moment."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import disk_full, refused
from models.weights.saved import loads_as
from tiny import tiny_model
from unmask import files
from unmask.errors import CheckpointError, UnmaskWarning
from unmask.files import read_json
from unmask.models.weights import safetensors_io
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import copy_checkpoint, iter_tensors, tensor_index

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = 4000  # bytes a shard: many shards for the tiny models
FEW = 25_000  # a few of them


def test_shards_keep_their_limit_and_the_index_their_total(tmp_path: Path) -> None:
    save_model(tiny_model("llada2"), tmp_path, max_shard_bytes=SMALL)
    index = read_json(tmp_path / INDEX)
    sizes = {}
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        sizes[path.name] = sum(t.numel() * t.element_size() for t in tensors.values())
        assert sizes[path.name] <= SMALL or len(tensors) == 1
        assert {name for name, file in index["weight_map"].items() if file == path.name} == tensors.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    count = len(sizes)
    assert sorted(sizes) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def test_the_safetensors_library_reads_mixed_dtypes_of_odd_length(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5), "c": torch.randn(2, 2).double(), "d": torch.zeros(0)}
    specs = {name: safetensors_io.TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with (tmp_path / "f.safetensors").open("wb") as file:
        safetensors_io.write_safetensors(file, specs, list(specs), lambda name: tensors[name])
    back = load_file(tmp_path / "f.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_extra_files_are_copied_but_never_replace_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("tokens")
    (tmp_path / "config.json").write_text("not this")
    save_model(tiny_model("llama"), tmp_path / "m", extra_files=[tmp_path / "tokenizer.json", tmp_path / "config.json"])
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "tokens"
    assert read_model_config(tmp_path / "m").family == "llama"
    with refused(CheckpointError, "absent.json"):
        save_model(tiny_model("llama"), tmp_path / "n", extra_files=[tmp_path / "absent.json"])


@pytest.mark.parametrize("links", [True, False])
def test_a_copy_replaces_what_is_there_and_takes_no_room_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    model = tiny_model("llama")
    save_model(model, tmp_path / "saved", max_shard_bytes=SMALL)
    save_model(tiny_model("qwen3"), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for _ in range(2):
        copy_checkpoint(tmp_path / "saved", tmp_path / "out")
        assert loads_as(tmp_path / "out", model) == [True]
        shards = list((tmp_path / "saved").glob("*.safetensors"))
        assert all((tmp_path / "out" / shard.name).samefile(shard) == links for shard in shards)
        names = {path.name for path in (tmp_path / "saved").iterdir()} | {"notes.txt"}
        assert {path.name for path in (tmp_path / "out").iterdir()} == names
        assert not (tmp_path / "out" / "config.json").samefile(tmp_path / "saved" / "config.json")


def test_streaming_gives_every_tensor_once(tmp_path: Path) -> None:
    save_model(tiny_model("qwen3"), tmp_path, max_shard_bytes=SMALL)
    expected = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    streamed = list(iter_tensors(tmp_path))
    assert len(streamed) == len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed)


@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["empty", "in the length", "in the header", "one byte short"])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path, max_shard_bytes=SMALL)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with refused(CheckpointError, victim.name):
        load_model(tmp_path, dtype=torch.float32)


def test_a_garbage_header_is_named(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * (path.stat().st_size - 8))
    with refused(CheckpointError, "model.safetensors"):
        tensor_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda i: {"weight_map": {**i["weight_map"], "x": "gone.safetensors"}}, ("gone.safetensors",)),
        (lambda i: {"weight_map": {**i["weight_map"], "x": i["weight_map"]["lm_head.weight"]}}, ("x",)),
        (lambda i: {"weight_map": {"x": "../model.safetensors"}}, ("folder",)),
        (lambda i: {"weight_map": ["x"]}, ("'weight_map'",)),
        (lambda i: [], ("list",)),
    ],
    ids=["absent shard", "absent tensor", "outside", "no map", "no object"],
)
def test_a_wrong_index_is_named(change: Callable[[dict[str, Any]], Any], names: tuple[object, ...], tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path, max_shard_bytes=SMALL)
    (tmp_path / INDEX).write_text(json.dumps(change(read_json(tmp_path / INDEX))))
    with refused(CheckpointError, *names):
        load_model(tmp_path, dtype=torch.float32)


def test_the_index_decides_which_copy_of_a_tensor_is_read(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_model(model, tmp_path, max_shard_bytes=FEW)
    shards = sorted(tmp_path.glob("*.safetensors"))
    contents = [load_file(path) for path in shards]
    stale = {name: torch.full_like(tensor, 9.0) for tensors in contents for name, tensor in tensors.items()}
    for path, tensors in zip(shards, contents, strict=True):
        save_file({**stale, **tensors, "old.weight": torch.ones(3)}, path, {"format": "pt"})
    save_file(stale, tmp_path / "model-00009-of-00009.safetensors", {"format": "pt"})
    assert loads_as(tmp_path, model) == [True]
    assert set(tensor_index(tmp_path).values()) == set(shards)


def test_a_single_file_is_preferred_to_an_index_with_a_note(tmp_path: Path) -> None:
    old, model = tiny_model("llama"), tiny_model("llama", seed=1)
    save_model(model, tmp_path / "single")
    save_model(old, tmp_path / "both", max_shard_bytes=FEW)
    (tmp_path / "both" / SINGLE).write_bytes((tmp_path / "single" / SINGLE).read_bytes())
    with pytest.warns(UnmaskWarning, match=r"model\.safetensors"):
        assert loads_as(tmp_path / "both", model) == [True]


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)
    (tmp_path / SINGLE).unlink()
    with refused(CheckpointError, "model.safetensors"):
        load_model(tmp_path, dtype=torch.float32)
    (tmp_path / "pytorch_model.bin").touch()
    with refused(CheckpointError, "pytorch_model.bin"):
        load_model(tmp_path, dtype=torch.float32)
    with refused(CheckpointError, "nowhere"):
        tensor_index(tmp_path / "nowhere")


class Killed(BaseException):
    """Stands for the process ending right here."""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("old_bytes", [10**9, FEW], ids=["old single", "old sharded"])
@pytest.mark.parametrize("new_bytes", [10**9, FEW], ids=["new single", "new sharded"])
def test_a_full_disk_at_any_file_leaves_the_old_checkpoint(
    old_bytes: int, new_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    old, new = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    save_model(old, folder, max_shard_bytes=old_bytes)
    before = snapshot(folder)
    save_model(new, tmp_path / "new", max_shard_bytes=new_bytes)
    num_files = len(list((tmp_path / "new").iterdir()))
    real = files.write_synced
    left = 0

    def failing(path: Path, writer: Callable[..., None]) -> None:
        nonlocal left
        real(path, writer)
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1

    monkeypatch.setattr(files, "write_synced", failing)
    for number in range(num_files):
        left = number
        with refused(CheckpointError, folder, "space"):
            save_model(new, folder, max_shard_bytes=new_bytes)
        assert snapshot(folder) == before
    left = num_files
    save_model(new, folder, max_shard_bytes=new_bytes)
    assert loads_as(folder, new) == [True]


@pytest.mark.filterwarnings("ignore:.*holds both:unmask.errors.UnmaskWarning")
@pytest.mark.parametrize("old_bytes", [10**9, FEW], ids=["old single", "old sharded"])
@pytest.mark.parametrize("new_bytes", [10**9, FEW], ids=["new single", "new sharded"])
def test_a_kill_at_any_rename_leaves_all_old_or_all_new(
    old_bytes: int, new_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tiny_model("qwen3", seed=0), tiny_model("qwen3", seed=1)
    real_replace, real_unlink, calls = os.replace, Path.unlink, 0
    outcomes = []

    def counted(action: Callable[..., None]) -> Callable[..., None]:
        def act(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Killed
            action(*args, **kwargs)

        return act

    for allowed in range(80):
        folder = tmp_path / str(allowed)
        save_model(old, folder, max_shard_bytes=old_bytes)
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(real_replace))
            patch.setattr(Path, "unlink", counted(real_unlink))
            try:
                save_model(new, folder, max_shard_bytes=new_bytes)
                finished = True
            except Killed:
                finished = False
        outcomes.append(loads_as(folder, old, new))
        if finished:
            break
    assert all(sum(outcome) == 1 for outcome in outcomes)
    assert outcomes[0] == [True, False]
    assert outcomes[-1] == [False, True]
    save_model(old, folder, max_shard_bytes=old_bytes)
    assert loads_as(folder, old) == [True]


def test_replacing_removes_old_shards_and_keeps_other_files(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path, max_shard_bytes=FEW)
    (tmp_path / "model_card.safetensors").write_text("not a weight file of this checkpoint")
    (tmp_path / "notes.txt").write_text("kept")
    save_model(tiny_model("llama", seed=1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", SINGLE, "model_card.safetensors", "notes.txt",
    ]  # fmt: skip


def test_a_failed_save_of_a_new_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", disk_full)
    with refused(CheckpointError, "space"):
        save_model(tiny_model("llama"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
