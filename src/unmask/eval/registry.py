"""Benchmark suites: what each benchmark is, which harness has it, what was published, and what can run on this machine.

Owns the bundled suites (`suites/*.yaml`), the plan of a run, and averages that compare only the same benchmarks. Runs nothing.
"""

from __future__ import annotations

import difflib
import importlib.resources
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unmask.errors import ConfigError
from unmask.eval.outside import LOCAL, Harness, Strict, Target
from unmask.eval.task import Dimension

Status = Literal["here", "outside", "not run"]
"""`here`: `unmask eval` runs it. `outside`: its own harness runs it against `unmask serve`. `not run`: nothing here can."""

DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)
_BUNDLED = {"llada2-47": "llada2.yaml"}
_OFFLINE_SETTINGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


class Implementation(Strict):
    """A harness's tasks that are one benchmark; `differs` is how they depart from what the report scored."""

    harness: str
    tasks: tuple[str, ...] = Field(min_length=1)
    data: Literal["bundled", "downloaded"] = "downloaded"
    runs_code: bool = False
    differs: str | None = None


class Benchmark(Strict):
    """A benchmark of a report; the suite's file says what each field means. Null says that it could not be established."""

    name: str
    dimension: Dimension
    metric: str
    shots: int | None
    size: int | None
    licence: str | None
    source: str | None
    harness: tuple[Implementation, ...]
    missing: str | None
    published: dict[str, float]

    @property
    def data(self) -> Literal["bundled", "downloaded"]:
        """Whether some harness's package carries the questions."""
        return "bundled" if any(entry.data == "bundled" for entry in self.harness) else "downloaded"

    @model_validator(mode="after")
    def _runnable_or_missing(self) -> Benchmark:
        if bool(self.harness) == bool(self.missing):
            raise ValueError(f"{self.name}: give either a harness or what is missing")
        return self


class Suite(Strict):
    """Benchmarks with the scores of published models (`models`: key -> label), in percent."""

    name: str
    title: str
    source: str
    protocol: str
    models: dict[str, str]
    harnesses: dict[str, Harness]
    benchmarks: tuple[Benchmark, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        names = [benchmark.name for benchmark in self.benchmarks]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"listed twice: {', '.join(repeated)}")
        for benchmark in self.benchmarks:
            if unknown := {entry.harness for entry in benchmark.harness} - self.harnesses.keys():
                raise ValueError(f"{benchmark.name}: harness {', '.join(sorted(unknown))} is not in `harnesses`")
            if benchmark.published.keys() != self.models.keys():
                raise ValueError(f"{benchmark.name}: the published scores are not those of `models`")
        return self

    def benchmark(self, name: str) -> Benchmark:
        """The benchmark of that name, in any case.

        Raises:
            ConfigError: there is none.
        """
        by_name = {benchmark.name.lower(): benchmark for benchmark in self.benchmarks}
        if name.lower() not in by_name:
            near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.4)
            hint = ", ".join(by_name[key].name for key in near) or "a name of `unmask eval --dry-run`"
            raise ConfigError(f"benchmark '{name}' is not in the suite {self.name}; try {hint}")
        return by_name[name.lower()]

    def of(self, dimension: Dimension | None) -> list[Benchmark]:
        """The benchmarks of a dimension; of all where None."""
        return [benchmark for benchmark in self.benchmarks if dimension in (None, benchmark.dimension)]

    def published_mean(self, model: str, dimension: Dimension | None = None) -> float:
        """Plain mean of a published model's scores, in percent, over the suite or over one dimension.

        Raises:
            ConfigError: the model is not in `models`, or the dimension has no benchmark.
        """
        if model not in self.models:
            raise ConfigError(f"model '{model}' has no published scores in {self.name}; it has {', '.join(self.models)}")
        scores = [benchmark.published[model] for benchmark in self.of(dimension)]
        if not scores:
            raise ConfigError(f"the suite {self.name} has no benchmark in '{dimension}'; choose another dimension")
        return math.fsum(scores) / len(scores)


def load_suite(name_or_path: str | Path) -> Suite:
    """A suite that comes with the package, by its name, or one from a YAML file.

    Raises:
        ConfigError: there is no such suite, or its file breaks a rule.
    """
    if (file := _BUNDLED.get(str(name_or_path))) is not None:
        text = (importlib.resources.files("unmask.eval") / "suites" / file).read_text(encoding="utf-8")
    else:
        try:
            text = Path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            remedy = f"use {', '.join(_BUNDLED)} or a YAML file"
            raise ConfigError(f"suite '{name_or_path}' is not bundled and no readable file; {remedy}") from error
    try:
        return Suite.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"suite {name_or_path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'suite'}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"suite {name_or_path}: {problems}") from error


