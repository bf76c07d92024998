"""Every recipe of the repository carried out in miniature: a tiny model, tiny data, one step or two in each phase."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_dry_run(run, recipe: Path, ar_folder: Path, diffusion_folder: Path, answers: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text())
    kind = values.get("objective", {}).get("kind")
    verb, model, sizes = "sft", ar_folder if kind == "next_token" else diffusion_folder, [1]
    if schedule := values.get("schedule"):
        verb, model = "convert", ar_folder
        sizes = [phase["block_size"] for phase in schedule.get("warmup", [])]
        sizes += [None] * (schedule.get("stable", 0) > 0) + [phase["block_size"] for phase in schedule.get("decay", [])]
    elif kind != "next_token":
        sizes = [values["decode_block_size"]]
    length, rows = max(64, 2 * max(size for size in sizes if size is not None)), values["train"]["batch_rows"]
    sets = [
        f"data.row_length={length}",
        f"train.tokens={30 * length * rows}", "train.device=cpu", "train.compute_dtype=float32", "train.learning_rate=1e-4",
        "train.eval_every=100", "train.checkpoint_every=100",
    ]  # fmt: skip
    if kind == "draft":
        sets.append("shift=true")  # what goes on with a shifted model starts from an autoregressive one here
    for number, source in enumerate(values["data"]["sources"]):
        if source["kind"] != "reasoning_gym":
            assert source["kind"] == "jsonl", "give the dry run a tiny file of this kind"
            sets.append(f"data.sources.{number}.path={answers}")
    options = [word for value in sets for word in ("--set", value)]
    result = run(verb, "--recipe", recipe, "--model", model, "--out", tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(record["block_size"] for record in records if record["kind"] == "train")) == sizes
