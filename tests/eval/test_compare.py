"""Paired statistics: by hand, against simulation, and on what must not be compared."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from helpers import refused
from unmask.errors import ConfigError
from unmask.eval.compare import compare_samples, mcnemar
from unmask.eval.runner import EvalSample


def sample(
    i: int, score: float, *, task: str = "sums", tokens: int = 10, forwards: int = 10, seconds: float = 0.1
) -> EvalSample:
    return EvalSample(task, f"{task}/{i}", f"question {i}", i, "", None, score, None, "stop", 5, tokens, forwards, seconds)


def run(scores: list[float], **options: object) -> list[EvalSample]:
    return [sample(i, score, **options) for i, score in enumerate(scores)]  # type: ignore[arg-type]


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)


def test_a_run_against_itself_differs_in_nothing() -> None:
    a = run([1, 0, 1, 1, 0, 0.5])
    found = compare_samples(a, a)["sums"]
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.0, 0.0, 0.0)
    assert (found.only_a, found.only_b, found.p_value) == (0, 0, 1.0)
    assert found.speed.value == found.speed.low == found.speed.high == pytest.approx(1.0)


def test_scores_counts_and_speeds() -> None:
    a = run([1, 1, 0, 0, 1, 0], tokens=10, forwards=10, seconds=0.2)
    b = run([1, 0, 1, 1, 1, 0], tokens=12, forwards=4, seconds=0.1)
    found = compare_samples(a, b)["sums"]
    assert (found.items, found.a, found.b) == (6, 0.5, pytest.approx(4 / 6))
    assert found.difference.value == pytest.approx(1 / 6)
    assert found.difference.low < 1 / 6 < found.difference.high
    assert (found.only_a, found.only_b) == (1, 2)
    assert found.speed.value == pytest.approx((12 / 0.1) / (10 / 0.2))
    assert found.forwards.value == pytest.approx(3.0)


def test_all_counts_tasks_alike() -> None:
    a = run([0] * 30, task="x") + run([1, 1], task="y")
    b = run([1] * 30, task="x") + run([0, 0], task="y")
    found = compare_samples(a, b)
    assert found["all"].difference.value == pytest.approx(0.0)
    assert found["x"].difference.value == 1.0
    assert (found["all"].items, found["all"].only_a, found["all"].only_b) == (32, 2, 30)


def test_pairing_narrows_the_interval() -> None:
    drawn = random.Random(0)
    scores = [float(drawn.random() < 0.5) for _ in range(200)]
    better = [max(score, float(i % 20 == 0)) for i, score in enumerate(scores)]
    found = compare_samples(run(scores), run(better))["sums"]
    unpaired = 2 * 1.96 * (2 * 0.25 / 200) ** 0.5
    assert found.difference.high - found.difference.low < unpaired / 3


def test_intervals_hold_what_they_claim() -> None:
    """Of 60 simulated pairs of runs with a true difference of 0.1, about 95% of the intervals hold it."""
    drawn = random.Random(1)
    held = 0
    for _ in range(60):
        a = [float(drawn.random() < 0.5) for _ in range(80)]
        b = [float(drawn.random() < 0.6) for _ in range(80)]
        found = compare_samples(run(a), run(b))["sums"]
        held += found.difference.low <= 0.1 <= found.difference.high
    assert held >= 52


def test_only_what_both_have_answered_counts() -> None:
    found = compare_samples(run([1, 0, 1]), run([1, 1]))["sums"]
    assert found.items == 2


def test_runs_that_do_not_belong_together() -> None:
    with refused(ConfigError, "item"):
        compare_samples(run([1]), run([1], task="other"))
    with refused(ConfigError, "runs"):
        compare_samples(run([1]), [replace(sample(0, 1), prompt="another question")])