@dataclass(frozen=True)
class Obstacle:
    """What keeps a harness from running a benchmark, and the command that changes it, where there is one.

    Attributes:
        problem: in words.
        remedy: what installs the harness.
        commands: what then evaluates the benchmark against `unmask serve`, where the harness does not run in our process.
        result: where the score stands then.
    """

    problem: str
    remedy: str | None = None
    commands: tuple[str, ...] = ()
    result: str | None = None


@dataclass(frozen=True)
class Planned:
    """What becomes of a benchmark on this machine.

    Attributes:
        benchmark: its name.
        dimension: where it counts.
        status: whether something here runs it.
        harness: what runs it; None where nothing does.
        version: of that harness, as installed.
        tasks: that harness's names of it.
        data: where the questions come from.
        runs_code: it executes what the model writes.
        differs: how that departs from what the report scored.
        obstacles: of each harness that cannot run it, best first; for one that no harness has, what is missing.
        commands: of `outside`: what evaluates it against `unmask serve`.
        result: of `outside`: where its score stands then.
    """

    benchmark: str
    dimension: Dimension
    status: Status
    harness: str | None
    version: str | None
    tasks: tuple[str, ...]
    data: str | None
    runs_code: bool
    differs: str | None
    obstacles: tuple[Obstacle, ...]
    commands: tuple[str, ...] = ()
    result: str | None = None

    @property
    def reason(self) -> str | None:
        """Why it is not run; None where it is."""
        return "; ".join(obstacle.problem for obstacle in self.obstacles) if self.status == "not run" else None


def plan(
    suite: Suite,
    *,
    harnesses_available: Mapping[str, str],
    network: bool,
    offline_tasks: Collection[str] = (),
    target: Target = LOCAL,
) -> list[Planned]:
    """What would run each benchmark here, or why nothing can.

    The first implementation that runs in this process is taken, else the first that runs outside it.

    Args:
        suite: the benchmarks.
        harnesses_available: harness -> version, from `find_harnesses`.
        network: whether data can be downloaded; `HF_HUB_OFFLINE` and `HF_DATASETS_OFFLINE` forbid it in any case.
        offline_tasks: tasks whose data need no download because they are here already.
        target: what the other harnesses' commands evaluate.
    """
    offline = _why_offline(network)
    return [_plan_one(suite, entry, harnesses_available, offline, offline_tasks, target) for entry in suite.benchmarks]


def _why_offline(network: bool) -> str | None:
    for name in _OFFLINE_SETTINGS:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    return None if network else "there is no network"


def _plan_one(
    suite: Suite,
    benchmark: Benchmark,
    available: Mapping[str, str],
    offline: str | None,
    offline_tasks: Collection[str],
    target: Target,
) -> Planned:
    obstacles = []
    usable = []
    for entry in benchmark.harness:
        harness = suite.harnesses[entry.harness]
        download = entry.data == "downloaded" and not set(entry.tasks) <= set(offline_tasks)
        blocked = f"downloads {benchmark.source or 'its data'}, but {offline}" if download and offline else None
        if harness.no_command:
            obstacles.append(Obstacle(f"{entry.harness} cannot ask unmask serve: {harness.no_command}"))
        elif entry.harness not in available:
            problem = f"{entry.harness} is not installed" + (f", and {blocked}" if blocked else "")
            obstacles.append(Obstacle(problem, harness.install, *harness.told(benchmark.name, entry.tasks, target)))
        elif blocked:
            obstacles.append(Obstacle(f"{entry.harness} {blocked}"))
        else:
            usable.append(entry)
    if not usable:
        obstacles = obstacles or [Obstacle(f"no harness has it; missing: {benchmark.missing}")]
        nothing = (None, None, (), None, False, None)
        return Planned(benchmark.name, benchmark.dimension, "not run", *nothing, tuple(obstacles))
    chosen = next((entry for entry in usable if suite.harnesses[entry.harness].is_here), usable[0])
    harness = suite.harnesses[chosen.harness]
    status: Status = "here" if harness.is_here else "outside"
    version = available[chosen.harness]
    if chosen.data == "bundled":
        data = f"in {chosen.harness} {version}"
    elif set(chosen.tasks) <= set(offline_tasks):
        data = "already here"
    else:
        data = f"downloaded: {benchmark.source or f'by {chosen.harness}'}"
    details = (chosen.harness, version, chosen.tasks, data, chosen.runs_code, chosen.differs)
    told = harness.told(benchmark.name, chosen.tasks, target)
    return Planned(benchmark.name, benchmark.dimension, status, *details, tuple(obstacles), *told)


