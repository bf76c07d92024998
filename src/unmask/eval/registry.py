"""Benchmark suites: the benchmarks of a report with its published scores, and means that compare only like with like.

Owns the bundled suites, which are data (`suites/*.yaml`; the file says what each field means). Runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unmask.errors import ConfigError
from unmask.eval.task import Dimension

BUNDLED = {"llada2-47": Path(__file__).parent / "suites" / "llada2.yaml"}


class Benchmark(BaseModel):
    """A benchmark of a report: what runs it here, what else has it, and its published scores in percent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dimension: Dimension
    metric: str
    shots: int | None = None
    size: int | None = None
    licence: str | None = None
    source: str | None = None
    tasks: tuple[str, ...] = ()
    counts: str | None = None
    in_percent: bool = False
    runs_code: bool = False
    differs: str | None = None
    elsewhere: str | None = None
    missing: str | None = None
    published: tuple[float, ...]

    @model_validator(mode="after")
    def _runnable_or_missing(self) -> Benchmark:
        if bool(self.tasks or self.elsewhere) == bool(self.missing):
            raise ValueError(f"{self.name}: give either tasks or elsewhere, or what is missing")
        return self


class Suite(BaseModel):
    """Benchmarks, and the models whose scores are published, in the order of each benchmark's `published`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    models: tuple[str, ...] = Field(min_length=1)
    benchmarks: tuple[Benchmark, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        names = [benchmark.name for benchmark in self.benchmarks]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"listed twice: {', '.join(repeated)}")
        for benchmark in self.benchmarks:
            if len(benchmark.published) != len(self.models):
                raise ValueError(
                    f"{benchmark.name}: published has {len(benchmark.published)} scores for {len(self.models)} models"
                )
        return self


def load_suite(name_or_path: str | Path) -> Suite:
    """A bundled suite by its name, or a suite from a YAML file.

    Raises:
        ConfigError: there is no such suite, or its file breaks a rule.
    """
    try:
        text = BUNDLED.get(str(name_or_path), Path(name_or_path)).read_text(encoding="utf-8")
        return Suite.model_validate(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"use {', '.join(BUNDLED)} or a YAML file"
        raise ConfigError(f"suite '{name_or_path}' is neither bundled nor a readable file; {remedy}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"suite {name_or_path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, problem['loc'])) or 'suite'}: {problem['msg']}" for problem in error.errors())
        raise ConfigError(f"suite {name_or_path}: {problems}") from error


@dataclass(frozen=True)
class SuiteMean:
    """Mean scores over the benchmarks that were run, in percent.

    Attributes:
        run: number of benchmarks that were run.
        total: number of benchmarks in the suite, or in the dimension.
        mean: of the given scores; None where none was run.
        published: model -> the mean of its published scores over the same benchmarks; empty where none was run.
    """

    run: int
    total: int
    mean: float | None
    published: dict[str, float]


def mean_scores(scores: Mapping[str, float], suite: Suite, dimension: Dimension | None = None) -> SuiteMean:
    """Mean of the scores, next to the published models' means over the same benchmarks.

    Args:
        scores: benchmark -> score in percent. A benchmark that was not run is absent: it does not count as zero.
        suite: with the published scores.
        dimension: only its benchmarks; all where None.

    Raises:
        ConfigError: a name is not in the suite, or a score is not in [0, 100].
    """
    if unknown := scores.keys() - {benchmark.name for benchmark in suite.benchmarks}:
        raise ConfigError(f"benchmark '{min(unknown)}' is not in the suite {suite.name}; use the names of its file")
    for name, score in scores.items():
        if not 0 <= score <= 100:
            raise ConfigError(f"score of '{name}' is {score}; it must be a percentage in [0, 100]")
    benchmarks = [benchmark for benchmark in suite.benchmarks if dimension in (None, benchmark.dimension)]
    run = [benchmark for benchmark in benchmarks if benchmark.name in scores]
    if not run:
        return SuiteMean(0, len(benchmarks), None, {})
    columns = zip(*(benchmark.published for benchmark in run), strict=True)
    published = {model: math.fsum(column) / len(run) for model, column in zip(suite.models, columns, strict=True)}
    return SuiteMean(len(run), len(benchmarks), math.fsum(scores[benchmark.name] for benchmark in run) / len(run), published)
