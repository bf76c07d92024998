"""The denoising decision: quotas, acceptance, candidates and the distribution they are drawn from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unmask.diffusion.decode import (
    Guess,
    accept,
    accept_within_entropy,
    candidates,
    decide,
    entropies,
    filtered_probabilities,
    step_quota,
)
from unmask.engine.sampling_params import ResolvedParams

VOCAB = 12
CONFIDENCES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1.0]), min_size=1, max_size=10)


def logits_of(seed: int, count: int = 6, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 70), st.integers(1, 100))
def test_quotas_fill_the_block_with_the_remainder_first(block_size: int, steps: int) -> None:
    rules = ResolvedParams(block_size=block_size, steps=steps)
    quotas = [step_quota(step, rules) for step in range(steps)]
    assert sum(quotas) == block_size
    assert quotas == sorted(quotas, reverse=True)
    assert max(quotas) - min(quotas) <= 1


def accept_by_hand(confidence: list[float], undecided: list[bool], threshold: float, quota: int) -> list[bool]:
    open_places = [i for i, yes in enumerate(undecided) if yes]
    chosen = [i for i in open_places if confidence[i] > threshold]
    if len(chosen) < quota:
        chosen = sorted(open_places, key=lambda i: (-confidence[i], i))[:quota]
    return [i in chosen for i in range(len(confidence))]


@given(CONFIDENCES, st.data(), st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95, 1.0]), st.integers(0, 12))
def test_accept_equals_its_definition(confidence: list[float], data: st.DataObject, threshold: float, quota: int) -> None:
    """The confidences repeat and hit the threshold exactly: ties and `>` against `>=` both matter."""
    undecided = data.draw(st.lists(st.booleans(), min_size=len(confidence), max_size=len(confidence)))
    places = [i for i, yes in enumerate(undecided) if yes]
    found = accept([confidence[i] for i in places], threshold, quota)
    assert [i in {places[j] for j in found} for i in range(len(confidence))] == accept_by_hand(
        confidence, undecided, threshold, quota
    )
    assert found == sorted(set(found))


def test_a_confidence_equal_to_the_threshold_is_not_above_it() -> None:
    assert accept([0.5, 0.75, 0.25], 0.5, 0) == [1]
    assert accept([1.0] * 3, 1.0, 0) == []


def test_ties_go_to_the_lowest_position() -> None:
    assert accept([0.1] * 3 + [0.5] * 37, 0.9, 4) == [3, 4, 5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_temperature_zero_is_argmax_whatever_the_seed_and_filters(dtype: torch.dtype) -> None:
    logits, positions = logits_of(0, 50).to(dtype), torch.arange(50)
    expected = logits.argmax(-1)
    for seed in range(20):
        for filters in ({}, {"top_k": 1, "top_p": 0.1}):
            rules = ResolvedParams(seed=seed, **filters)  # type: ignore[arg-type]
            token, confidence = candidates(logits, positions, seed, rules, None)
            assert torch.equal(token, expected)
            assert confidence.dtype == torch.float32
            full = logits.float().softmax(-1).gather(1, expected[:, None])[:, 0]
            torch.testing.assert_close(confidence, full)


def test_argmax_ties_take_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [3, 7]] = 1.0
    assert candidates(logits, torch.arange(2), 0, ResolvedParams(), None)[0].tolist() == [3, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_the_mask_token_is_never_a_candidate(temperature: float) -> None:
    logits = logits_of(1, 500)
    logits[:, 4] = 30.0
    token, confidence = candidates(logits, torch.arange(500), 0, ResolvedParams(temperature=temperature), 4)
    assert (token != 4).all()
    others = logits.clone()
    others[:, 4] = float("-inf")
    expected = (others / (temperature or 1.0)).softmax(-1).gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(confidence, expected)
    unbanned, _ = candidates(logits, torch.arange(500), 0, ResolvedParams(), None)
    assert (unbanned == 4).all()


def filter_by_hand(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """Temperature, then top-k, then top-p, in plain floats."""
    weights = {i: math.exp(x / temperature) for i, x in enumerate(logits)}
    order = sorted(weights, key=lambda i: -weights[i])
    if top_k is not None:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    if top_p is not None:
        kept, mass = [], 0.0
        for i in order:
            kept.append(i)
            mass += weights[i] / total
            if mass >= top_p:
                break
        order, total = kept, sum(weights[i] for i in kept)
    return [weights[i] / total if i in order else 0.0 for i in range(len(logits))]


@given(
    st.integers(0, 1000),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([None, 1, 2, 5, VOCAB, 100]),
    st.sampled_from([None, 0.013, 0.4137, 0.9, 0.9991, 1.0]),
)
def test_filters_equal_their_definition(seed: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = logits_of(seed, 3)
    rules = ResolvedParams(temperature=temperature, top_k=top_k, top_p=top_p)
    found = filtered_probabilities(logits, rules)
    assert found.dtype == torch.float32
    expected = torch.tensor([filter_by_hand(row, temperature, top_k, top_p) for row in logits.double().tolist()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_top_k_keeps_every_tied_token_and_top_p_at_least_one() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    kept = filtered_probabilities(logits, ResolvedParams(temperature=1.0, top_k=2)) > 0
    assert kept.tolist() == [[True, True, True, False]]
    best = filtered_probabilities(logits, ResolvedParams(temperature=1.0, top_p=1e-9))
    assert best.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}])
def test_draws_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    count = 20_000
    rules = ResolvedParams(temperature=1.3, seed=4, **filters)
    logits = logits_of(9, 1).expand(count, VOCAB)
    token, confidence = candidates(logits, torch.arange(count), 0, rules, 2)
    banned = logits[0].clone()
    banned[2] = float("-inf")
    expected = filtered_probabilities(banned[None], rules)[0]
    frequency = torch.bincount(token, minlength=VOCAB).double() / count
    sigma = (expected * (1 - expected) / count).sqrt().double()
    assert ((frequency - expected).abs() <= 4 * sigma).all()
    assert not frequency[expected == 0].any()
    torch.testing.assert_close(confidence, expected[token])


def test_seed_step_and_position_key_the_draw() -> None:
    logits = torch.zeros(400, VOCAB)
    positions = torch.arange(400)

    def draw(seed: int = 0, step: int = 0, shift: int = 0) -> Tensor:
        return candidates(logits, positions + shift, step, ResolvedParams(temperature=1.0, seed=seed), None)[0]

    base = draw()
    assert torch.equal(draw(), base)
    assert torch.equal(draw(shift=1)[:-1], base[1:]), "the absolute position counts, not the place in the call"
    for other in (draw(seed=1), draw(step=1), draw(shift=400)):
        assert float((other != base).float().mean()) == pytest.approx(1 - 1 / VOCAB, abs=0.06)


@given(st.permutations(range(6)), st.integers(1, 6), st.sampled_from([0.0, 1.0]))
def test_a_position_does_not_depend_on_the_others_in_the_call(order: list[int], count: int, temperature: float) -> None:
    logits, positions = logits_of(2), torch.tensor([3, 4, 9, 10, 30, 31])
    rules = ResolvedParams(temperature=temperature, top_k=8, top_p=0.95, seed=1)
    token, confidence = candidates(logits, positions, 3, rules, 0)
    part = torch.tensor(order[:count])
    some_token, some_confidence = candidates(logits[part], positions[part], 3, rules, 0)
    assert torch.equal(some_token, token[part])
    torch.testing.assert_close(some_confidence, confidence[part], rtol=1e-6, atol=0)


def test_a_tiny_temperature_is_close_to_argmax() -> None:
    logits = logits_of(3, 200)
    token, confidence = candidates(logits, torch.arange(200), 0, ResolvedParams(temperature=1e-3), None)
    assert float((token == logits.argmax(-1)).float().mean()) > 0.98
    assert torch.isfinite(confidence).all()


def test_samples_of_one_prompt_differ() -> None:
    def draw(seed: int, sample: int) -> Tensor:
        rules = ResolvedParams(temperature=1.0, seed=seed)
        return candidates(torch.zeros(400, VOCAB), torch.arange(400), 0, rules, None, sample=sample)[0]

    second = draw(3, 1)
    assert torch.equal(second, draw(3, 1))
    for other in (draw(3, 0), draw(4, 0), draw(2, 2), draw(3, 2)):
        assert float((second != other).float().mean()) == pytest.approx(1 - 1 / VOCAB, abs=0.06)


def test_entropies_are_those_of_the_distribution_without_the_mask() -> None:
    logits = logits_of(5)
    kept = [i for i in range(VOCAB) if i != 4]
    shares = logits[:, kept].double().softmax(-1)
    expected = -(shares * shares.log()).sum(-1)
    torch.testing.assert_close(entropies(logits, 4).double(), expected, atol=1e-6, rtol=1e-5)
    certain = torch.full((1, VOCAB), float("-inf"))
    certain[0, 3] = 0.0
    assert entropies(certain, None).tolist() == [0.0], "a banned token adds nothing, not NaN"
    assert entropies(torch.zeros(1, VOCAB), None).item() == pytest.approx(math.log(VOCAB))


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


def guess_of(*said: tuple[int, int, float], entropy: list[float] | None = None) -> Guess:
    """(position, candidate, confidence) of every queried position."""
    positions, tokens, confidences = zip(*said, strict=True)
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
    said: list[tuple[int, float]], holds: list[int | None], edit_threshold: float | None, policy: str
) -> None:
    """Confidences hit the threshold exactly, candidates equal the token held: `>` and `!=` both matter."""
    rules = ResolvedParams(block_size=6, steps=6, threshold=0.5, edit_threshold=edit_threshold, policy=policy)  # type: ignore[arg-type]
    positions = [10 + i for i in range(len(said))]
    guess = Guess(positions, [token for token, _ in said], [confidence for _, confidence in said])
    decided = {p: token for p, token in zip(positions, holds, strict=False) if token is not None}
    decision = decide(guess, decided, 0, rules)
    expected = {}
    for position, (token, confidence) in zip(positions, said, strict=True):
        held = decided.get(position)
        if held is not None and held != token and edit_threshold is not None and confidence > edit_threshold:
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