def to_json(planned: Sequence[Planned]) -> dict[str, Any]:
    """The plan as JSON: how many benchmarks run where, and each with its reason."""
    counts = {status: sum(entry.status == status for entry in planned) for status in get_args(Status)}
    benchmarks = [{**asdict(entry), "reason": entry.reason} for entry in planned]
    return {"total": len(planned), "counts": counts, "benchmarks": benchmarks}


def render_plan(console: Console, planned: Sequence[Planned]) -> None:
    """Print the plan as a table, a section for each dimension, then what it takes to run more, and a line that sums it up."""
    table = Table("benchmark", "run", "with", "data, or why not")
    for dimension in DIMENSIONS:
        entries = [entry for entry in planned if entry.dimension == dimension]
        if not entries:
            continue
        running = sum(entry.status != "not run" for entry in entries)
        table.add_section()
        table.add_row(Text(f"{dimension}: {running} of {len(entries)}", style="bold"))
        for entry in entries:
            runner = f"{entry.harness}: {' '.join(entry.tasks)}" if entry.harness else ""
            about = f"{entry.data}; differs: {entry.differs}" if entry.differs else str(entry.data)
            about = entry.obstacles[0].problem if entry.status == "not run" else about
            style = "dim" if entry.status == "not run" else ""
            table.add_row(*(Text(cell, style=style) for cell in (entry.benchmark, entry.status, runner, about)))
    console.print(table)
    for line in _script(planned):
        console.print(Text(line, style="dim"), soft_wrap=True)
    counts = to_json(planned)["counts"]
    summary = (
        f"{counts['here']} of {len(planned)} run in unmask eval, {counts['outside']} in another harness against unmask serve"
    )
    console.print(Text(f"{summary}, {counts['not run']} are not run."))


def _script(planned: Sequence[Planned]) -> list[str]:
    """Shell lines for what does not run in our process: what installs each harness, once, and what evaluates each benchmark."""
    lines: list[str] = []
    for entry in planned:
        told: Planned | Obstacle = entry
        if entry.status == "not run":
            told = first = entry.obstacles[0]
            if first.remedy is not None and first.remedy not in lines:
                lines.append(first.remedy)
        if told.commands:
            lines += [f"# {entry.benchmark}: {told.result}", *told.commands]
    return lines


@dataclass(frozen=True)
class Part:
    """Averages over the benchmarks that were run, in percent.

    Attributes:
        run: how many were run.
        total: how many there are.
        mean: ours; None where none was run.
        published: published model -> its mean over the same benchmarks; empty where none was run.
    """

    run: int
    total: int
    mean: float | None
    published: dict[str, float]


@dataclass(frozen=True)
class Combined:
    """Averages over the suite and over each of its dimensions, and the benchmarks that count in none."""

    whole: Part
    dimensions: dict[Dimension, Part]
    not_run: tuple[str, ...]


def combine(results: Mapping[str, float], suite: Suite) -> Combined:
    """Mean of what was run, next to the published models' means over the same benchmarks.

    Args:
        results: benchmark -> score in percent, as the published ones are. One that was not run is absent: it is no zero.
        suite: with the published scores.

    Raises:
        ConfigError: a name is not in the suite, or a score is not in 0..100.
    """
    scores = {}
    for name, score in results.items():
        if not 0 <= score <= 100:
            raise ConfigError(f"score {score} of '{name}' is not a percentage; give 0 to 100, and leave out what was not run")
        scores[suite.benchmark(name).name] = score
    if len(scores) < len(results):
        raise ConfigError(f"the results name a benchmark twice ({', '.join(results)}); names are the same in any case")
    present = dict.fromkeys(benchmark.dimension for benchmark in suite.benchmarks)
    return Combined(
        whole=_part(scores, suite, suite.of(None)),
        dimensions={dimension: _part(scores, suite, suite.of(dimension)) for dimension in present},
        not_run=tuple(benchmark.name for benchmark in suite.benchmarks if benchmark.name not in scores),
    )


def _part(scores: Mapping[str, float], suite: Suite, benchmarks: Sequence[Benchmark]) -> Part:
    run = [benchmark for benchmark in benchmarks if benchmark.name in scores]
    if not run:
        return Part(0, len(benchmarks), None, {})
    published = {model: math.fsum(entry.published[model] for entry in run) / len(run) for model in suite.models}
    return Part(len(run), len(benchmarks), math.fsum(scores[entry.name] for entry in run) / len(run), published)
