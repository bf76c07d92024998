"""CAP's entropy term and DPO's loss over the ELBO, on numbers that can be worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tiny import MASK, VOCAB, pack, text
from unmask.diffusion.corrupt import CorruptionConfig, noisy_copies
from unmask.diffusion.objectives import (
    elbo_gains,
    entropy,
    preference_loss,
    token_nll,
    token_scores,
)


def setting(count: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """A vocabulary projection, hidden states, and targets of which every other one is the most probable token."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, 8, generator=generator, dtype=torch.float64)
    hidden = torch.randn(count, 8, generator=generator, dtype=torch.float64)
    logits = hidden @ weight.T
    logits[:, MASK] = float("-inf")
    order = logits.argsort(-1, descending=True)
    return weight, hidden, torch.tensor([int(order[i, i % 2]) for i in range(count)])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("chunk", [2048, 4, 1])
def test_scores_are_those_of_the_distribution(temperature: float, chunk: int) -> None:
    weight, hidden, target = setting()
    weight, hidden = weight.float(), hidden.float()
    scores = token_scores(lambda h: h @ weight.T, hidden, target, MASK, temperature=temperature, chunk=chunk)
    torch.testing.assert_close(scores.nll_N, token_nll(lambda h: h @ weight.T, hidden, target, MASK))
    keep = [i for i in range(VOCAB) if i != MASK]
    logits = (hidden @ weight.T)[:, keep].double()
    assert scores.correct_N.tolist() == [i % 2 == 0 for i in range(len(target))]
    torch.testing.assert_close(scores.confidence_N, logits.softmax(-1).amax(-1).float())
    probabilities = (logits / temperature).softmax(-1)
    expected = -(probabilities * probabilities.log()).sum(-1).float()
    torch.testing.assert_close(scores.entropy_N, torch.where(scores.correct_N, expected, 0.0), atol=1e-5, rtol=1e-5)


def test_entropy_of_known_distributions() -> None:
    inf = float("inf")
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -inf, -inf], [0.0, -inf, -inf, -inf]], requires_grad=True)
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(4), math.log(2), 0.0]))
    entropy(logits).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_gradient_of_confidence_is_that_of_right_predictions_alone() -> None:
    weight, hidden, target = setting()
    leaf = hidden.clone().requires_grad_()
    scores = token_scores(lambda h: h @ weight.T, leaf, target, MASK)
    (scores.entropy_N.sum() / scores.correct_N.sum()).backward()
    assert leaf.grad is not None
    moved = leaf.grad.abs().amax(-1) > 0
    assert moved.tolist() == scores.correct_N.tolist()
    # A step against the gradient makes right predictions surer.
    surer = token_scores(lambda h: h @ weight.T, hidden - 0.1 * leaf.grad, target, MASK).confidence_N
    assert (surer[scores.correct_N] > scores.confidence_N[scores.correct_N]).all()


def test_confidence_is_zero_with_zero_gradient_where_nothing_is_right() -> None:
    weight, hidden, target = setting()
    wrong = target.roll(1)
    leaf = hidden.clone().requires_grad_()
    scores = token_scores(lambda h: h @ weight.T, leaf, wrong, MASK)
    assert not scores.correct_N.any()
    loss = scores.entropy_N.sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert leaf.grad is None or not leaf.grad.any()


def test_preference_loss_is_log_2_at_no_margin_and_falls_with_it() -> None:
    margin = torch.tensor([0.0, 1.0, -1.0, 5.0])
    loss = preference_loss(margin, 0.1)
    assert float(loss[0]) == pytest.approx(math.log(2), abs=1e-7)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(-0.1 * margin)))
    assert loss[3] < loss[1] < loss[0] < loss[2]


def test_gains_are_sums_by_row_and_sample_with_the_right_sign() -> None:
    policy, reference = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 2.0, 5.0, 1.0])
    weight, row, sample = torch.tensor([2.0, 1.0, 1.0, 0.5]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    gains = elbo_gains(policy, reference, weight, row, sample, (2, 2))
    # A policy that thinks the tokens likelier (lower nll) has a higher ELBO: a positive gain.
    assert gains.tolist() == [[1.0, 0.0], [0.0, 2.0 - 1.5]]


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed_count"])
def test_draws_differ_and_divide_the_rates_evenly(sampling: str) -> None:
    rows = pack([[text(24, 0)]], 24)
    config = CorruptionConfig(MASK, 8, sampling=sampling, mask_samples=4)  # type: ignore[arg-type]
    copies = noisy_copies(rows, config, seed=1)
    assert len(copies) == config.num_copies == 4
    single = noisy_copies(rows, CorruptionConfig(MASK, 8, sampling=sampling), seed=1)  # type: ignore[arg-type]
    assert torch.equal(copies[0].masked_RL, single[0].masked_RL)
    assert len({tuple(copy.masked_RL.flatten().tolist()) for copy in copies}) == 4
    for block in range(3):
        quarters = sorted(float(copy.t_RL[0, 8 * block]) for copy in copies)
        if sampling == "bernoulli":
            steps = [b - a for a, b in pairwise(quarters)]
            assert steps == pytest.approx([0.25] * 3, abs=1e-6)
        else:
            assert [math.ceil(4 * t) for t in quarters] == [1, 2, 3, 4]


def test_a_block_of_one_token_needs_no_second_draw() -> None:
    config = CorruptionConfig(MASK, 1, mask_samples=8)
    assert config.num_copies == len(noisy_copies(pack([[text(3, 0)]], 4), config, 0)) == 1
