"""Candidates of a denoising step and the distribution they are drawn from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plain_sampling import filtered_probabilities
from unmask.diffusion.decode import candidates, entropies
from unmask.engine.sampling_params import ResolvedParams

VOCAB = 12


def logits_of(seed: int, count: int = 6, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed))


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
    expected = others.softmax(-1).gather(1, token[:, None])[:, 0]
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
    torch.testing.assert_close(confidence, banned.softmax(-1)[token])


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.01}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 0.01}, {"temperature": 5e-324}],
    ids=str,
)
def test_sampling_that_is_nearly_greedy_is_as_unsure_as_greedy_decoding(options: dict[str, float]) -> None:
    """Two logits tie, others are close, as rounded ones are: the lowest id wins, with its unscaled probability."""
    logits = logits_of(6, 200).mul(8).round().div(8)
    logits[:, [7, 3]] = logits.max(-1, keepdim=True).values
    positions = torch.arange(200)
    expected = candidates(logits, positions, 0, ResolvedParams(), 4)
    for seed in range(3):
        found = candidates(logits, positions, 0, ResolvedParams(seed=seed, **options), 4)  # type: ignore[arg-type]
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1])
    assert float(expected[1].max()) < 0.6


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
def test_a_huge_temperature_draws_uniformly_from_what_is_allowed(temperature: float) -> None:
    count, logits = 20_000, logits_of(9, 1)
    logits[0, 5] = float("-inf")
    rules = ResolvedParams(temperature=temperature, seed=2)
    token, confidence = candidates(logits.expand(count, VOCAB), torch.arange(count), 0, rules, 2)
    frequency = torch.bincount(token, minlength=VOCAB).double() / count
    expected = torch.full((VOCAB,), 1 / (VOCAB - 2), dtype=torch.float64)
    expected[[2, 5]] = 0
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    assert torch.isfinite(confidence).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-3, 1e30, 1e300])
def test_probabilities_are_finite_at_every_temperature(temperature: float) -> None:
    logits = 1e4 * logits_of(8, 50)
    logits[:, 1] = float("-inf")
    found = filtered_probabilities(logits, ResolvedParams(temperature=temperature, top_k=5, top_p=0.9))
    torch.testing.assert_close(found.sum(-1), torch.ones(50))
    assert not found[:, 1].any()


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


def test_rows_of_unlike_seeds_steps_and_samples_draw_what_they_draw_alone() -> None:
    logits, positions = logits_of(2), torch.arange(6)
    keys = [(seed, step, sample) for seed in (-5, 3) for step in (0, 2) for sample in (0, 1)][:6]
    seeds, steps, samples = torch.tensor(keys).T
    params = ResolvedParams(temperature=1.0)
    together = candidates(logits, positions, steps, params, None, sample=samples, seed=seeds)
    for row, (seed, step, sample) in enumerate(keys):
        own = params.replace(seed=seed)
        alone = candidates(logits[row : row + 1], positions[row : row + 1], step, own, None, sample=sample)
        assert (together[0][row], together[1][row]) == (alone[0][0], alone[1][0])
