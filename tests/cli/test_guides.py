"""Every command of the training guides is run, in order, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from runs import tiny_preferences
from unmask.cli.training import default_recipe

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = ("convert", "sft", "cap", "dpo")
SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
TINY = {
    "data.row_length": 64, "data.validation_share": 0.2, "data.validation_rows": 2, "train.tokens": 3000, "train.device": "cpu",
    "train.compute_dtype": "float32", "train.eval_every": 2, "train.checkpoint_every": 2,
}  # fmt: skip


def commands(page: str) -> list[list[str]]:
    """The `unmask` commands of a page's shell blocks, and those quoted in its text."""
    text = (DOCS / f"{page}.md").read_text()
    lines = [line for block in SHELL.findall(text) for line in block.splitlines() if line.startswith("unmask ")]
    quoted = re.findall(r"`(unmask (?:merge|export) --?[^`]*|unmask \w+ [^`]*--resume)`", text)
    return [shlex.split(line)[1:] for line in [*lines, *(" ".join(command.split()) for command in quoted)]]


@pytest.mark.parametrize("page", GUIDES)
def test_commands_of_the_guide(
    run, page: str, ar_folder: Path, diffusion_folder: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.jsonl", "chats.jsonl"):
        Path(name).write_text(answers.read_text())
    tiny_preferences(Path("preferences.jsonl"))
    recipe = yaml.safe_load(default_recipe("convert").read_text())
    recipe["data"]["sources"] = [{"kind": "jsonl", "path": "my.jsonl"}]
    Path("my.yaml").write_text(json.dumps(recipe))
    models = {"smollm2-135m": ar_folder} | dict.fromkeys(("smollm2-135m-diffusion", "smollm2-135m-converted"), diffusion_folder)
    found = commands(page)
    assert {"convert": "convert", "cap": "sft"}.get(page, page) in {words[0] for words in found}
    done: set[Path] = set()
    for words in found:
        words = [str(models.get(word, word)) for word in words]
        if words[0] in ("convert", "sft", "dpo") and "--resume" not in words:
            out = Path(words[words.index("--out") + 1])
            if out in done:
                continue
            done.add(out)
            if "my.yaml" in words:
                words += ["--model", str(ar_folder)]
            words += [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
        if words[0] == "generate":
            words += ["--max-new-tokens", "8"]
        result = run(*words)
        assert result.exit_code == 0, (words, result.output, result.exception)


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_stages_say_where_things_are_and_refuse_the_wrong_recipe(
    run, fails, verb: str, diffusion_folder: Path, ar_folder: Path, answers: Path, tmp_path: Path
) -> None:
    data = tiny_preferences(tmp_path / "pairs.jsonl") if verb == "dpo" else answers
    sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    lora = ["--set", "train.lora={rank: 2, train_embedding: false}"]
    out = tmp_path / "run"
    common = [verb, "--data", data, *sets, *lora, "--out"]
    result = run(*common, out, "--model", diffusion_folder)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert f"adapter  {out / 'adapter'}" in lines
    assert f"model    {out}" in lines
    assert any(line.startswith("documents: ") for line in lines)
    assert "convert it first" in fails(*common, tmp_path / "ar", "--model", ar_folder)
    wrong = "has a schedule of block sizes, which makes it one for unmask convert"
    assert wrong in fails(*common, tmp_path / "x", "--recipe", default_recipe("convert"))
    other = {"sft": "dpo", "dpo": "sft"}[verb]
    assert f"not unmask {verb}" in fails(*common, tmp_path / "x", "--recipe", default_recipe(other))
    assert f"not unmask {other}" in fails(other, "--out", out, "--resume")


def test_dpo_needs_pairs(fails, diffusion_folder: Path, answers: Path, tmp_path: Path) -> None:
    error = fails("dpo", "--model", diffusion_folder, "--data", answers, "--out", tmp_path / "run")
    assert "line 1" in error
    assert "chosen" in error
