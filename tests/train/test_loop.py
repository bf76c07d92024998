"""The loop: resume in any phase, gradients however the batch is split, failures that lose nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask
from helpers import disk_full, refused
from runs import tiny_recipe
from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.errors import ConfigError, DataError, TrainingError, UnmaskNote
from unmask.train.loop import Trainer, accumulate, evaluate
from unmask.train.metrics import plot_run, read_metrics
from unmask.train.objectives.base import Figure, LossTerm, MicroBatch, Objective, Output, Setting
from unmask.train.recipe import Recipe
from unmask.train.run import build_components, run_recipe
from unmask.train.sections import LoraSection
from unmask.train.state import list_checkpoints


def losses(run: Path) -> dict[int, tuple[float, int | None]]:
    return {r["step"]: (r["loss"], r["block_size"]) for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"}


@pytest.fixture(scope="module")
def uninterrupted(base: Path) -> Path:
    result = run_recipe(tiny_recipe(base / "model", base / "data.jsonl"), base / "whole")
    assert result.finished
    return base / "whole"


def test_a_run_visits_every_phase_and_learns(uninterrupted: Path) -> None:
    seen = losses(uninterrupted)
    assert list(dict.fromkeys(size for _, size in seen.values())) == [1, 4, None, 16, 8]
    at_last_size = [loss for loss, size in seen.values() if size == 8]
    assert min(at_last_size) < seen[1][0] - 1.0
    phases = {r["block_size"] for r in read_metrics(uninterrupted / "metrics.jsonl") if r["kind"] == "validation"}
    assert phases == {1, 4, None, 16, 8}


def test_phases_shorter_than_a_step_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.warns(UnmaskNote) as noted:
        run_recipe(tiny_recipe(base / "model", base / "data.jsonl", tokens=300), tmp_path / "short")
    texts = [str(each.message) for each in noted]
    skipped = {None, 1, 4, 8, 16} - {size for _, size in losses(tmp_path / "short").values()}
    assert skipped
    for size in skipped:
        place = "whole sequence" if size is None else f"block size {size},"
        assert any(place in text and "skipped" in text for text in texts), size


def test_the_model_it_leaves_generates(uninterrupted: Path) -> None:
    model = unmask.load(uninterrupted, dtype="float32")
    assert model.is_diffusion
    assert model.config.block_size == 8
    generation = model.generate("say 3", max_new_tokens=8)
    assert generation.completion_tokens <= 8
    assert model.config.mask_id not in generation.ids


def test_a_run_is_plotted(uninterrupted: Path, tmp_path: Path) -> None:
    assert plot_run(tmp_path) is None
    assert plot_run(uninterrupted) == uninterrupted / "loss.png"
    assert (uninterrupted / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stop_after", [1, 7, 11, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 9))])
def test_resume_in_any_phase_gives_the_same_losses(
    recipe: Recipe, uninterrupted: Path, tmp_path: Path, stop_after: int
) -> None:
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps >= stop_after

    first = run_recipe(recipe, tmp_path / "run", should_stop=stop)
    assert not first.finished
    assert first.steps == stop_after
    assert run_recipe(recipe, tmp_path / "run", resume=True).finished
    assert losses(tmp_path / "run") == losses(uninterrupted)
    whole, resumed = (unmask.load(path, dtype="float32").transformer.state_dict() for path in (uninterrupted, tmp_path / "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from runs import tiny_recipe
from unmask.train.run import run_recipe

base, run, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
recipe = tiny_recipe(base / "model", base / "data.jsonl")

def on_record(record):
    if record["step"] == step:
        os.kill(os.getpid(), signal.SIGKILL)

run_recipe(recipe, run, resume=True, on_record=on_record)
"""


@pytest.mark.parametrize("kill_at", [5, pytest.param(11, marks=pytest.mark.slow)])
def test_resume_after_sigkill_gives_the_same_losses(
    base: Path, recipe: Recipe, uninterrupted: Path, tmp_path: Path, kill_at: int
) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", KILLED, str(base), str(tmp_path / "run"), str(kill_at)]
    process = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert losses(tmp_path / "run").keys() >= {kill_at}
    assert run_recipe(recipe, tmp_path / "run", resume=True).finished
    assert losses(tmp_path / "run") == losses(uninterrupted)


def test_a_half_written_checkpoint_is_ignored(recipe: Recipe, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path / "run", should_stop=lambda: True)
    broken = tmp_path / "run" / "checkpoints" / ".step-0000002.partial"
    broken.mkdir()
    (broken / "optimizer.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-0000001"]


def gradients(recipe: Recipe, rows: PackedRows, micro_rows: int, block_size: int | None) -> dict[str, torch.Tensor]:
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_rows": micro_rows})})
    parts = build_components(changed)
    accumulate(parts.objective, rows, Phase("decay", block_size, 1), 0)
    return {name: p.grad for name, p in parts.model.named_parameters() if p.grad is not None}


