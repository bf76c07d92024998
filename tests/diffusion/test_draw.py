"""Draws by partial selection: the tokens of the plain definition, which sorts whole rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from plain_sampling import filtered, plain_draw
from unmask.diffusion.draw import draw
from unmask.engine.sampling_params import ResolvedParams

VOCAB = 40_007
"""No multiple of anything."""


def probabilities(seed: int, scale: float, *, steps: float | None, count: int = 4, vocab_size: int = VOCAB) -> Tensor:
    """Distributions of random logits, rounded to `steps` a nat: then many tokens are equally probable."""
    logits_NV = scale * torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed))
    if steps is not None:
        logits_NV = logits_NV.mul(steps).round().div(steps)
    logits_NV[:, 5:9] = float("-inf")
    return logits_NV.softmax(-1)


def uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"top_p": 0.9},
    {"top_p": 0.013},
    {"top_p": 0.9999},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 700},
    {"top_k": 10**6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"min_p": 0.02, "top_k": 90, "top_p": 0.95},
)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize(("scale", "steps"), [(4.0, None), (1.0, None), (3.0, 4.0), (1.0, 1.0), (0.0, None)])
def test_draws_are_those_of_the_plain_definition(filters: dict[str, Any], scale: float, steps: float | None) -> None:
    """Peaked, flat, tied and constant distributions."""
    params, p_NV, u_N = ResolvedParams(temperature=1.0, **filters), probabilities(3, scale, steps=steps), uniform(7, 4)
    assert torch.equal(draw(p_NV, u_N, params), plain_draw(p_NV, u_N, params))


@given(st.integers(0, 1000), st.sampled_from(FILTERS), st.sampled_from([0.5, 2.0, 6.0]), st.sampled_from([None, 1.0, 8.0]))
def test_small_vocabularies_too(seed: int, filters: dict[str, Any], scale: float, steps: float | None) -> None:
    params = ResolvedParams(temperature=1.0, **filters)
    p_NV, u_N = probabilities(seed, scale, steps=steps, vocab_size=11 + seed % 2500), uniform(seed, 4)
    assert torch.equal(draw(p_NV, u_N, params), plain_draw(p_NV, u_N, params))


@pytest.mark.parametrize("filters", [{"top_p": 0.6}, {"top_k": 70}, {"min_p": 0.1}, {"top_k": 90, "top_p": 0.6}], ids=str)
@pytest.mark.parametrize("steps", [None, 2.0])
def test_all_that_is_kept_is_drawn_and_nothing_else(filters: dict[str, Any], steps: float | None) -> None:
    """One row, drawn from everywhere in it: the kept set is exactly the plain one, ties included."""
    params, p_1V = ResolvedParams(temperature=1.0, **filters), probabilities(1, 2.5, steps=steps, count=1, vocab_size=6000)
    kept = torch.nonzero(filtered(p_1V, params)[0])[:, 0]
    cdf_K = filtered(p_1V, params)[0, kept].double().cumsum(-1)
    middle_K = (cdf_K - filtered(p_1V, params)[0, kept].double() / 2) / cdf_K[-1]
    assert torch.equal(draw(p_1V.expand(len(kept), -1), middle_K, params), kept)
    assert len(kept) > 8


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_ends_of_the_unit_interval_draw_tokens_with_mass(filters: dict[str, Any]) -> None:
    p_NV = torch.zeros(2, 3000)
    p_NV[:, [700, 701, 2100]] = torch.tensor([0.5, 0.2, 0.3])
    u_N = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    low, high = draw(p_NV, u_N, ResolvedParams(temperature=1.0, **filters)).tolist()
    assert low == 700
    assert p_NV[0, high] > 0


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_row_does_not_depend_on_the_others(filters: dict[str, Any]) -> None:
    """Some need more of the vocabulary than others."""
    params, u_N = ResolvedParams(temperature=1.0, **filters), uniform(2, 6)
    p_NV = torch.cat([probabilities(4, scale, steps=None, count=2) for scale in (0.5, 2.0, 6.0)])
    alone = [draw(p_NV[row : row + 1], u_N[row : row + 1], params) for row in range(6)]
    assert torch.equal(draw(p_NV, u_N, params), torch.cat(alone))
