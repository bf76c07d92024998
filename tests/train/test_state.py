"""Checkpoints on disk: what is listed is complete, whenever a run was killed or the power went."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from runs import tiny_folder
from tiny import tiny_model
from unmask.data.tokenizer import load_tokenizer
from unmask.train.state import TrainState, checkpoint_folder, list_checkpoints, prune_checkpoints, save_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "model")


def save(run: Path, base: Path, step: int) -> None:
    state = TrainState(step, 10 * step, {}, {}, "tokenizer")
    tensors = {"master.embed.weight": torch.ones(3, 2), "step.embed.weight": torch.tensor(float(step))}
    save_checkpoint(run, state, tensors, tiny_model("llama"), load_tokenizer(base))


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(tmp_path, base, step)
    whole = contents(checkpoint_folder(tmp_path, 3))

    def killed(path: Path, **options: object) -> None:
        next(file for file in Path(path).rglob("*.safetensors")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, 1)
    assert all(contents(path) == whole for path in list_checkpoints(tmp_path))
    save(tmp_path, base, 4)
    prune_checkpoints(tmp_path, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000004"]


def test_a_checkpoint_has_its_name_only_once_it_is_on_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[Path] = set()
    fsync, folder = os.fsync, tmp_path / "checkpoints"

    def record(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.add(path)
        fsync(descriptor)
        if path.is_relative_to(folder) and path != folder:
            assert not checkpoint_folder(tmp_path, 1).exists()

    monkeypatch.setattr(os, "fsync", record)
    save(tmp_path, base, 1)
    partial = folder / ".step-0000001.partial"
    assert {folder, partial, partial / "state.json", partial / "optimizer.safetensors"} <= synced