class LengthBatch(MicroBatch):
    """Loss: the sum of a weight over the rows, per token; `counts` are refused where one forward pass tells them."""

    def __init__(self, weight: torch.nn.Parameter, rows: PackedRows, is_single: bool) -> None:
        self._weight, self._rows, self._is_single = weight, rows, is_single

    def counts(self) -> tuple[float, ...]:
        assert not self._is_single
        return (self._rows.num_tokens, 0)

    def forward(self) -> Output:
        terms = LossTerm(self._weight * self._rows.num_rows, self._rows.num_tokens), LossTerm(self._weight * 0, 0)
        return Output(terms, {"length": Figure(self._rows.num_tokens, self._rows.num_rows)})


class LengthObjective(Objective):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.weight = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def prepare(self, rows: PackedRows, phase: Phase, step: int) -> MicroBatch:
        return LengthBatch(self.weight, rows, self.setting.train.micro_rows == 4)

    def evaluate(self, rows: PackedRows, phase: Phase) -> dict[str, Figure]:
        return {"nelbo": Figure(rows.num_tokens, rows.num_rows)}


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_losses_and_figures_are_divided_once_by_the_counts_of_the_global_batch(recipe: Recipe, micro_rows: int) -> None:
    components = build_components(recipe)
    rows, train = components.packer.next_rows(4), recipe.train.model_copy(update={"micro_rows": micro_rows})
    objective = LengthObjective(replace(components.objective.setting, train=train))
    figures = accumulate(objective, rows, Phase("decay", 8, 1), 0)
    assert figures == pytest.approx({"loss": 8 / rows.num_tokens, "length": rows.num_tokens / 4})
    assert float(objective.weight.grad) == pytest.approx(4 / rows.num_tokens)  # type: ignore[arg-type]
    assert evaluate(objective, rows, Phase("decay", 8, 1)) == {"nelbo": rows.num_tokens / 4}


@pytest.mark.parametrize("block_size", [1, 8, None])
def test_gradients_do_not_depend_on_the_micro_batch_split(recipe: Recipe, block_size: int | None) -> None:
    rows = build_components(recipe).packer.next_rows(4)
    whole = gradients(recipe, rows, 4, block_size)
    for micro_rows in (1, 2):
        split = gradients(recipe, rows, micro_rows, block_size)
        for name, gradient in whole.items():
            assert torch.allclose(gradient, split[name], rtol=1e-3, atol=1e-6 + 1e-4 * float(gradient.abs().max())), name


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_backends_train_alike(recipe: Recipe, uninterrupted: Path, tmp_path: Path, backend: str) -> None:
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"attention": backend})})
    run_recipe(changed, tmp_path / "run", should_stop=lambda: True)
    assert losses(tmp_path / "run")[1][0] == pytest.approx(losses(uninterrupted)[1][0], rel=1e-4)


def test_activation_checkpointing_changes_nothing(recipe: Recipe, uninterrupted: Path, tmp_path: Path) -> None:
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"activation_checkpointing": True})})
    stops = iter([False, False, True])
    run_recipe(changed, tmp_path / "run", should_stop=lambda: next(stops))
    expected = losses(uninterrupted)
    for step, (loss, _) in losses(tmp_path / "run").items():
        assert loss == pytest.approx(expected[step][0], rel=1e-4)


def test_lora_trains_few_parameters_and_saves_a_plain_model(base: Path, recipe: Recipe, tmp_path: Path) -> None:
    lora = {"lora": LoraSection(rank=2)}
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update=lora)})
    parts = build_components(changed)
    trainable = {name for name, p in parts.model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name == "embed.weight" for name in trainable)
    assert any(".lora_" in name for name in trainable)
    stops = iter([False] * 5 + [True])
    run_recipe(changed, tmp_path / "run", should_stop=lambda: next(stops))
    assert run_recipe(changed, tmp_path / "run", resume=True).finished
    folders = (tmp_path / "run", base / "model")
    tuned, original = (unmask.load(folder, dtype="float32").transformer.state_dict() for folder in folders)
    assert tuned.keys() == original.keys()
    assert not torch.equal(tuned["blocks.0.attention.qkv.weight"], original["blocks.0.attention.qkv.weight"])
    assert torch.equal(tuned["blocks.0.mlp_norm.weight"], original["blocks.0.mlp_norm.weight"])


