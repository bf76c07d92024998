"""Every command, Python block and recipe of the training guides is run, in order, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from runs import tiny_preferences
from unmask.cli.training import default_recipe

DOCS = Path(__file__).parents[2] / "docs"
GUIDES = {"convert": "convert", "speed-up": "convert", "sft": "sft", "cap": "sft", "dpo": "dpo"}
"""Page -> the verb it is about."""
BLOCK = re.compile(
    r'^```(sh|python|yaml title="([^"]*)")\n(.*?)^```|`(unmask (?:merge|export) --?[^`]*|unmask \w+ [^`]*--resume)`',
    re.DOTALL | re.MULTILINE,
)
TINY = {
    "data.row_length": 64, "data.validation_share": 0.2, "data.validation_rows": 2, "train.tokens": 2400, "train.device": "cpu",
    "train.compute_dtype": "float32", "train.eval_every": 2, "train.checkpoint_every": 2,
}  # fmt: skip


def steps(page: str) -> Iterator[tuple[str, str]]:
    """What a page tells to do, in its order: ("sh", a command of ours), ("python", code) or (a file's name, its contents)."""
    quoted: dict[str, None] = {}
    for match in BLOCK.finditer((DOCS / f"{page}.md").read_text()):
        kind, name, body, command = match.groups()
        if command is not None:
            quoted[" ".join(command.split())] = None
        elif kind == "sh":
            yield from (("sh", line) for line in body.splitlines() if line.startswith("unmask "))
        else:
            yield (name or kind), body
    yield from (("sh", command) for command in quoted)


def shortened(words: list[str], models: dict[str, Path], done: set[Path]) -> list[str] | None:
    """A command on tiny models and few tokens; None where its output is there already."""
    words = [str(models.get(word, word)) for word in words]
    if words[0] in ("convert", "sft", "dpo") and "--resume" not in words:
        out = Path(words[words.index("--out") + 1])
        if out in done:
            return None
        done.add(out)
        if {"my.yaml", "joint.yaml"} & set(words):
            words += ["--model", str(models["smollm2-135m"])]
        words += [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    return words + (["--max-new-tokens", "8"] if words[0] == "generate" else [])


@pytest.mark.parametrize("page", GUIDES)
def test_steps_of_the_guide(
    run, page: str, ar_folder: Path, diffusion_folder: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("my.jsonl", "chats.jsonl"):
        Path(name).write_text(answers.read_text())
    Path("prompts.txt").write_text("".join(f"What is {i} + 3?\n" for i in range(40)))
    tiny_preferences(Path("preferences.jsonl"))
    recipe = yaml.safe_load(default_recipe("convert").read_text())
    recipe["data"]["sources"] = [{"kind": "jsonl", "path": "my.jsonl"}]
    Path("my.yaml").write_text(json.dumps(recipe))
    models = {"smollm2-135m": ar_folder} | dict.fromkeys(("smollm2-135m-diffusion", "smollm2-135m-converted"), diffusion_folder)
    verbs, done = set(), set[Path]()
    for kind, body in steps(page):
        if kind == "python":
            exec(compile(body, f"{page}.md", "exec"), {})
        elif kind != "sh":
            Path(kind).write_text(body)
        elif (words := shortened(shlex.split(body)[1:], models, done)) is not None:
            verbs.add(words[0])
            result = run(*words)
            assert result.exit_code == 0, (words, result.output, result.exception)
    assert GUIDES[page] in verbs


@pytest.mark.parametrize("verb", ["sft", "dpo"])
def test_stages_say_where_things_are_and_refuse_the_wrong_recipe(
    run, fails, verb: str, diffusion_folder: Path, ar_folder: Path, answers: Path, tmp_path: Path
) -> None:
    data = tiny_preferences(tmp_path / "pairs.jsonl") if verb == "dpo" else answers
    sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    lora = ["--set", "train.lora.rank=2", "--set", "train.freeze_embeddings=true"]
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
