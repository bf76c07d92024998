"""`unmask merge`: from folders and from a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from runs import tiny_folder, tiny_jsonl, tiny_recipe
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.loading import load_model
from unmask.train.merge import top_k
from unmask.train.run import run_recipe


@pytest.fixture
def sisters(ar_folder: Path, tmp_path: Path) -> list[Path]:
    """Three models of one shape: once, twice and six times the same weights."""
    import torch

    folders = []
    for factor in (1, 2, 6):
        model = load_model(ar_folder, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        folders.append(tmp_path / f"times{factor}")
        save_model(model, folders[-1])
    return folders


def test_folders_are_averaged(run, sisters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("merge", *sisters, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"model    {out}" in result.stdout
    once, merged = load_file(sisters[0] / "model.safetensors"), load_file(out / "model.safetensors")
    assert once.keys() == merged.keys()
    assert all(bool((merged[name] - 3 * once[name]).abs().max() < 1e-5) for name in once)


def test_what_a_fine_tuning_changed_is_added(run, fails, sisters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("merge", sisters[0], "--plus", sisters[2], "--minus", sisters[1], "--scale", 0.5, "--out", out)
    assert result.exit_code == 0, result.output
    assert "added    0.5 x" in result.stdout
    once, merged = load_file(sisters[0] / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(bool((merged[name] - 3 * once[name]).abs().max() < 1e-5) for name in once)
    assert "belong together" in fails("merge", sisters[0], "--plus", sisters[2], "--out", tmp_path / "more")
    fails("merge", *sisters[:2], "--plus", "a", "--minus", "b", "--out", tmp_path / "more", names=(2, "models"))
    assert "gone" in fails("merge", sisters[0], "--plus", "gone", "--minus", sisters[1], "--out", tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_best_of_a_run(run, fails, tmp_path: Path) -> None:
    folder, trained, out = tiny_folder(tmp_path / "model"), tmp_path / "run", tmp_path / "out"
    recipe = tiny_recipe(folder, tiny_jsonl(tmp_path / "data.jsonl"), eval_every=1, checkpoint_every=1, keep_checkpoints=9)
    run_recipe(recipe, trained)
    result = run("merge", "--run", trained, "--top-k", 2, "--out", out)
    assert result.exit_code == 0, result.output
    averaged = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("averaged")]
    assert averaged == [str(path) for path in top_k(trained, 2)]
    assert run("generate", "Hello", "-m", out, "--max-new-tokens", 4).exit_code == 0
    fails("merge", "--run", trained, "--top-k", 99, "--out", tmp_path / "more", names=[99])
    assert "top-k is 0" in fails("merge", "--run", trained, "--top-k", 0, "--out", tmp_path / "more")


@pytest.mark.parametrize(
    "arguments", [(), ("a", "--run", "b", "--top-k", 2), ("--run", "b"), ("a", "b", "--top-k", 2), ("--top-k", 2)]
)
def test_contradictions(fails, tmp_path: Path, arguments: tuple[object, ...]) -> None:
    assert "--run" in fails("merge", *arguments, "--out", tmp_path / "out")


def test_missing_folder(fails, sisters: list[Path], tmp_path: Path) -> None:
    assert "gone" in fails("merge", sisters[0], tmp_path / "gone", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_architecture(fails, sisters: list[Path], tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", family="qwen2")
    fails("merge", sisters[0], other, "--out", tmp_path / "out", names=["model.layers.0.self_attn.k_proj.bias"])
    assert not (tmp_path / "out").exists()


def test_out_in_use(fails, sisters: list[Path]) -> None:
    before = (sisters[2] / "model.safetensors").read_bytes()
    assert "not empty" in fails("merge", *sisters[:2], "--out", sisters[2])
    assert (sisters[2] / "model.safetensors").read_bytes() == before
