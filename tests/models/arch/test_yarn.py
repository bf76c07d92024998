"""A stretched context: YaRN by its formula, the same weights, and what cannot be stretched."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import refused
from tiny import tiny_config, tiny_model
from unmask.diffusion.masks import block_causal_mask
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.layers import rope_frequencies
from unmask.models.arch.yarn import stretch_context


def test_weights_are_shared_and_frequencies_are_yarns() -> None:
    model = tiny_model("llama")
    longer = stretch_context(model, 4)
    assert longer.config.max_positions == 4 * model.config.max_positions
    for name, tensor in model.state_dict().items():
        assert longer.state_dict()[name].data_ptr() == tensor.data_ptr()
    plain, scaled = model.inv_freq, longer.inv_freq
    assert torch.equal(scaled, rope_frequencies(longer.config.rope, longer.config.rotary_dim)[0])
    # Fast rotations stay, the slowest is interpolated by the factor; attention is sharpened.
    assert scaled[0] == plain[0]
    assert float(plain[-1] / scaled[-1]) == pytest.approx(4.0, rel=1e-3)
    assert longer.rope_factor == pytest.approx(0.1 * math.log(4) + 1)


def test_positions_beyond_the_old_context_work() -> None:
    model = stretch_context(tiny_model("llama"), 2)
    tokens = torch.randint(0, 50, (1, 200), generator=torch.Generator().manual_seed(0))
    hidden = model(tokens, torch.arange(200)[None], DenseAttend(block_causal_mask(200, 200, 1)[None]))
    assert bool(torch.isfinite(model.head(hidden)).all())


@pytest.mark.parametrize("factor", [1.0, 0.5, math.inf, math.nan])
def test_factors_that_do_not_stretch(factor: float) -> None:
    with refused(ConfigError, "factor", f"{factor:g}"):
        stretch_context(tiny_model("llama"), factor)


def test_a_scaled_model_is_not_scaled_again() -> None:
    longer = stretch_context(tiny_model("llama"), 2)
    assert longer.config.rope.kind == "yarn"
    assert tiny_config("llama").rope.kind == "default"
    with refused(ConfigError, "rope.kind"):
        stretch_context(longer, 2)
