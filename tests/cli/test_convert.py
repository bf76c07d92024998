"""`unmask convert`: options to recipe, progress, Ctrl-C and resume, a kill, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers import make_tokenizer
from tiny import tiny_model
from unmask.cli.training import default_recipe
from unmask.models.weights.checkpoint import save_model
from unmask.train.recipe import load_recipe

# The default recipe at the size of the tests' model: some sixteen steps in three phases and the whole-sequence one.
SMALL = (
    "train.tokens=4000", "data.row_length=64", "train.device=cpu", "train.compute_dtype=float32", "train.learning_rate=3e-3",
    "train.checkpoint_every=3", "train.eval_every=5", "data.validation_share=0.1",
)  # fmt: skip


def options(model: Path, data: object, out: Path, *more: str) -> list[str]:
    """Arguments of a small conversion."""
    sets = [word for value in (*SMALL, *more) for word in ("--set", value)]
    return ["convert", "--model", str(model), "--data", str(data), "--out", str(out), *sets]


@pytest.fixture
def arguments(ar_folder: Path, answers: Path, tmp_path: Path) -> list[str]:
    return options(ar_folder, answers, tmp_path / "run")


def steps(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "train"]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in steps(run)]


def test_converts_and_the_result_generates(run, fails, arguments: list[str], tmp_path: Path, real_plots) -> None:
    out = tmp_path / "run"
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert steps(out)[-1]["tokens"] >= 4000
    assert list(dict.fromkeys(record["block_size"] for record in steps(out))) == [4, 8, None, 32]
    assert (out / "loss.png").stat().st_size > 1000
    lines = result.stdout.splitlines()
    assert f"plot     {out / 'loss.png'}" in lines
    _check_plain_progress(lines)
    words = shlex.split(next(line for line in lines if line.startswith("try it")).removeprefix("try it"))
    assert words[:2] == ["unmask", "generate"]
    answer = run(*words[1:], "--max-new-tokens", 16, "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["completion_tokens"] > 0
    facts = json.loads(run("info", out, "--json").stdout)
    assert (facts["kind"], facts["block_size"]) == ("diffusion", 32)
    before = (out / "model.safetensors").read_bytes()
    assert "--resume" in fails(*arguments)
    assert (out / "model.safetensors").read_bytes() == before


def _check_plain_progress(lines: list[str]) -> None:
    assert "\x1b" not in "".join(lines)
    assert any(line.startswith("step ") and "validation NELBO" in line and "block 32" in line for line in lines)
    counts = [line for line in lines if " of 4,000 tokens: " in line]
    assert "warmup, block 4, loss " in counts[0]
    assert "decay, block 32, loss " in counts[-1]
    assert counts[-1].endswith("0:00 left")


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C during that step."""
    from unmask.train.loop import Trainer

    inner = Trainer.train_step

    def pressed(self: Trainer) -> dict[str, Any]:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self)

    monkeypatch.setattr(Trainer, "train_step", pressed)


def test_interrupt_saves_and_the_printed_command_resumes(run, arguments: list[str], tmp_path: Path, monkeypatch) -> None:
    whole, out, handler = tmp_path / "whole", tmp_path / "run", signal.getsignal(signal.SIGINT)
    assert run(*[str(whole) if word == str(out) else word for word in arguments]).exit_code == 0
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 7)
        result = run(*arguments)
    assert result.exit_code == 130
    assert steps(out)[-1]["step"] == 8
    assert not (out / "config.json").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    command = shlex.split(result.stderr.splitlines()[-1].removeprefix("resume with: "))
    assert command == ["unmask", "convert", "--out", str(out), "--resume"]
    assert run(*command[1:]).exit_code == 0
    assert losses(out) == losses(whole)
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)


def test_second_interrupt_gives_up_at_once(run, arguments: list[str], tmp_path: Path, monkeypatch) -> None:
    from unmask.train.loop import Trainer

    inner = Trainer.train_step

    def pressed_twice(self: Trainer) -> dict[str, Any]:
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self)

    monkeypatch.setattr(Trainer, "train_step", pressed_twice)
    result = run(*arguments)
    assert result.exit_code == 130
    assert steps(tmp_path / "run")[-1]["step"] == 7
    assert result.stderr.splitlines()[-1].startswith("resume with: unmask convert")


def test_resume_refuses_another_recipe(run, fails, arguments: list[str], monkeypatch) -> None:
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 4)
        run(*arguments)
    fails(*arguments, "--set", "train.learning_rate=1e-5", "--resume", code=1, names=("recipe", "train"))


def test_resume_alone_needs_a_checkpoint(fails, tmp_path: Path) -> None:
    fails("convert", "--out", tmp_path / "none", "--resume", names=[tmp_path / "none", "checkpoint"])


def test_resume_with_options_starts_a_run_that_never_saved(run, arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, "--set", "train.tokens=600", "--resume").exit_code == 0
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_sigkill_resume_equals_an_uninterrupted_run(run, arguments: list[str], tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    longer = [*arguments, "--set", "train.tokens=30000"]
    command = [sys.executable, "-c", "from unmask.cli.main import main; main()", *longer]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("checkpoints/step-*/state.json"))) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, "the run was to be killed before its end"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (out / "config.json").exists()
    assert run(*longer, "--resume").exit_code == 0
    assert run(*[str(whole) if word == str(out) else word for word in longer]).exit_code == 0
    assert losses(out) == losses(whole)
    assert run("generate", "Hello", "--model", out, "--max-new-tokens", 8).exit_code == 0


