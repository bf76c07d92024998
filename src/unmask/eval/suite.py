"""A whole evaluation: our own tasks, tasks of lm-eval, or a suite of both.

Owns what runs which task, and how the results come together. Imports lm-eval only where one of its tasks is run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError, UnmaskError
from unmask.eval.bfcl import bfcl_tasks
from unmask.eval.human_eval import HUMANEVAL, HUMANEVAL_BASE
from unmask.eval.ifeval import IFEVAL
from unmask.eval.mini5.tasks import agent_schema_task, mini5_tasks
from unmask.eval.registry import Benchmark, Suite, mean_scores
from unmask.eval.runner import EvalSettings, OnProgress, run_tasks
from unmask.eval.task import Dimension, Task
from unmask.files import atomic_write_json

_OFFLINE_SETTINGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


@cache
def own_tasks() -> Mapping[str, Task]:
    """Our own tasks by name; every other name is left to lm-eval."""
    tasks = (*mini5_tasks(), agent_schema_task(), HUMANEVAL, HUMANEVAL_BASE, IFEVAL, *bfcl_tasks())
    return {task.name: task for task in tasks}


@dataclass(frozen=True)
class Selection:
    """Our own tasks to run, and names of lm-eval's tasks."""

    own: tuple[Task, ...]
    harness: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkResult:
    """What becomes of a benchmark of a suite.

    Attributes:
        benchmark: its name.
        dimension: where it counts.
        tasks: what runs it.
        differs: how those depart from what the report scored.
        published: model -> published score in percent.
        reason: why it is not run; None where it is.
        score: in percent; None before and without a run.
        items: number of questions that were answered.
        metric: of lm-eval's score.
    """

    benchmark: str
    dimension: Dimension
    tasks: tuple[str, ...]
    differs: str | None
    published: dict[str, float]
    reason: str | None
    score: float | None = None
    items: int = 0
    metric: str | None = None


def plan_suite(suite: Suite) -> list[BenchmarkResult]:
    """Every benchmark of a suite with the tasks that would run it on this machine, or the reason why none can."""
    return [
        BenchmarkResult(
            benchmark=each.name,
            dimension=each.dimension,
            tasks=each.tasks,
            differs=each.differs,
            published=dict(zip(suite.models, each.published, strict=True)),
            reason=_obstacle(each),
        )
        for each in suite.benchmarks
    ]


