"""Mask rates: the interval, the law of t, how evenly a batch is covered, and the sign of the weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import refused
from unmask.diffusion.noise import NoiseKey
from unmask.diffusion.schedule import Bandwidth, elbo_weight, stratified_t
from unmask.errors import ConfigError

ZERO = torch.zeros((), dtype=torch.int64)


def discrepancy(t: Tensor) -> float:
    """Largest gap between the empirical distribution and the uniform one on [0, 1]."""
    ordered = t.flatten().double().sort().values
    steps = torch.arange(len(ordered) + 1) / len(ordered)
    return float(torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


@given(st.floats(0, 0.9), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_rates_lie_above_low_and_at_most_high(low: float, width: float, seed: int) -> None:
    high = min(1.0, low + width)
    t = stratified_t(NoiseKey(seed, torch.arange(50)), torch.arange(50), ZERO, Bandwidth(low, high))
    assert t.dtype == torch.float32
    assert (t > 0).all()
    assert (t >= torch.tensor(low)).all()
    assert (t <= torch.tensor(high)).all()
    assert float(t.max() - t.min()) > 0.5 * (high - low)


def test_scale_excludes_zero_and_includes_the_top() -> None:
    unit = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert Bandwidth().scale(unit).tolist() == [1.0, 2.0**-53]
    assert Bandwidth(0.3, 0.8).scale(torch.tensor([0.0, 0.5])).tolist() == pytest.approx([0.8, 0.55])


@pytest.mark.parametrize(("document", "block"), [(0, 0), (3, 17), (5 << 20, 2)])
def test_one_block_sees_every_rate_equally_often(document: int, block: int) -> None:
    t = stratified_t(NoiseKey(1, torch.arange(20_000)), torch.tensor(document), torch.tensor(block), Bandwidth(0.2, 0.7))
    counts = torch.histc((t.double() - 0.2) / 0.5, bins=50, min=0, max=1)
    assert counts.sum() == 20_000
    assert float(((counts - 400) ** 2 / 400).sum()) < 49 + 5 * 98**0.5


@pytest.mark.parametrize("stride", [1, 1 << 20])  # the packer's identities leave room for pieces
@pytest.mark.parametrize("shape", [(64, 1), (256, 1), (32, 8), (1, 128)])
def test_a_batch_covers_the_interval_more_evenly_than_independent_draws(stride: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    document, block = torch.arange(shape[0])[:, None] * stride, torch.arange(shape[1])[None]
    weyl = [discrepancy(stratified_t(NoiseKey(seed, ZERO), document, block, Bandwidth())) for seed in range(20)]
    independent = [discrepancy(torch.rand(shape, generator=generator)) for _ in range(20)]
    assert sum(weyl) < 0.5 * sum(independent)


def test_epochs_and_seeds_draw_other_rates() -> None:
    document = torch.arange(100)
    first = stratified_t(NoiseKey(0, ZERO), document, ZERO, Bandwidth())
    for key in (NoiseKey(1, ZERO), NoiseKey(0, ZERO + 1)):
        assert not torch.isclose(stratified_t(key, document, ZERO, Bandwidth()), first).any()


@given(st.permutations(range(8)), st.integers(1, 8))
def test_a_rate_depends_on_its_own_key_only(order: list[int], count: int) -> None:
    epoch, document, block = torch.arange(8) % 3, torch.arange(8) * 5, torch.arange(8) % 4
    whole = stratified_t(NoiseKey(2, epoch), document, block, Bandwidth())
    part = torch.tensor(order[:count])
    assert torch.equal(stratified_t(NoiseKey(2, epoch[part]), document[part], block[part], Bandwidth()), whole[part])


def test_weight_is_minus_the_slope_of_alpha_over_the_masked_share() -> None:
    t = torch.linspace(0.05, 1.0, 20, dtype=torch.float64, requires_grad=True)
    alpha = 1.0 - t
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    weight = elbo_weight(t.detach())
    torch.testing.assert_close(weight, -slope / (1 - alpha.detach()))
    assert (weight >= 1).all(), "a negative weight maximises the loss"


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.5), (0.5, 0.5), (0.8, 0.3), (0.0, 1.1)])
def test_impossible_bandwidths_are_refused(low: float, high: float) -> None:
    with refused(ConfigError, f"[{low}, {high}]", "low", "high"):
        Bandwidth(low, high)
