"""A whole evaluation: our own tasks, those of lm-eval, or a suite of both.

Owns how their results come together. Imports lm-eval only where one of its tasks is run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError, UnmaskError
from unmask.eval.bfcl import bfcl_tasks
from unmask.eval.human_eval import HUMANEVAL, HUMANEVAL_BASE
from unmask.eval.ifeval import IFEVAL
from unmask.eval.mini5.tasks import agent_schema_task, mini5_tasks
from unmask.eval.outside import LOCAL, Target, find_harnesses
from unmask.eval.registry import Planned, Suite, combine, plan
from unmask.eval.runner import OnProgress, Settings, run_tasks
from unmask.eval.task import Task
from unmask.files import atomic_write_json


@cache
def own_tasks() -> Mapping[str, Task]:
    """Every task of ours, which lm-eval has no part in running, by name."""
    found = (*mini5_tasks(), agent_schema_task(), HUMANEVAL, HUMANEVAL_BASE, IFEVAL, *bfcl_tasks())
    return {task.name: task for task in found}


class Chosen(Protocol):
    """Tasks of ours, and names for lm-eval."""

    @property
    def own(self) -> Sequence[Task]: ...
    @property
    def harness(self) -> Sequence[str]: ...


def plan_suite(suite: Suite, *, network: bool = True, target: Target = LOCAL) -> list[Planned]:
    """What would run each benchmark of a suite here; `target` is what the commands of other harnesses evaluate."""
    return plan(suite, harnesses_available=find_harnesses(suite.harnesses), network=network, target=target)


@dataclass(frozen=True)
class EvalRun:
    """One evaluation of one model.

    Attributes:
        model: with a tokenizer.
        folder: where everything is written.
        count: how many items of a task of ours.
        limit: how many items of a task of lm-eval; None: all.
        settings: of our own tasks.
        harness: options of `run_harness`.
        resume: go on with what is in the folder.
    """

    model: LanguageModel
    folder: Path
    count: Callable[[Task], int]
    limit: int | None
    settings: Settings
    harness: Mapping[str, Any]
    resume: bool

    def tasks(self, chosen: Chosen, on_progress: OnProgress) -> dict[str, Any]:
        """Run tasks; `results.json` of ours, with lm-eval's under `harness`."""
        results: dict[str, Any] = {"tasks": {}}
        if chosen.own:
            results = self._own(chosen.own, self.folder, on_progress)
        if chosen.harness:
            results["harness"] = self._lm_eval(chosen.harness, self.folder)
        return results

    def suite(self, suite: Suite, planned: Sequence[Planned], on_progress: OnProgress) -> dict[str, Any]:
        """Run what can be run of a suite here, and say of the rest why it was not; averages only like with like."""
        entries = []
        for each in planned:
            published = suite.benchmark(each.benchmark).published["llada2-mini"]
            entry = {**asdict(each), "published": published, "score": None, "items": "", "note": each.reason or ""}
            if each.status == "outside":
                entry["note"] = f"with unmask serve running: {' && '.join(each.commands)}; then {each.result}"
            elif each.status == "here":
                try:
                    entry |= self._benchmark(each, self.folder / each.benchmark.lower().replace(" ", "-"), on_progress)
                except (UnmaskError, ImportError) as error:
                    entry["note"] = str(error)
            entries.append(entry)
        found = {str(entry["benchmark"]): float(entry["score"]) for entry in entries if entry["score"] is not None}
        combined = combine(found, suite)
        results = {
            "benchmarks": entries,
            "mean": asdict(combined.whole),
            "dimensions": {name: asdict(part) for name, part in combined.dimensions.items()},
            "limit": self.limit,
        }
        told: dict[str, Any] = json.loads(json.dumps(results, default=str))
        atomic_write_json(self.folder / "suite.json", told)
        return told

    def _benchmark(self, each: Planned, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
        """Score in percent, how many items, and what to know about them."""
        notes = [f"differs: {each.differs}"] if each.differs else []
        own = own_tasks()
        if all(name in own for name in each.tasks):
            told = self._own([own[name] for name in each.tasks], folder, on_progress)["tasks"]
            scores = [task["score"] for task in told.values()]
            items = sum(task["items"] for task in told.values())
        else:
            if each.runs_code and not self.harness.get("allow_code"):
                raise ConfigError("it runs what the model writes, outside our sandbox; --allow-code permits that")
            told = self._lm_eval(each.tasks, folder)
            found = [_main_metric(told, name) for name in each.tasks]
            scores = [score for score, _ in found]
            notes.insert(0, f"metric {', '.join(sorted({metric for _, metric in found}))}")
            items = sum(sample["effective"] for sample in told["n-samples"].values())
        limited = "" if self.limit is None else f", --limit {self.limit}"
        return {"score": 100 * sum(scores) / len(scores), "items": f"{items}{limited}", "note": "; ".join(notes)}

    def _own(self, tasks: Sequence[Task], folder: Path, on_progress: OnProgress) -> dict[str, Any]:
        return run_tasks(
            self.model, tasks, folder, count=self.count, settings=self.settings, resume=self.resume, on_progress=on_progress
        )

    def _lm_eval(self, names: Sequence[str], folder: Path) -> dict[str, Any]:
        try:
            from unmask.eval.harness import run_harness
        except ImportError as error:
            raise ConfigError(f"lm-eval is not installed ({error}); run: pip install 'unmask[eval]'") from error
        return run_harness(self.model, names, folder, limit=self.limit, **self.harness)


def _main_metric(results: Mapping[str, Any], task: str) -> tuple[float, str]:
    """The first metric that lm-eval lists for a task or group, and its name."""
    listed = {**results["results"].get(task, {}), **results.get("groups", {}).get(task, {})}
    for name, value in listed.items():
        if isinstance(value, int | float) and "_stderr" not in name and name.partition(",")[0] not in ("sample_len", "bypass"):
            return float(value), name.partition(",")[0]
    raise ConfigError(f"lm-eval gave no score for {task}; see harness.json")
