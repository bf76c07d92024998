"""Top-k merge: the exact mean, the right checkpoints, and refusal of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runs import tiny_folder
from unmask.errors import CheckpointError, ConfigError
from unmask.models.config import RopeConfig
from unmask.train.merge import merge_checkpoints, top_k


def variant(base: Path, folder: Path, shift: float) -> Path:
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + shift for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "base")


def test_mean_of_three(base: Path, tmp_path: Path) -> None:
    models = [variant(base, tmp_path / f"m{i}", shift) for i, shift in enumerate((0.0, 0.5, 2.5))]
    seen: list[tuple[int, int]] = []
    merged = merge_checkpoints(models, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    expected = load_file(base / "model.safetensors")
    result = load_file(merged / "model.safetensors")
    assert result.keys() == expected.keys()
    assert all(torch.allclose(result[name], expected[name] + 1.0, atol=1e-6) for name in expected)
    assert seen[-1] == (len(expected), len(expected))
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_bfloat16_is_averaged_in_float32(tmp_path: Path, base: Path) -> None:
    models = []
    for i, value in enumerate((1.0, 1.0078125, 1.0078125)):
        folder = variant(base, tmp_path / f"m{i}", 0.0)
        base_tensors = load_file(base / "model.safetensors")
        tensors = {name: torch.full_like(tensor, value, dtype=torch.bfloat16) for name, tensor in base_tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        models.append(folder)
    merged = load_file(merge_checkpoints(models, tmp_path / "out") / "model.safetensors")
    assert all((tensor.float() == 1.0078125).all() for tensor in merged.values())


def test_mismatches_are_refused(base: Path, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", rope=RopeConfig(theta=7.0))
    with pytest.raises(CheckpointError, match="another model"):
        merge_checkpoints([base, other], tmp_path / "out")
    smaller = variant(base, tmp_path / "smaller", 0.0)
    tensors = load_file(smaller / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, smaller / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        merge_checkpoints([base, smaller], tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_checkpoints([], tmp_path / "out")
    with pytest.raises(CheckpointError, match="not empty"):
        merge_checkpoints([base, base], base)
    assert not (tmp_path / "out").exists()


def checkpoint(run: Path, step: int, nelbo: float, block_size: int | None, scored_at: int | None = None) -> None:
    folder = run / "checkpoints" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    validation = {"nelbo": nelbo, "step": step if scored_at is None else scored_at, "block_size": block_size}
    (folder / "state.json").write_text(json.dumps({"step": step, "validation": validation}))


def test_top_k_takes_the_best_at_the_last_block_size(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, 0.5, 4)  # better, but at another block size
    checkpoint(tmp_path, 2, 3.0, 32)
    checkpoint(tmp_path, 3, 2.0, 32)
    checkpoint(tmp_path, 4, 1.0, 32, scored_at=3)  # not scored where it was saved
    checkpoint(tmp_path, 5, 2.5, 32)
    assert [path.parent.name for path in top_k(tmp_path, 2)] == ["step-0000003", "step-0000005"]
    with pytest.raises(CheckpointError, match="3 evaluated checkpoints"):
        top_k(tmp_path, 4)
    with pytest.raises(ConfigError):
        top_k(tmp_path, 0)
