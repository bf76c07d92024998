"""Policies: quotas, acceptance, and the denoising decision with each of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from unmask.diffusion import decode
from unmask.diffusion.decode import Decision, Guess
from unmask.engine.policies import POLICIES, accept, accept_within_entropy, choose, step_quota
from unmask.engine.sampling_params import ResolvedParams, SamplingParams
from unmask.errors import RequestError

CONFIDENCES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1.0]), min_size=1, max_size=10)


def decide(guess: Guess, decided: Mapping[int, int], step: int, params: ResolvedParams) -> Decision:
    return decode.decide(guess, decided, partial(choose, step=step, params=params), params.edit_threshold)


def test_policies_are_chosen_by_name() -> None:
    for name in POLICIES:
        assert SamplingParams(policy=name).policy == name
    assert SamplingParams.options()["policy"].choices == tuple(POLICIES)
    with refused(RequestError, "policy", "'luck'", *POLICIES):
        SamplingParams(policy="luck")


@given(st.integers(1, 70), st.integers(1, 100))
def test_quotas_fill_the_block_with_the_remainder_first(block_size: int, steps: int) -> None:
    quotas = [step_quota(step, block_size, steps) for step in range(steps)]
    assert sum(quotas) == block_size
    assert quotas == sorted(quotas, reverse=True)
    assert max(quotas) - min(quotas) <= 1


def accept_by_hand(confidence: list[float], undecided: list[bool], threshold: float, quota: int) -> list[bool]:
    undecided_positions = [i for i, yes in enumerate(undecided) if yes]
    chosen = [i for i in undecided_positions if confidence[i] > threshold]
    if len(chosen) < quota:
        chosen = sorted(undecided_positions, key=lambda i: (-confidence[i], i))[:quota]
    return [i in chosen for i in range(len(confidence))]


@given(CONFIDENCES, st.data(), st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95, 1.0]), st.integers(0, 12))
def test_accept_equals_its_definition(confidence: list[float], data: st.DataObject, threshold: float, quota: int) -> None:
    """The confidences repeat and hit the threshold exactly: ties and `>` against `>=` both matter."""
    undecided = data.draw(st.lists(st.booleans(), min_size=len(confidence), max_size=len(confidence)))
    positions = [i for i, yes in enumerate(undecided) if yes]
    accepted = accept([confidence[i] for i in positions], threshold, quota)
    assert [i in {positions[j] for j in accepted} for i in range(len(confidence))] == accept_by_hand(
        confidence, undecided, threshold, quota
    )
    assert accepted == sorted(set(accepted))


def test_a_confidence_equal_to_the_threshold_is_not_above_it() -> None:
    assert accept([0.5, 0.75, 0.25], 0.5, 0) == [1]
    assert accept([1.0] * 3, 1.0, 0) == []


def test_ties_go_to_the_lowest_position() -> None:
    assert accept([0.1] * 3 + [0.5] * 37, 0.9, 4) == [3, 4, 5, 6]


def within_by_hand(of_positions: list[float], bound: float, quota: int) -> list[int]:
    """The largest set of least entropies whose sum without its largest stays within the bound."""
    ranked = sorted(range(len(of_positions)), key=lambda i: (of_positions[i], i))
    best = max(n for n in range(len(ranked) + 1) if sum(of_positions[i] for i in ranked[: max(n - 1, 0)]) <= bound)
    return sorted(ranked[: max(best, quota)])


# Sixteenths add up exactly, so that a sum can hit the bound.
ENTROPIES = st.lists(st.integers(0, 24).map(lambda n: n / 16), min_size=1, max_size=9)


@given(ENTROPIES, st.integers(0, 32).map(lambda n: n / 16), st.integers(0, 9))
def test_entropy_acceptance_equals_its_definition(of_positions: list[float], bound: float, quota: int) -> None:
    found = accept_within_entropy(of_positions, bound, quota)
    assert found == within_by_hand(of_positions, bound, quota)
    assert len(found) >= 1, "one position alone has no others to sum over"


@given(ENTROPIES, st.integers(0, 32).map(lambda n: n / 16))
def test_no_larger_set_is_within_the_entropy_bound(of_positions: list[float], bound: float) -> None:
    """Brute force over all subsets: none that keeps the bound has more members."""
    most = 0
    for bits in range(1, 2 ** len(of_positions)):
        chosen = [e for i, e in enumerate(of_positions) if bits >> i & 1]
        if sum(chosen) - max(chosen) <= bound:
            most = max(most, len(chosen))
    assert len(accept_within_entropy(of_positions, bound, 0)) == most


def guess_of(*guesses: tuple[int, int, float], entropy: list[float] | None = None) -> Guess:
    """(position, candidate, confidence) of every queried position."""
    positions, tokens, confidences = zip(*guesses, strict=True)
    return Guess(positions, tokens, confidences, entropy)


def test_the_threshold_policy_commits_masked_positions_only() -> None:
    guess = guess_of((8, 1, 0.99), (9, 2, 0.4), (10, 3, 0.97), (11, 4, 0.5))
    rules = ResolvedParams(block_size=4, steps=4)
    assert decide(guess, {8: 7}, 0, rules).commits == {10: 3}
    assert decide(guess, {8: 7, 10: 3}, 0, rules).commits == {11: 4}, "the quota: the most confident"
    assert decide(guess_of((9, 2, 0.4)), {}, 5, ResolvedParams(block_size=4, steps=8)).commits == {}, "steps without a quota"
    assert decide(guess, {8: 7}, 0, rules).edits == {}, "edit_threshold None is off"


def test_the_fixed_policy_ignores_confidence_but_for_the_order() -> None:
    guess = guess_of((0, 1, 0.999), (1, 2, 1.0), (2, 3, 1.0), (3, 4, 0.2), (4, 5, 0.3))
    rules = ResolvedParams(block_size=5, steps=3, policy="fixed", threshold=0.1)
    assert decide(guess, {}, 0, rules).commits == {1: 2, 2: 3}
    assert decide(guess, {1: 2, 2: 3}, 1, rules).commits == {0: 1, 4: 5}
    assert decide(guess, {1: 2, 2: 3, 0: 1, 4: 5}, 2, rules).commits == {3: 4}


def test_the_entropy_policy_ranks_by_entropy() -> None:
    guess = guess_of((4, 1, 0.9), (5, 2, 0.8), (6, 3, 0.7), (7, 4, 0.99), entropy=[0.5, 0.25, 1.0, 0.0])
    rules = ResolvedParams(block_size=4, steps=4, policy="entropy", entropy_bound=0.25)
    assert decide(guess, {}, 0, rules).commits == {4: 1, 5: 2, 7: 4}
    assert decide(guess, {7: 9}, 0, rules).commits == {4: 1, 5: 2}, "a decided position does not count"
    tight = ResolvedParams(block_size=4, steps=1, policy="entropy", entropy_bound=0.0)
    assert decide(guess, {}, 0, tight).commits == {4: 1, 5: 2, 6: 3, 7: 4}, "the quota"
    with pytest.raises(AssertionError, match="needs the entropies"):
        decide(guess_of((4, 1, 0.9)), {}, 0, rules)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=6),
    st.lists(st.none() | st.integers(0, 3), min_size=6, max_size=6),
    st.sampled_from([None, 0.0, 0.25, 0.5, 1.0]),
    st.sampled_from(["threshold", "fixed"]),
)
def test_edits_equal_their_definition(
    guesses: list[tuple[int, float]], tokens: list[int | None], edit_threshold: float | None, policy: str
) -> None:
    """Confidences hit the threshold exactly, candidates equal the decided token: `>` and `!=` both matter."""
    rules = ResolvedParams(block_size=6, steps=6, threshold=0.5, edit_threshold=edit_threshold, policy=policy)
    positions = [10 + i for i in range(len(guesses))]
    guess = Guess(positions, [token for token, _ in guesses], [confidence for _, confidence in guesses])
    decided = {p: token for p, token in zip(positions, tokens, strict=False) if token is not None}
    decision = decide(guess, decided, 0, rules)
    expected = {}
    for position, (token, confidence) in zip(positions, guesses, strict=True):
        before = decided.get(position)
        if before is not None and before != token and edit_threshold is not None and confidence > edit_threshold:
            expected[position] = token
    assert decision.edits == expected
    assert not decided.keys() & decision.commits.keys()
    assert (
        decision.commits
        == decide(guess, decided, 0, ResolvedParams(block_size=6, threshold=0.5, steps=6, policy=rules.policy)).commits
    )


def test_edit_threshold_0_edits_any_change_and_none_edits_nothing() -> None:
    guess, decided = guess_of((0, 5, 1e-6), (1, 6, 0.999), (2, 7, 1e-6)), {0: 4, 1: 6, 2: 3}
    assert decide(guess, decided, 0, ResolvedParams(block_size=4, edit_threshold=0.0)).edits == {0: 5, 2: 7}
    assert decide(guess, decided, 0, ResolvedParams(block_size=4, edit_threshold=None)).edits == {}
    assert decide(guess, decided, 0, ResolvedParams(block_size=4, edit_threshold=1.0)).edits == {}
