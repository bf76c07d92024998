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
    by_task: dict[str, list[tuple[EvalSample, EvalSample]]] = {}
    for key in shared:
        one, other = by_key_a[key], by_key_b[key]
        if (one.prompt, one.target) != (other.prompt, other.target):
            raise ConfigError(
                f"item {one.id} of {one.task} differs between the two runs; run the same version of the task on both"
            )
        by_task.setdefault(one.task, []).append((one, other))
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
    # Of each task [items, side, measure]; measures are score, tokens, forwards and seconds.
    tables = [
        np.array(
            [[(each.score, each.tokens, each.forwards, each.seconds) for each in pair] for pair in pairs], dtype=np.float64
        )
        for pairs in groups
    ]
    # Every resample draws items within each task; the answers of both runs to one item stay together.
    resampled = [_sums(table, rng.integers(len(table), size=(RESAMPLES, len(table)))) for table in tables]
    scores = np.mean([sums[..., 0] / len(table) for sums, table in zip(resampled, tables, strict=True)], axis=0)
    a, b = np.mean([table[..., 0].mean(axis=0) for table in tables], axis=0)
    total, totals = np.sum([table.sum(axis=0) for table in tables], axis=0), np.sum(resampled, axis=0)
    right_a, right_b = np.concatenate([table[..., 0] >= 1 for table in tables]).T
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return Comparison(
        items=len(right_a),
        a=float(a),
        b=float(b),
        difference=_interval(b - a, scores[:, 1] - scores[:, 0]),
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar(only_a, only_b),
        speed=_interval(_ratio(total, over=3), _ratio(totals, over=3)),
        forwards=_interval(_ratio(total, over=2), _ratio(totals, over=2)),
    )


def _sums(table: Floats, indices: NDArray[np.int64]) -> Floats:
    """Sums of a table [items, side, measure] over the items of each resample: [resamples, side, measure]."""
    return np.stack([column[indices].sum(axis=1) for column in table.reshape(len(table), -1).T], axis=1).reshape(-1, 2, 4)


def _ratio(sums: Floats, *, over: int) -> Floats:
    """Tokens over another measure: the rate of b over that of a."""
    rate = sums[..., 1] / np.maximum(sums[..., over], 1e-9)
    return np.asarray(rate[..., 1] / np.maximum(rate[..., 0], 1e-9))


def _interval(value: float | Floats, resampled: Floats) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