def test_lora_resumes_exactly(recipe: Recipe, tmp_path: Path) -> None:
    lora = {"lora": LoraSection(rank=2)}
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update=lora)})
    run_recipe(changed, tmp_path / "whole")
    stops = iter([False] * 6 + [True])
    run_recipe(changed, tmp_path / "parts", should_stop=lambda: next(stops))
    run_recipe(changed, tmp_path / "parts", resume=True)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_non_finite_loss_stops_with_step_phase_and_state(recipe: Recipe, tmp_path: Path) -> None:
    parts = build_components(recipe)
    trainer = Trainer(parts, tmp_path / "run")
    calls = 0

    def poison(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls > 4 else output

    parts.model.norm.register_forward_hook(poison)
    with refused(TrainingError, "nan", "step 3", "phase warmup", "block size 1", "step-0000002"):
        trainer.fit()
    assert list_checkpoints(tmp_path / "run")[-1].name == "step-0000002"
    assert run_recipe(recipe, tmp_path / "run", resume=True).finished


def test_a_run_of_before_an_option_existed_resumes_with_its_default(recipe: Recipe, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path / "run", should_stop=lambda: True)
    path = list_checkpoints(tmp_path / "run")[-1] / "state.json"
    state = json.loads(path.read_text())
    del state["recipe"]["objective"]["mask_samples"]
    path.write_text(json.dumps(state))
    assert run_recipe(recipe, tmp_path / "run", resume=True).finished


def test_resume_with_another_recipe_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run_recipe(recipe, tmp_path / "run", should_stop=lambda: True)
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": 1e-5})})
    with refused(TrainingError, "train.learning_rate"):
        run_recipe(changed, tmp_path / "run", resume=True)
    with refused(ConfigError, "run"):
        run_recipe(recipe, tmp_path / "run")


def test_resume_on_edited_data_is_refused(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text((base / "data.jsonl").read_text())
    recipe = tiny_recipe(base / "model", data)
    run_recipe(recipe, tmp_path / "run", should_stop=lambda: True)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(reversed(lines)))
    with refused(DataError, data, "content"):
        run_recipe(recipe, tmp_path / "run", resume=True)


def test_resume_with_another_tokenizer_is_refused(base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base / "model", tmp_path / "model")
    recipe = tiny_recipe(model, base / "data.jsonl")
    run_recipe(recipe, tmp_path / "run", should_stop=lambda: True)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("user", "USER") + " ")
    with refused(TrainingError, model, "template"):
        run_recipe(recipe, tmp_path / "run", resume=True)


def test_full_disk_keeps_the_last_checkpoint(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_recipe(recipe, tmp_path / "run", should_stop=lambda: True)
    monkeypatch.setattr("unmask.train.state.write_safetensors", disk_full)
    with refused(TrainingError, "space"):
        run_recipe(recipe, tmp_path / "run", resume=True)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000001"]
    assert run_recipe(recipe, tmp_path / "run", resume=True).finished


def test_a_state_that_is_on_disk_is_not_replaced(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a step that is not finite right behind a checkpoint: killed then, the run would have lost it."""
    run_recipe(recipe, tmp_path / "run", should_stop=lambda: True)
    trainer = Trainer(build_components(recipe), tmp_path / "run")
    assert trainer.resume()
    monkeypatch.setattr("unmask.train.state.write_safetensors", disk_full)
    assert [trainer.save()] == list_checkpoints(tmp_path / "run")


def test_mask_token_in_the_data_is_refused(base: Path, tmp_path: Path) -> None:
    parts = build_components(tiny_recipe(base / "model", base / "data.jsonl"))
    word = unmask.load(base / "model").tokenizer
    assert word is not None
    assert parts.objective.setting.mask_id in word.added_tokens
    recipe = tiny_recipe(base / "model", base / "data.jsonl")
    with refused(DataError, "data.jsonl"):
        run_recipe(recipe.model_copy(update={"mask_token": "<|im_start|>"}), tmp_path / "run")


def test_appended_mask_token_grows_the_model(base: Path, recipe: Recipe, tmp_path: Path) -> None:
    rows = unmask.load(base / "model").config.vocab_size
    changed = recipe.model_copy(update={"mask_token": "<|brand new|>"})
    run_recipe(changed, tmp_path / "run", should_stop=lambda: True)
    model = unmask.load(tmp_path / "run" / "checkpoints" / "step-0000001" / "model", dtype="float32")
    assert model.config.mask_id == rows
    assert model.config.vocab_size == rows + 1
    assert model.tokenizer is not None
    assert model.tokenizer.mask_id == rows


def test_a_word_of_the_vocabulary_keeps_its_id_as_mask_token(recipe: Recipe) -> None:
    parts = build_components(recipe.model_copy(update={"mask_token": "<repo_name>"}))
    tokenizer = unmask.load(recipe.model).tokenizer
    assert tokenizer is not None
    assert parts.objective.setting.mask_id == tokenizer.special_tokens["<repo_name>"]
    assert parts.model.config.vocab_size == tokenizer.vocab_size
