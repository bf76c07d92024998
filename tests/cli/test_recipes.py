"""Every recipe of the repository carried out in miniature: a tiny model, tiny data, two steps or three in each phase."""

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
    shares = []
    if schedule := values.get("schedule"):
        verb, model = "convert", ar_folder
        sizes = [phase["block_size"] for phase in schedule.get("warmup", [])]
        sizes += [None] * (schedule.get("stable", 0) > 0) + [phase["block_size"] for phase in schedule.get("decay", [])]
        shares = [f"schedule.{name}.{i}.share=1" for name in ("warmup", "decay") for i in range(len(schedule.get(name, [])))]
        shares += ["schedule.stable=1"] * (None in sizes)
    elif kind != "next_token":
        sizes = [values["decode_block_size"]]
    length, train = max(64, 2 * max(size for size in sizes if size is not None)), values["train"]
    rows, pieces = 4 if kind == "joint" else 2, 2 if train["micro_rows"] < train["batch_rows"] else 1
    sets = [
        *shares, f"data.row_length={length}", f"train.batch_rows={rows}", f"train.micro_rows={rows // pieces}",
        f"train.tokens={2 * len(sizes) * length * rows}", "train.device=cpu", "train.compute_dtype=float32",
        "train.learning_rate=1e-4", "train.eval_every=100", "train.checkpoint_every=100",
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
