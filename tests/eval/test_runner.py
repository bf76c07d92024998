"""Runs against a scripted model: scores, speeds, what is on disk, and going on after a kill."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedModel

from helpers import refused
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import CheckpointError, ConfigError
from unmask.eval.runner import EvalSettings, load_results, load_samples, request_of, run_tasks
from unmask.eval.task import Item, ItemScore, Split, Task


def items_of(split: Split, count: int) -> list[Item]:
    return [Item(f"sums/{split}/{i}", f"What is {i} + 3?", str(i + 3), max_new_tokens=20) for i in range(min(count, 50))]


def score(items: Sequence[Item], answers: Sequence[str]) -> list[ItemScore]:
    return [ItemScore(float(answer == item.target), answer) for item, answer in zip(items, answers, strict=True)]


SUMS = Task("sums", "math", "exact match", "1", "Apache-2.0", "ours", items_of, score, 50)


def answer(prompt: str) -> str:
    """Right for every number that is not a multiple of 4."""
    number = int(prompt.split("What is ")[1].split(" ")[0])
    return str(number + 3) if number % 4 else "no idea"


@pytest.fixture
def model(tmp_path: Path) -> ScriptedModel:
    return ScriptedModel(tmp_path / "model", answer)


def test_scores_and_speeds(model: ScriptedModel, tmp_path: Path) -> None:
    seen = []
    results = run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 40, on_progress=lambda *news: seen.append(news))
    summary = results["tasks"]["sums"]
    assert (summary["score"], summary["items"], summary["size"], summary["limited"]) == (0.75, 40, 50, True)
    assert summary["standard_error"] == pytest.approx(0.0693, abs=1e-3)
    samples = load_samples(tmp_path / "run")
    tokens, forwards = sum(s.tokens for s in samples), sum(s.forwards for s in samples)
    assert summary["speed"]["tokens_per_forward"] == pytest.approx(tokens / forwards)
    assert summary["speed"]["tokens_per_second"] == pytest.approx(tokens / (forwards / 100))
    assert [s.score for s in samples] == [float(i % 4 != 0) for i in range(40)]
    assert samples[0].answer == "no idea"
    assert seen[0] == ("sums", 0, 40)
    assert seen[-1] == ("sums", 40, 40)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["environment"]["packages"]["unmask"]
    assert len(results["model"]["weights"]) == 32
    assert (results["model"]["quantize"], results["model"]["dtype"]) == ("none", "float32")


def test_a_whole_split_is_not_limited(model: ScriptedModel, tmp_path: Path) -> None:
    summary = run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 60)["tasks"]["sums"]
    assert (summary["items"], summary["limited"]) == (50, False)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("system", [None, "Be short."])
def test_an_answer_goes_on_from_its_prefix(model: ScriptedModel, tmp_path: Path, raw: bool, system: str | None) -> None:
    def items(split: Split, count: int) -> list[Item]:
        begun = {"answer_prefix": "So it is ", "system": system, "raw": raw}
        return [replace(item, target=f"So it is {item.target}", **begun) for item in items_of(split, count)]

    task = replace(SUMS, items=items)
    assert run_tasks(model, [task], tmp_path / "run", count=lambda _: 8)["tasks"]["sums"]["score"] == 0.75
    assert all(prompt.endswith("So it is ") and prompt.count("So it is ") == 1 for prompt in model.asked)
    sample, text = load_samples(tmp_path / "run")[1], model.tokenizer
    assert sample.answer == "So it is 4"
    assert sample.tokens == len(text.encode("4"))
    plain = request_of(model, replace(items("test", 2)[1], answer_prefix=""), SamplingParams())
    begun = request_of(model, items("test", 2)[1], SamplingParams())
    assert begun.ids == (*plain.ids, *text.encode("So it is "))


@pytest.mark.parametrize("keep", [0.3, 0.55, 1.0])
def test_a_killed_run_goes_on(model: ScriptedModel, tmp_path: Path, keep: float) -> None:
    whole = run_tasks(model, [SUMS], tmp_path / "whole", count=lambda task: 40)
    path = tmp_path / "run" / "samples.jsonl"
    path.parent.mkdir()
    text = (tmp_path / "whole" / "samples.jsonl").read_bytes()
    path.write_bytes(text[: int(len(text) * keep)])
    asked = len(model.asked)
    again = run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 40, resume=True)
    assert {k: v for k, v in again.items() if k != "environment"} == {k: v for k, v in whole.items() if k != "environment"}
    done = text[: int(len(text) * keep)].count(b"\n") - (keep < 1.0)
    assert len(model.asked) - asked in (40 - done, 40 - done - 1, 40 - done + 1)
    assert load_samples(tmp_path / "run") == load_samples(tmp_path / "whole")


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_answers_hold_any_character(tmp_path: Path, cut: int) -> None:
    model = ScriptedModel(tmp_path / "model", lambda prompt: "one\u2028two\x85three ü")
    run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 4)
    path = tmp_path / "run" / "samples.jsonl"
    line = path.read_bytes().splitlines(keepends=True)[-1]
    inside = line.index("ü".encode()) + 1 if cut == 2 else len(line) - 3  # in the middle of a character, or of the line
    with path.open("ab") as file:
        file.write(line[: inside if cut else 0])
    samples = load_samples(tmp_path / "run")
    assert "\u2028" in samples[0].answer
    assert run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 4, resume=True)["tasks"]["sums"]["items"] == 4
    assert load_samples(tmp_path / "run") == samples


def test_a_full_disk_leaves_the_answers(model: ScriptedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 4)
    before = (tmp_path / "run" / "samples.jsonl").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, refused(CheckpointError, "space"):
        patch.setattr(os, "fsync", full)
        run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 8, resume=True)
    assert (tmp_path / "run" / "samples.jsonl").read_bytes() == before


def test_a_task_that_is_not_asked_again_keeps_its_version(model: ScriptedModel, tmp_path: Path) -> None:
    run_tasks(model, [SUMS], tmp_path, count=lambda task: 4)
    run_tasks(model, [replace(SUMS, name="more")], tmp_path, count=lambda task: 4, resume=True)
    with refused(ConfigError, "sums"):
        run_tasks(model, [replace(SUMS, version="2")], tmp_path, count=lambda task: 4, resume=True)


def test_what_is_there_is_not_overwritten(model: ScriptedModel, tmp_path: Path) -> None:
    run_tasks(model, [SUMS], tmp_path, count=lambda task: 4)
    with refused(ConfigError, "resume"):
        run_tasks(model, [SUMS], tmp_path, count=lambda task: 4)
    assert len(load_samples(tmp_path)) == 4


def test_more_items_and_tasks_may_join(model: ScriptedModel, tmp_path: Path) -> None:
    run_tasks(model, [SUMS], tmp_path, count=lambda task: 4)
    asked = len(model.asked)
    results = run_tasks(model, [SUMS, replace(SUMS, name="more")], tmp_path, count=lambda task: 8, resume=True)
    assert len(model.asked) - asked == 4 + 8
    assert {name: summary["items"] for name, summary in results["tasks"].items()} == {"sums": 8, "more": 8}


@pytest.mark.parametrize(
    ("settings", "task", "what"),
    [
        (EvalSettings(decoding=SamplingParams(threshold=0.5)), SUMS, "settings"),
        (EvalSettings(split="validation"), SUMS, "settings"),
        (EvalSettings(), replace(SUMS, version="2"), "tasks"),
    ],
)
def test_other_settings_are_another_run(
    model: ScriptedModel, tmp_path: Path, settings: EvalSettings, task: Task, what: str
) -> None:
    run_tasks(model, [SUMS], tmp_path, count=lambda task: 4)
    with refused(ConfigError, what):
        run_tasks(model, [task], tmp_path, count=lambda task: 4, settings=settings, resume=True)


def test_other_weights_are_another_run(model: ScriptedModel, tmp_path: Path) -> None:
    run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 4)
    model.transformer.embed.weight.data[0, 0] += 1
    with refused(ConfigError, "model"):
        run_tasks(model, [SUMS], tmp_path / "run", count=lambda task: 4, resume=True)


def test_a_damaged_run_is_told(model: ScriptedModel, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("not json\nnor this\n")
    with refused(ConfigError, "damaged"):
        run_tasks(model, [SUMS], tmp_path, count=lambda task: 4, resume=True)
    with refused(ConfigError, tmp_path / "nothing"):
        load_samples(tmp_path / "nothing")


@pytest.mark.parametrize("change", [5, {}, {"model": 5}, {"model": {"name": "a"}}, {"tasks": []}, {"environment": None}])
def test_damaged_results_are_told(model: ScriptedModel, tmp_path: Path, change: Any) -> None:
    results = run_tasks(model, [SUMS], tmp_path, count=lambda task: 4)
    assert load_results(tmp_path) == json.loads(json.dumps(results))
    (tmp_path / "results.json").write_text(json.dumps({**results, **change} if change and isinstance(change, dict) else change))
    with refused(ConfigError, tmp_path / "results.json", "damaged"):
        load_results(tmp_path)
