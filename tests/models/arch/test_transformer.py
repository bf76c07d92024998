"""Growing the vocabulary, and activation checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import refused
from models.weights.saved import loads_as
from tiny import FAMILIES, tiny_model
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Checkpointing, resize_vocabulary
from unmask.models.weights.checkpoint import save_model


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["untied", "tied"])
def test_new_tokens_start_as_the_mean(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = model.config.vocab_size
    resize_vocabulary(model, size + 2)
    after = model.state_dict()
    grown = {"embed.weight"} | ({"lm_head.weight"} if family == "llama" else set())
    for name, tensor in before.items():
        assert torch.equal(after[name][:size] if name in grown else after[name], tensor)
    for name in grown:
        assert after[name].shape[0] == size + 2
        torch.testing.assert_close(after[name][size:], before[name].mean(0).expand(2, -1))
    assert model.config.vocab_size == size + 2
    save_model(model, tmp_path)
    assert loads_as(tmp_path, model) == [True]
    hidden = model(torch.tensor([[size + 1]]), torch.zeros(1, 1, dtype=torch.int64), DenseAttend(None))
    assert model.head(hidden).shape == (1, 1, size + 2)
    with refused(ConfigError, "vocabulary size", size, size + 2):
        resize_vocabulary(model, size)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_no_gradient(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    tokens = torch.arange(24)[None]
    products, gradients = {}, {}
    choices: tuple[Checkpointing, ...] = (False, "selective", True)
    for choice in choices:
        model.zero_grad()
        model.activation_checkpointing = choice
        with FlopCounterMode(display=False) as counter:
            model.head(model(tokens, tokens, DenseAttend(None))).square().sum().backward()
        products[choice] = counter.get_total_flops()
        gradients[choice] = [p.grad for p in model.parameters()]
    for choice in choices:
        assert all(torch.equal(a, b) for a, b in zip(gradients[choice], gradients[False], strict=True) if a is not None)
    assert products["selective"] < products[True]
    # The last products of experts are computed again, those of dense layers need nobody.
    assert (products["selective"] > products[False]) == (family == "llada2")