def test_recipe_file_and_dedicated_options(run, arguments: list[str], ar_folder: Path, answers: Path, tmp_path: Path) -> None:
    """--model and --data replace what the file says; --set has the last word."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        default_recipe("convert").read_text().replace("smollm2-135m", "nope").replace("[]", "[{kind: text, path: nope}]")
    )
    assert run(*arguments, "--recipe", recipe, "--set", "decode_block_size=16", "--set", "train.tokens=600").exit_code == 0
    state = json.loads(max(tmp_path.glob("run/checkpoints/*/state.json")).read_text())["recipe"]
    assert (state["model"], state["decode_block_size"]) == (str(ar_folder), 16)
    assert [(source["kind"], source["path"]) for source in state["data"]["sources"]] == [("jsonl", str(answers))]


def test_default_recipe_is_warmup_stable_decay() -> None:
    source = 'data.sources=[{"kind": "text", "path": "x.txt"}]'
    phases = load_recipe(default_recipe("convert"), [source]).blocks.phases
    assert [(phase.name, phase.block_size) for phase in phases] == [
        ("warmup", 4), ("warmup", 8), ("stable", None), ("decay", 32),
    ]  # fmt: skip


def test_generated_data(run, ar_folder: Path, tmp_path: Path) -> None:
    assert run(*options(ar_folder, "reasoning_gym:chain_sum", tmp_path / "run", "train.tokens=600")).exit_code == 0


def test_no_data(fails, tmp_path: Path) -> None:
    assert "--data" in fails("convert", "--out", tmp_path / "run", "--model", "smollm2-135m")


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("data.row_length=100", "row length 100"),
        ("train.tokenz=5", "train.tokenz"),
        ("train.tokens=0", "train.tokens"),
        ("train.tokens=-5", "train.tokens"),
        ("train.learning_rate=-1", "train.learning_rate"),
        ("train.batch_rows=0", "train.batch_rows"),
        ("train.tokens", "section.key=value"),
        ("schedule.decay.0.share=-1", "share"),
        ("train.device=gpu", "train.device"),
        ("mask_token=<|im_end|>", "mask token"),
        ("data.sources.0.families={}", "families"),
        ("model=nope", "'nope'"),
    ],
)
def test_bad_recipes(fails, arguments: list[str], tmp_path: Path, override: str, name: str) -> None:
    fails(*arguments, "--set", override, names=[name])
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("", "answers.jsonl"),
        ("\n\n", "answers.jsonl"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": \n', "answers.jsonl line 2"),
        ('{"prompt": "a", "response": "b"}\n[1]\n', "answers.jsonl line 2"),
        ('{"question": "a"}\n', "answers.jsonl line 1"),
        ('{"text": 5}\n', "answers.jsonl line 1"),
    ],
)
def test_bad_data(fails, arguments: list[str], answers: Path, content: str, name: str) -> None:
    answers.write_text(content)
    fails(*arguments, names=[name])


def test_missing_data_file(fails, ar_folder: Path, tmp_path: Path) -> None:
    assert "gone.jsonl" in fails(*options(ar_folder, tmp_path / "gone.jsonl", tmp_path / "run"))


def test_missing_recipe(fails, tmp_path: Path) -> None:
    fails("convert", "--recipe", tmp_path / "gone.yaml", "--out", tmp_path / "run", names=["gone.yaml"])


@pytest.mark.parametrize("place", ["models.weights.safetensors_io", "train.state"])
def test_disk_full_while_saving(fails, arguments: list[str], tmp_path: Path, monkeypatch, place: str) -> None:
    """A checkpoint that does not fit, model or optimiser, leaves no trace of itself and the earlier ones as they were."""
    module = import_module(f"unmask.{place}")
    inner, calls = module.write_safetensors, list[int]()

    def full(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return inner(*given, **named)

    monkeypatch.setattr(module, "write_safetensors", full)
    fails(*arguments, code=1, names=["space"])
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(left) == 2
    assert all(name.startswith("step-") for name in left)
    monkeypatch.setattr(module, "write_safetensors", inner)


def test_out_that_cannot_be_a_folder(fails, ar_folder: Path, answers: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    fails(*options(ar_folder, answers, tmp_path / "file" / "run"), names=["file/run"])
    assert (tmp_path / "file").read_text() == "mine"


def test_model_that_needs_a_new_token_for_its_mask(run, answers: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "full", tmp_path / "run"
    tokenizer = make_tokenizer(folder, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    rows = tokenizer.vocab_size
    save_model(tiny_model("llama", vocab_size=rows, max_positions=256, tied_head=True), folder)
    result = run(*options(folder, answers, out, "train.tokens=600"))
    assert result.exit_code == 0, result.output
    config = json.loads((out / "config.json").read_text())
    assert (config["mask_token_id"], config["vocab_size"]) == (rows, rows + 1)
    assert run("generate", "Hello", "-m", out, "--max-new-tokens", 8).exit_code == 0
