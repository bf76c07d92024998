"""Two runs of the same tasks, item by item: whose answers are better, by how much, and how sure that is.

Owns the paired statistics. Knows samples only; reports are `report`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.errors import ConfigError
from unmask.eval.runner import Sample

RESAMPLES = 10_000
LEVEL = 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds that hold it in 95 of 100 resamples."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One task, or all of them together.

    Attributes:
        items: answered by both.
        a, b: mean scores.
        difference: b - a, with its paired bootstrap interval.
        only_a, only_b: items that only one of them has right (a score of 1 against less).
        p_value: McNemar's exact test of those two counts being alike; 1 where there are none.
        speed: tokens/s of b over those of a.
        forwards: tokens per forward of b over those of a.
    """

    items: int
    a: float
    b: float
    difference: Interval
    only_a: int
    only_b: int
    p_value: float
    speed: Interval
    forwards: Interval


def compare_samples(a: Sequence[Sample], b: Sequence[Sample], *, seed: int = 0) -> dict[str, Comparison]:
    """Every task that both have answered, and `all`: the mean of the tasks' scores, resampled within each task.

    Raises:
        ConfigError: no item in common, or one with another prompt or target.
    """
    mine, other = ({(s.task, s.id): s for s in samples} for samples in (a, b))
    shared = sorted(mine.keys() & other.keys())
    if not shared:
        raise ConfigError("the two runs have no item in common; run the same tasks on both")
    for key in shared:
        if (mine[key].prompt, mine[key].target) != (other[key].prompt, other[key].target):
            raise ConfigError(
                f"item {key[1]} of {key[0]} differs between the two runs; run the same version of the task on both"
            )
    by_task: dict[str, list[tuple[Sample, Sample]]] = {}
    for key in shared:
        by_task.setdefault(key[0], []).append((mine[key], other[key]))
    found = {task: _compare([pairs], seed) for task, pairs in by_task.items()}
    return {**found, "all": _compare(list(by_task.values()), seed)}


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of two counts of discordant pairs."""
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(comb(total, k) for k in range(fewer + 1)) / 2**total
    return float(min(1.0, 2 * tail))


def to_json(found: Mapping[str, Comparison]) -> dict[str, Any]:
    """For machines."""
    return {task: asdict(each) for task, each in found.items()}


def _compare(groups: Sequence[Sequence[tuple[Sample, Sample]]], seed: int) -> Comparison:
    """Groups are tasks: each counts alike in the scores, whatever its number of items; speeds are sums over everything."""
    drawn = np.random.default_rng(seed)
    tables = [np.array([_row(a, b) for a, b in pairs], dtype=np.float64) for pairs in groups]
    # Every resample draws items within each task, both runs' answers to one item staying together.
    resampled = [_sums(table, drawn.integers(len(table), size=(RESAMPLES, len(table)))) for table in tables]
    scores = np.mean([sums[:, :2] / len(table) for sums, table in zip(resampled, tables, strict=True)], axis=0)
    costs = np.sum([sums[:, 2:] for sums in resampled], axis=0)
    total = np.sum([table[:, 2:].sum(axis=0) for table in tables], axis=0)
    a, b = (float(np.mean([table[:, side].mean() for table in tables])) for side in (0, 1))
    flat = [pair for pairs in groups for pair in pairs]
    only_a, only_b = (
        sum(first.score >= 1 > second.score for first, second in ordered)
        for ordered in (flat, [(second, first) for first, second in flat])
    )
    return Comparison(
        items=len(flat),
        a=a,
        b=b,
        difference=_interval(b - a, scores[:, 1] - scores[:, 0]),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b),
        speed=_ratio(total, costs, tokens=(0, 3), over=(2, 5)),
        forwards=_ratio(total, costs, tokens=(0, 3), over=(1, 4)),
    )


def _row(a: Sample, b: Sample) -> list[float]:
    """Scores of both, then tokens, forwards and seconds of each."""
    return [a.score, b.score, a.tokens, a.forwards, a.seconds, b.tokens, b.forwards, b.seconds]


def _sums(table: Floats, chosen: NDArray[np.int64]) -> Floats:
    return np.stack([table[:, column][chosen].sum(axis=1) for column in range(table.shape[1])], axis=1)


def _ratio(total: Floats, costs: Floats, *, tokens: tuple[int, int], over: tuple[int, int]) -> Interval:
    """Rate of b over rate of a."""

    def rate(table: Floats, side: int) -> Floats:
        return np.asarray(table[..., tokens[side]] / np.maximum(table[..., over[side]], 1e-9))

    value = float(rate(total, 1) / np.maximum(rate(total, 0), 1e-9))
    return _interval(value, rate(costs, 1) / np.maximum(rate(costs, 0), 1e-9))


def _interval(value: float, resampled: Floats) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
