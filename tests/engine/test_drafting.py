"""Which drafts are verified and how many masks are run: the best that a forward's time buys, on sequences without a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unmask.engine.acceptance import Draft, DraftEstimates, DraftHistory, DraftPrices, Outcome
from unmask.engine.costs import CostTable, ForwardCosts
from unmask.engine.drafting import (
    Drafting,
    DraftPlan,
    DraftPlanner,
    choose,
)

DEAR = CostTable({1: 1.0, 2: 1.6, 3: 2.2})
CHEAP = CostTable({1: 1.0, 64: 1.3}, noisy={0: 0.0, 1: 0.1, 64: 0.2})


COUNTED_ON = 0.7
"""Of what masks were worth."""


def options_of(chain: Sequence[float], worth: Sequence[float]) -> list[DraftPlan]:
    """Drafts with these probabilities, and masks of this worth where all drafts are accepted."""
    accepted = np.cumprod([1.0, *chain])
    plans = []
    for d, m in product(range(len(accepted)), range(len(worth) + 1)):
        now = float(accepted[1 : d + 1].sum())
        plans.append(DraftPlan(tuple(draft(p) for p in chain[:d]), m, now + float(accepted[d]) * sum(worth[:m]), now))
    return plans


def draft(probability: float) -> Draft:
    return Draft(7, probability, ("masks", 5, 1), probability)


def chosen_of(options: Sequence[Sequence[DraftPlan]], costs: ForwardCosts, rate: float) -> list[DraftPlan]:
    return choose(options, [False] * len(options), costs, (len(options), 0, 0), rate)


def score(chosen: Sequence[DraftPlan], costs: ForwardCosts, rate: float) -> float:
    tokens = len(chosen) + sum(plan.num_tokens for plan in chosen)
    return sum(plan.gain for plan in chosen) - rate * costs.cost(tokens, sum(plan.num_masks for plan in chosen), 0)


def best_score(options: Sequence[Sequence[DraftPlan]], costs: ForwardCosts, rate: float) -> float:
    """By trying all there is."""
    gain_A, counts_AF = np.zeros(1), np.array([[len(options), 0, 0]])
    for each in options:
        gain_A = np.add.outer(gain_A, [plan.gain for plan in each]).ravel()
        counts_AF = (counts_AF[:, None] + [[plan.num_tokens, plan.num_masks, 0] for plan in each]).reshape(-1, 3)
    return float((gain_A - rate * costs.relative(counts_AF)).max())


PROBABILITY = st.floats(0.05, 0.98)
OPTIONS = st.builds(options_of, st.lists(PROBABILITY, max_size=3), st.lists(st.floats(0.0, 1.0), max_size=2))
SLOPE = st.floats(0.0, 1.0)


@st.composite
def convex_costs(draw: st.DrawFn) -> CostTable:
    """Tokens get dearer, as on a machine that computes as much as it can; so do noisy ones."""
    slopes, noisy = sorted(draw(st.lists(SLOPE, min_size=3, max_size=3))), sorted(draw(st.lists(SLOPE, min_size=2, max_size=2)))
    return CostTable(
        {1: 1.0, 3: 1 + 2 * slopes[0], 6: 1 + 2 * slopes[0] + 3 * slopes[1], 7: 1 + 2 * slopes[0] + 3 * slopes[1] + slopes[2]},
        noisy={0: 0.0, 2: 2 * noisy[0], 3: 2 * noisy[0] + noisy[1]},
    )


@given(OPTIONS, convex_costs(), st.floats(0.2, 3.0), st.floats(0.0, 2.0))
def test_one_sequence_gets_the_best_there_is(options: list[DraftPlan], costs: CostTable, rate: float, fixed: float) -> None:
    """For any costs: also where the first mask costs more than the others."""
    for each in (costs, CostTable(costs.tokens, {0: 0.0, 1: fixed, 8: fixed + 0.5})):
        chosen = chosen_of([options], each, rate)
        assert score(chosen, each, rate) == pytest.approx(best_score([options], each, rate))


@given(st.lists(OPTIONS, min_size=2, max_size=3), convex_costs(), st.floats(0.2, 3.0))
def test_several_sequences_get_nearly_the_best_there_is(options: list[list[DraftPlan]], costs: CostTable, rate: float) -> None:
    """And never less than without drafts."""
    found, best = score(chosen_of(options, costs, rate), costs, rate), best_score(options, costs, rate)
    nothing = score([each[0] for each in options], costs, rate)
    assert found >= nothing - 1e-9
    assert best - found <= 0.1 * (best - nothing) + 0.05


WITHOUT_MASKS = st.lists(PROBABILITY, max_size=3).map(lambda chain: options_of(chain, ()))


@given(st.lists(WITHOUT_MASKS, min_size=2, max_size=3), convex_costs())
def test_drafts_of_several_sequences_are_chosen_as_by_brute_force(options: list[list[DraftPlan]], costs: CostTable) -> None:
    """Without masks, where marginal gains fall and marginal costs rise."""
    for rate in (0.3, 1.0, 2.0):
        chosen = chosen_of(options, costs, rate)
        assert score(chosen, costs, rate) == pytest.approx(best_score(options, costs, rate), abs=0.02)


def test_a_fixed_cost_is_paid_where_several_share_it() -> None:
    costs = CostTable({1: 1.0, 64: 1.63}, noisy={0: 0.0, 1: 1.0, 64: 1.0})
    one = options_of((), (0.4, 0.3))
    assert chosen_of([one], costs, 1.0) == [DraftPlan()]
    assert all(plan.num_masks for plan in chosen_of([one] * 6, costs, 1.0))


class Scripted:
    """A sequence with given options; keeps what it was told."""

    is_drawn = False
    num_idle = 0

    def __init__(self, options: list[DraftPlan], *, wants_probe: bool = False) -> None:
        self.options, self._wants_probe = options, wants_probe
        self.plans: list[DraftPlan] = []
        self.probes = self.num_asked = 0

    @property
    def wants_probe(self) -> bool:
        return self._wants_probe

    @property
    def may_draft(self) -> bool:
        return True

    def draft_options(self, prices: DraftPrices) -> list[DraftPlan]:
        self.num_asked += 1
        return self.options

    def follow_plan(self, plan: DraftPlan) -> None:
        self.plans.append(plan)

    def probe(self) -> None:
        self.probes += 1


def planned(costs: ForwardCosts, sequences: Sequence[Scripted], steps: int = 30) -> None:
    planner, drafting = DraftPlanner(costs), list[Drafting](sequences)
    for _ in range(steps):
        planner.plan(drafting)


@pytest.mark.parametrize(("costs", "num_drafts", "num_masks"), [(DEAR, 1, 0), (CHEAP, 2, 2)])
def test_what_is_dear_is_left_out(costs: CostTable, num_drafts: int, num_masks: int) -> None:
    """Where masks are run, a doubtful draft before them is better drafted anew."""
    sequence = Scripted(options_of((0.9, 0.6, 0.5), (0.6, 0.5)))
    planned(costs, [sequence])
    assert (len(sequence.plans[-1].drafts), sequence.plans[-1].num_masks) == (num_drafts, num_masks)


def test_under_load_only_near_certain_drafts_are_verified() -> None:
    """Each token more costs what a token costs: drafting cannot pay, unless it is sure."""
    costs = CostTable({1: 1.0, 2: 1.1, 64: 7.4}, noisy={0: 0.0, 1: 0.2, 64: 2.0})
    doubtful = [Scripted(options_of((0.7, 0.6), (0.5, 0.4))) for _ in range(63)]
    sure = Scripted(options_of((0.98,), ()))
    planned(costs, [*doubtful, sure])
    assert all(plan == DraftPlan() for sequence in doubtful for plan in sequence.plans)
    assert len(sure.plans[-1].drafts) == 1
    alone = Scripted(options_of((0.7, 0.6), (0.5, 0.4)))
    planned(costs, [alone])
    assert len(alone.plans[-1].drafts) == 2


class EstimatedCosts(CostTable):
    """A table whose costs are not sure."""

    @property
    def margin(self) -> float:
        return 1.15


def test_a_draft_must_be_worth_more_than_a_price_that_is_estimated() -> None:
    table = {1: 1.0, 64: 8.0, 128: 15.0}
    for costs, verified in ((CostTable(table), True), (EstimatedCosts(table), False)):
        sequences = [Scripted(options_of((0.98,), ())) for _ in range(64)]
        planned(costs, sequences)
        assert any(sequence.plans[-1].drafts for sequence in sequences) == verified
    alone = Scripted(options_of((0.98,), ()))
    planned(EstimatedCosts(table), [alone])
    assert alone.plans[-1].drafts


@pytest.mark.parametrize("count", [1, 2])
def test_probes_take_a_hundredth_of_the_time(count: int) -> None:
    sequences = [Scripted([DraftPlan()], wants_probe=True) for _ in range(count)]
    planned(CostTable({1: 1.0, 64: 1 + 63 * 0.2}, noisy={0: 0.0, 1: 0.3, 2: 0.3}), sequences, steps=2000)
    probes = sum(sequence.probes for sequence in sequences)
    cost = probes * 0.2 / (1 + (count - 1) * 0.2)
    assert probes > 10
    assert cost <= 2000 * 0.01 + 2


def test_where_no_draft_can_pay_nobody_is_asked_or_probed() -> None:
    """A token more costs as much as a token is worth: a large batch is decoded as without drafts, at no cost of choosing."""
    costs = EstimatedCosts({1: 1.0, 8: 2.4, 64: 20.0}, noisy={0: 0.0, 1: 0.2, 64: 4.0})
    options = options_of((0.98,) * 4, (0.98,) * 4)
    for count, is_asked, is_probed in ((1, True, True), (4, True, False), (64, False, False)):
        sequences = [Scripted(options, wants_probe=True) for _ in range(count)]
        planned(costs, sequences)
        assert any(sequence.num_asked for sequence in sequences) == is_asked
        assert any(sequence.probes for sequence in sequences) == is_probed
        assert is_asked or all(plan == DraftPlan() for sequence in sequences for plan in sequence.plans)
        assert all(len(sequence.plans) >= 30 for sequence in sequences), "a plan that was not carried out is taken back"


def test_drafts_are_dear_beside_prompts() -> None:
    """Few decode, and what they verify comes on top of a large forward."""
    costs = CostTable({1: 1.0, 8: 1.2, 64: 40.0})
    for num_beside, num_drafts in ((0, 1), (40, 0)):
        sequence = Scripted(options_of((0.5,), ()))
        DraftPlanner(costs).plan([sequence], num_beside)
        assert len(sequence.plans[-1].drafts) == num_drafts


def test_a_request_starts_from_what_others_have_shown_and_goes_by_its_own() -> None:
    history = DraftHistory()
    first = DraftEstimates(history)
    key, prior = ("masks", 9, 1), 0.9
    assert first.draft(7, key, prior).probability == pytest.approx(0.9)
    for _ in range(40):
        first.record(key, prior, False)
    second = DraftEstimates(history)
    assert second.draft(7, key, prior).probability < 0.2
    for _ in range(40):
        second.record(key, prior, True)
    assert second.draft(7, key, prior).probability > 0.7
    assert second.draft(7, ("lookup", 3, 0), 0.5).probability == pytest.approx(0.5), "sources do not mix"


def test_masks_are_worth_what_they_have_drafted_less_the_price_of_verifying_it() -> None:
    history = DraftHistory()
    estimates = DraftEstimates(history)
    for _ in range(20):
        estimates.record_masks([draft(0.8), draft(0.5)], 3)
    free, dear = (estimates.worth(3, DraftPrices(price, 0.0, 0.0, price), 0) for price in (0.0, 0.5))
    assert free[0] == dear[0] == 0.0
    assert free[1:] == pytest.approx([COUNTED_ON * drafted for drafted in (0.8, 1.2, 1.2)], abs=0.1)
    assert dear == pytest.approx([0.0, COUNTED_ON * 0.3], abs=0.1), "as far as they are worth anything"
    for _ in range(20):
        estimates.record_masks([draft(0.1)], 1)
    assert estimates.worth(3, DraftPrices(0.2, 0.0, 0.0, 0.2), 0)[-1] < 0.1
    assert estimates.worth(3, DraftPrices(0.2, 0.1, 0.1, 0.2), 0) == [0.0], "not worth the price of a mask"


def test_masks_are_worth_nothing_where_text_drafts_as_well_as_they_do() -> None:
    prices = DraftPrices(0.1, 0.05, 0.1, 0.1)

    def worth(text: list[Draft]) -> float:
        estimates = DraftEstimates(DraftHistory())
        for _ in range(64):
            estimates.record_masks([draft(0.8), draft(0.5)], 2, text)
        return estimates.worth(2, prices, 0)[-1]

    assert worth([draft(0.9), draft(0.6)]) == 0.0
    assert worth([]) == pytest.approx(COUNTED_ON * (0.7 + 0.3), abs=0.05)
    assert worth([draft(0.6)]) == pytest.approx(worth([]) - COUNTED_ON * 0.5, abs=0.05), (
        "what text drafts is drafted without masks"
    )
    assert worth([draft(0.05)]) == pytest.approx(worth([])), "what does not pay is no draft"


def test_one_mask_that_drafts_well_makes_more_of_them_worth_trying() -> None:
    estimates = DraftEstimates(DraftHistory())
    prices = DraftPrices(0.15, 0.0, 0.0, 0.15)
    before = estimates.worth(7, prices, 0)[-1]
    estimates.record_masks([draft(0.95)], 1)
    assert estimates.worth(7, prices, 0)[7] > before + 1


def test_a_request_of_an_unknown_kind_tries_masks_as_often_as_they_have_paid() -> None:
    """What a try costs is small beside what all that follows would gain."""
    history, prices = DraftHistory(), DraftPrices(0.1, 0.05, 0.2, 0.1)
    for _ in range(64):
        history.outcomes.add(Outcome((0.0,) * 32))

    def first_worth(room: int) -> float:
        return DraftEstimates(history).worth(7, prices, room)[-1]

    def answer(probability: float) -> DraftEstimates:
        estimates = DraftEstimates(history)
        for _ in range(2):
            estimates.worth(7, prices, 40)
            estimates.record_masks([draft(probability)], 1)
        return estimates

    unknown = first_worth(40)
    assert unknown > prices.first_mask
    assert first_worth(4) < unknown, "there is less to gain in a short answer"
    assert DraftEstimates(history).worth(7, DraftPrices(0.9, 0.9, 0.9, 0.9), 40) == [0.0], "nor is there where tokens are dear"
    for _ in range(60):
        answer(0.05)
    assert first_worth(40) < 0.1
    assert answer(0.05).worth(7, prices, 40) == [0.0], "what it has shown itself counts"
    for _ in range(6):
        answer(0.95)
    assert first_worth(40) > 0.3
