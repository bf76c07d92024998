"""Paired comparison of two runs: difference of scores with a bootstrap interval, McNemar's test, and ratios of speed.

Owns the statistics. Knows samples only; reports are `report`'s. scipy's bootstrap resamples a single sample; here items are
resampled within each task, and a ratio of sums is taken over all tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from unmask.errors import ConfigError
from unmask.eval.runner import EvalSample

RESAMPLES = 10_000
LEVEL = 0.95
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One task, or all of them together.

    Attributes:
        items: number of items that both have answered.
        a, b: mean scores.
        difference: b - a, with its paired bootstrap interval.
        only_a, only_b: number of items that only one of them has right (a score of 1 against less).
        p_value: of McNemar's exact test that these two counts are equal; 1 where both are 0.
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


def compare_samples(a: Sequence[EvalSample], b: Sequence[EvalSample], *, seed: int = 0) -> dict[str, Comparison]:
    """A comparison for every task that both runs have answered, and `all`: the mean over tasks, resampled within each task.

    Raises:
        ConfigError: the runs share no item, or an item has another prompt or target.
    """
    by_key_a, by_key_b = ({(sample.task, sample.id): sample for sample in samples} for samples in (a, b))
    shared = sorted(by_key_a.keys() & by_key_b.keys())
    if not shared:
        raise ConfigError("the two runs have no item in common; run the same tasks on both")
    for key in shared:
        if (by_key_a[key].prompt, by_key_a[key].target) != (by_key_b[key].prompt, by_key_b[key].target):
            raise ConfigError(
                f"item {key[1]} of {key[0]} differs between the two runs; run the same version of the task on both"
            )
    by_task: dict[str, list[tuple[EvalSample, EvalSample]]] = {}
    for key in shared:
        by_task.setdefault(key[0], []).append((by_key_a[key], by_key_b[key]))
    comparisons = {task: _compare([pairs], seed) for task, pairs in by_task.items()}
    return {**comparisons, "all": _compare(list(by_task.values()), seed)}


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of two counts of discordant pairs."""
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(comb(total, k) for k in range(fewer + 1)) / 2**total
    return float(min(1.0, 2 * tail))


def _compare(groups: Sequence[Sequence[tuple[EvalSample, EvalSample]]], seed: int) -> Comparison:
    """Groups are tasks: each has the same weight in the scores, whatever its size; speeds are sums over all items."""
    rng = np.random.default_rng(seed)
    tables = [np.array([_row(a, b) for a, b in pairs], dtype=np.float64) for pairs in groups]
    # Every resample draws items within each task; the answers of both runs to one item stay together.
    resampled = [_sums(table, rng.integers(len(table), size=(RESAMPLES, len(table)))) for table in tables]
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


def _row(a: EvalSample, b: EvalSample) -> list[float]:
    """Scores of both, then tokens, forwards and seconds of each."""
    return [a.score, b.score, a.tokens, a.forwards, a.seconds, b.tokens, b.forwards, b.seconds]


def _sums(table: Floats, indices: NDArray[np.int64]) -> Floats:
    return np.stack([table[:, column][indices].sum(axis=1) for column in range(table.shape[1])], axis=1)


def _ratio(total: Floats, costs: Floats, *, tokens: tuple[int, int], over: tuple[int, int]) -> Interval:
    """Rate of b over rate of a."""

    def rate(table: Floats, side: int) -> Floats:
        return np.asarray(table[..., tokens[side]] / np.maximum(table[..., over[side]], 1e-9))

    value = float(rate(total, 1) / np.maximum(rate(total, 0), 1e-9))
    return _interval(value, rate(costs, 1) / np.maximum(rate(costs, 0), 1e-9))


def _interval(value: float, resampled: Floats) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
