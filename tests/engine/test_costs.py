"""Relative costs of forwards: a given table, and what an engine learns from its own forwards."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from unmask.engine.costs import CostTable, ForwardCosts, MeasuredCosts


def cost(costs: ForwardCosts, *counts: int) -> float:
    """By both ways of asking."""
    (found,) = costs.relative(np.array([counts])).tolist()
    assert found == pytest.approx(costs.cost(*counts))
    return float(found)


def test_a_table_is_interpolated_and_goes_on_by_its_last_slope() -> None:
    table = CostTable({1: 10.0, 5: 12.0, 9: 20.0}, noisy={0: 0.0, 1: 3.0, 3: 4.0}, drawn={0: 0.0, 2: 1.0})
    assert [cost(table, n, 0, 0) for n in (1, 3, 5, 7, 9, 10)] == pytest.approx([10, 11, 12, 16, 20, 22])
    assert [cost(table, 1, n, 0) for n in (0, 1, 2, 3, 5)] == pytest.approx([10, 13, 13.5, 14, 15])
    assert cost(table, 3, 1, 3) == pytest.approx(11 + 3 + 1.5)
    assert cost(CostTable(), 64, 7, 64) == cost(CostTable(), 1, 0, 0) == 1.0
    table.observe((1, 0, 0), 7.0)
    assert cost(table, 1, 0, 0) == 10.0


def seconds(counts: tuple[int, int, int], *, scale: float = 1.0) -> float:
    """A machine: 12 ms, 5 for each further token, 4 for the first noisy one and 1 for each, 2 for each drawn one."""
    tokens, noisy, drawn = counts
    return scale * (0.012 + 0.005 * (tokens - 1) + 0.004 * (noisy > 0) + 0.001 * noisy + 0.002 * drawn)


def test_costs_are_learnt_from_few_forwards_with_noise_and_outliers() -> None:
    drawn_from, costs = np.random.default_rng(0), MeasuredCosts()
    for number in range(60):
        counts = (1 + number % 8, number % 8 // 2, 0)
        outlier = 5.0 if number % 13 == 12 else 1.0
        costs.observe(counts, seconds(counts) * outlier * (1 + 0.05 * drawn_from.standard_normal()))
    plain = cost(costs, 1, 0, 0)
    for counts in ((2, 0, 0), (4, 2, 0), (8, 3, 0)):
        assert cost(costs, *counts) / plain == pytest.approx(seconds(counts) / seconds((1, 0, 0)), rel=0.15), counts


def test_relative_costs_outlast_a_machine_that_gets_slower_and_long_texts_without_drafts() -> None:
    costs = MeasuredCosts()
    for scale in (1.0, 3.0, 1.0):
        for number in range(200):
            counts = (1, 0, 0) if number % 4 else (6, 3, 0)
            costs.observe(counts, seconds(counts, scale=scale))
        expected = seconds((6, 3, 0)) / seconds((1, 0, 0))
        assert cost(costs, 6, 3, 0) / cost(costs, 1, 0, 0) == pytest.approx(expected, rel=0.1)
        for _ in range(500):
            costs.observe((1, 0, 0), seconds((1, 0, 0), scale=scale))
        assert cost(costs, 6, 3, 0) / cost(costs, 1, 0, 0) == pytest.approx(expected, rel=0.1)


def test_a_machine_that_reads_weights_once_for_a_few_tokens() -> None:
    """Four tokens take as long as one, then each takes a fifth more: as with AVX2."""
    curve = CostTable({1: 10.0, 4: 10.0, 5: 12.0})
    drawn_from, costs = np.random.default_rng(0), MeasuredCosts()
    for _ in range(200):
        tokens = int(drawn_from.integers(4, 12))
        costs.observe((tokens, 0, 0), cost(curve, tokens, 0, 0) / 1e3 * (1 + 0.05 * drawn_from.standard_normal()))
    for tokens in (5, 6, 8, 11):
        assert cost(costs, tokens, 0, 0) / cost(costs, 4, 0, 0) == pytest.approx(cost(curve, tokens, 0, 0) / 10.0, rel=0.1), (
            tokens
        )


def test_no_token_is_ever_free_of_cost_or_worse() -> None:
    costs = MeasuredCosts()
    for counts in ((1, 0, 0), (8, 4, 8), (32, 0, 0), (64, 16, 0)) * 20:
        costs.observe(counts, 0.01 / counts[0])
    found = [cost(costs, n, 0, 0) for n in range(1, 80)]
    assert all(after >= before - 1e-9 for before, after in pairwise(found))


def test_before_anything_is_measured_the_kind_of_kernels_says_what_is_usual() -> None:
    known, unknown = MeasuredCosts("avx2"), MeasuredCosts()
    for costs in (known, unknown):
        assert 1.0 == cost(costs, 1, 0, 0) < cost(costs, 2, 0, 0) < cost(costs, 2, 1, 0) < 2
    assert cost(known, 16, 0, 0) > cost(MeasuredCosts("amx"), 16, 0, 0)
    assert cost(MeasuredCosts("no such kernels"), 16, 0, 0) == cost(unknown, 16, 0, 0)


@pytest.mark.parametrize("busy", [0.2, 0.5])
def test_another_process_does_not_make_tokens_look_cheap(busy: float) -> None:
    """Beside it, every so often a forward takes 8 ms more, whatever it holds."""
    drawn_from, costs = np.random.default_rng(0), MeasuredCosts()
    for number in range(600):
        counts = (1, 0, 0) if number % 3 else (6, 3, 0)
        costs.observe(
            counts, seconds(counts) * (1 + 0.03 * drawn_from.standard_normal()) + 0.008 * (drawn_from.random() < busy)
        )
    expected = seconds((6, 3, 0)) / seconds((1, 0, 0))
    assert cost(costs, 6, 3, 0) / cost(costs, 1, 0, 0) == pytest.approx(expected, rel=0.12)


def test_learnt_costs_are_taken_over_and_give_way_to_what_a_changed_machine_shows() -> None:
    first, second = MeasuredCosts(), MeasuredCosts()
    for _ in range(100):
        for counts in ((1, 0, 0), (4, 2, 0), (9, 0, 0)):
            first.observe(counts, seconds(counts))
    second.restore(first.state())
    counts = (6, 3, 0)
    assert cost(second, *counts) == pytest.approx(cost(first, *counts))
    for _ in range(40):
        second.observe((1, 0, 0), 0.01)
        second.observe(counts, 0.012)
    assert cost(second, *counts) == pytest.approx(1.2, rel=0.1)


@pytest.mark.parametrize("parameters", [[1.0], "many", [float("nan")] * 7, [1e300] * 7, None])
def test_what_are_no_costs_is_refused(parameters: object) -> None:
    costs = MeasuredCosts()
    before = cost(costs, 9, 3, 1)
    with pytest.raises((KeyError, TypeError, ValueError)):
        costs.restore({**costs.state(), "parameters": parameters})
    with pytest.raises(KeyError):
        costs.restore({})
    assert cost(costs, 9, 3, 1) == before