def _obstacle(benchmark: Benchmark) -> str | None:
    """What keeps a benchmark from being run here."""
    if not benchmark.tasks:
        if benchmark.elsewhere is None:
            return f"no harness has it; missing: {benchmark.missing}"
        return f"needs another harness, against unmask serve: {benchmark.elsewhere}"
    own = own_tasks()
    if all(name in own for name in benchmark.tasks):
        try:
            for name in benchmark.tasks:
                own[name].require()
        except ConfigError as error:
            return str(error)
        return None
    if importlib.util.find_spec("lm_eval") is None:
        return "lm-eval is not installed; run: pip install 'unmask[eval]'"
    offline = [name for name in _OFFLINE_SETTINGS if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    return f"lm-eval downloads {benchmark.source}, but {offline[0]} is set" if offline else None


@dataclass(frozen=True)
class EvalRun:
    """One evaluation of one model.

    Attributes:
        model: with a tokenizer.
        folder: where everything is written.
        count: number of items to ask of an own task.
        limit: most items of a task of lm-eval; None: all.
        settings: of our own tasks.
        harness: options of `run_harness`.
        resume: continue the run in the folder.
    """

    model: LanguageModel
    folder: Path
    count: Callable[[Task], int]
    limit: int | None
    settings: EvalSettings
    harness: Mapping[str, Any]
    resume: bool

    def tasks(self, selection: Selection, on_progress: OnProgress) -> dict[str, Any]:
        """Run tasks; the content of `results.json`, with lm-eval's results under `harness`."""
        results: dict[str, Any] = {"tasks": {}}
        manager = _harness().check_names(selection.harness) if selection.own and selection.harness else None
        if selection.own:
            results = self._own(selection.own, self.folder, on_progress)
        if selection.harness:
            results["harness"] = self._lm_eval(selection.harness, self.folder, manager)
        return results

    def suite(self, suite: Suite, on_progress: OnProgress) -> dict[str, Any]:
        """Run what can be run of a suite; the content of `suite.json`: scores, reasons, and means beside the published ones."""
        results = []
        for planned, benchmark in zip(plan_suite(suite), suite.benchmarks, strict=True):
            result = planned
            if planned.reason is None:
                try:
                    result = self._benchmark(planned, benchmark, on_progress)
                except (UnmaskError, ImportError) as error:
                    result = replace(planned, reason=str(error))
            results.append(result)
        scores = {result.benchmark: result.score for result in results if result.score is not None}
        content = {
            "benchmarks": [asdict(result) for result in results],
            "mean": asdict(mean_scores(scores, suite)),
            "dimensions": {name: asdict(mean_scores(scores, suite, name)) for name in get_args(Dimension)},
            "limit": self.limit,
        }
        atomic_write_json(self.folder / "suite.json", content)
        return content

    def _benchmark(self, planned: BenchmarkResult, benchmark: Benchmark, on_progress: OnProgress) -> BenchmarkResult:
        """The result of a benchmark: the plain mean over its tasks."""
        folder = self.folder / planned.benchmark.lower().replace(" ", "-")
        own = own_tasks()
        if all(name in own for name in planned.tasks):
            tasks = self._own([own[name] for name in planned.tasks], folder, on_progress)["tasks"].values()
            scores = [task["score"] for task in tasks]
            return replace(planned, score=100 * sum(scores) / len(scores), items=sum(task["items"] for task in tasks))
        if benchmark.runs_code and not self.harness.get("allow_code"):
            raise ConfigError("lm-eval would run code that the model writes, without a sandbox; allow_code permits it")
        results = self._lm_eval(planned.tasks, folder)
        metrics = [_main_metric(results, name, benchmark) for name in planned.tasks]
        return replace(
            planned,
            score=100 * sum(value for value, _ in metrics) / len(metrics),
            items=sum(sample["effective"] for sample in results["n-samples"].values()),
            metric=", ".join(sorted({name for _, name in metrics})),
        )

    def _own(self, tasks: Sequence[Task], folder: Path, on_progress: OnProgress) -> dict[str, Any]:
        return run_tasks(
            self.model, tasks, folder, count=self.count, settings=self.settings, resume=self.resume, on_progress=on_progress
        )

    def _lm_eval(self, names: Sequence[str], folder: Path, manager: Any = None) -> dict[str, Any]:
        options = {**self.harness, "manager": manager}
        results: dict[str, Any] = _harness().run_harness(self.model, names, folder, limit=self.limit, **options)
        return results


def _harness() -> ModuleType:
    try:
        from unmask.eval import harness
    except ImportError as error:
        raise ConfigError(f"lm-eval is not installed ({error}); run: pip install 'unmask[eval]'") from error
    return harness


def _main_metric(results: Mapping[str, Any], task: str, benchmark: Benchmark) -> tuple[float, str]:
    """The share of 1 that lm-eval gives a task or group, by the metric that counts in the benchmark, and the metric's name."""
    metrics = {**results["results"].get(task, {}), **results.get("groups", {}).get(task, {})}
    for key, value in metrics.items():
        name = key.partition(",")[0]
        is_score = isinstance(value, int | float) and "_stderr" not in key and name not in ("sample_len", "bypass")
        if is_score and benchmark.counts in (None, key):
            return float(value) / (100 if benchmark.in_percent else 1), name
    wanted = "score" if benchmark.counts is None else benchmark.counts
    raise ConfigError(f"lm-eval gave no {wanted} for {task}; see harness.json")
