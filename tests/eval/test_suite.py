"""The plan of a suite: what runs here, and the reason for everything that does not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedModel

from unmask.errors import ConfigError
from unmask.eval import suite as suites
from unmask.eval.registry import Suite, load_suite
from unmask.eval.runner import EvalSettings
from unmask.eval.suite import EvalRun, own_tasks, plan_suite


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package that an own task needs is there."""
    own = {name: replace(task, require=lambda: None) for name, task in own_tasks().items()}
    monkeypatch.setattr(suites, "own_tasks", lambda: own)


@pytest.mark.usefixtures("packages")
def test_what_has_tasks_runs_and_the_rest_has_a_reason() -> None:
    suite = load_suite("llada2-47")
    for benchmark, planned in zip(suite.benchmarks, plan_suite(suite), strict=True):
        assert (planned.benchmark, planned.dimension) == (benchmark.name, benchmark.dimension)
        assert (planned.reason is None) == bool(benchmark.tasks), benchmark.name
        if planned.reason is not None:
            assert str(benchmark.elsewhere or benchmark.missing) in planned.reason


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
def test_without_the_hub_only_own_tasks_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    plan = {planned.benchmark: planned.reason for planned in plan_suite(load_suite("llada2-47"))}
    assert [benchmark for benchmark, reason in plan.items() if reason is None] == [
        "HumanEval",
        "IFEval-strict-prompt",
        "BFCL v3",
    ]
    assert name in str(plan["GSM8K"])
    assert "hf:openai/gsm8k" in str(plan["GSM8K"])
    monkeypatch.setenv(name, "0")
    assert {planned.benchmark: planned.reason for planned in plan_suite(load_suite("llada2-47"))}["GSM8K"] is None


@pytest.mark.usefixtures("packages")
def test_without_lm_eval_its_tasks_say_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan = {planned.benchmark: planned.reason for planned in plan_suite(load_suite("llada2-47"))}
    assert "pip install 'unmask[eval]'" in str(plan["GSM8K"])
    assert plan["HumanEval"] is None


def test_an_own_task_without_its_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def require() -> None:
        raise ConfigError("needs the package some-package")

    own = {name: replace(task, require=require) for name, task in own_tasks().items()}
    monkeypatch.setattr(suites, "own_tasks", lambda: own)
    plan = {planned.benchmark: planned.reason for planned in plan_suite(load_suite("llada2-47"))}
    assert plan["BFCL v3"] == "needs the package some-package"


def test_code_runs_without_a_sandbox_only_where_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry: dict[str, Any] = {"name": "A", "dimension": "coding", "metric": "pass@1", "tasks": ["a"], "runs_code": True}
    suite = Suite.model_validate({"name": "small", "models": ["m"], "benchmarks": [{**entry, "published": [50.0]}]})
    ran = []

    def lm_eval(self: EvalRun, names: tuple[str, ...], folder: Path) -> dict[str, Any]:
        ran.append(names)
        return {"results": {"a": {"pass@1,none": 0.5}}, "n-samples": {"a": {"effective": 4}}}

    monkeypatch.setattr(EvalRun, "_lm_eval", lm_eval)
    model = ScriptedModel(tmp_path / "model", lambda prompt: "")
    run = EvalRun(model, tmp_path, lambda task: 1, None, EvalSettings(), {"allow_code": False}, resume=False)
    (result,) = run.suite(suite, lambda *_: None)["benchmarks"]
    assert (result["score"], ran) == (None, [])
    assert "allow_code" in result["reason"]
    allowed = replace(run, harness={"allow_code": True}).suite(suite, lambda *_: None)
    (result,) = allowed["benchmarks"]
    assert (result["score"], result["items"], result["metric"], result["reason"]) == (50.0, 4, "pass@1", None)
    assert allowed["mean"] == {"run": 1, "total": 1, "mean": 50.0, "published": {"m": 50.0}}


@pytest.mark.parametrize(
    ("task", "metrics", "score", "metric"),
    [
        ("SQuAD 2.0", {"exact,none": 50.0, "f1,none": 75.0}, 75.0, "f1"),
        ("DROP", {"em,none": 0.5, "f1,none": 0.75}, 75.0, "f1"),
        ("HellaSwag", {"acc,none": 0.5, "acc_norm,none": 0.75}, 75.0, "acc_norm"),
        ("GSM8K", {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.75}, 75.0, "exact_match"),
        ("PIQA", {"acc,none": 0.75, "acc_norm,none": 0.5}, 75.0, "acc"),
    ],
)
def test_the_score_is_by_the_metric_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, metrics: dict[str, float], score: float, metric: str
) -> None:
    whole = load_suite("llada2-47")
    suite = whole.model_copy(update={"benchmarks": tuple(each for each in whole.benchmarks if each.name == task)})
    (name,) = suite.benchmarks[0].tasks

    def lm_eval(self: EvalRun, names: tuple[str, ...], folder: Path) -> dict[str, Any]:
        return {"results": {name: {"alias": name, "sample_len": 4, **metrics}}, "n-samples": {name: {"effective": 4}}}

    monkeypatch.setattr(EvalRun, "_lm_eval", lm_eval)
    model = ScriptedModel(tmp_path / "model", lambda prompt: "")
    run = EvalRun(model, tmp_path, lambda task: 1, None, EvalSettings(), {}, resume=False)
    content = run.suite(suite, lambda *_: None)
    (result,) = content["benchmarks"]
    assert (result["score"], result["metric"], content["mean"]["mean"]) == (score, metric, score)
