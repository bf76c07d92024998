"""`unmask pack`: from a recipe and from data, and the folder as `--data` of a run."""

from __future__ import annotations

from pathlib import Path

import yaml

from runs import tiny_jsonl, tiny_preferences, tiny_values
from unmask.cli.data_option import source_of
from unmask.data.packed import read_manifest
from unmask.train.pack import PROGRESS


def test_a_recipe_is_packed_for_its_tokens(run, fails, ar_folder: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "rows"
    recipe.write_text(yaml.safe_dump(tiny_values(ar_folder, tiny_jsonl(tmp_path / "data.jsonl"), tokens=500)))
    result = run("pack", recipe, "--out", out, "--nproc", 1)
    assert result.exit_code == 0, result.output
    assert f"--recipe {recipe}" in result.stdout
    assert f"--data {out}" in result.stdout
    manifest = read_manifest(out)
    assert 500 <= manifest.stats.packed_tokens < 500 + 4 * 64
    assert source_of(str(out)) == {"kind": "packed", "path": str(out)}
    fails("pack", recipe, "--out", out, names=(out, "packed"))
    fails("pack", recipe, "other.jsonl", "--out", tmp_path / "more", names=(recipe, "recipe"))
    assert run("convert", "--recipe", recipe, "--data", out, "--out", tmp_path / "run").exit_code == 0
    fails(
        "convert", "--recipe", recipe, "--data", out, "--set", "data.row_length=128", "--out", tmp_path / "x", names=(64, 128)
    )


def test_data_are_packed_once_for_a_verb(run, fails, diffusion_folder: Path, tmp_path: Path) -> None:
    data = [tiny_preferences(tmp_path / f"{name}.jsonl", count=6) for name in "ab"]
    options = ("--for", "dpo", "--model", diffusion_folder, "--set", "data.row_length=128", "--nproc", 1)
    result = run("pack", *data, "--out", tmp_path / "rows", *options)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "rows")
    assert manifest.group_size == 2
    assert manifest.stats.documents == 2 * (2 * 6) - 2 * (0 if manifest.validation is None else manifest.validation.rows // 2)
    assert "unmask dpo --model" in result.stdout
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / PROGRESS).write_text("{}")
    assert "--resume" in fails("pack", *data, "--out", tmp_path / "half", *options)
