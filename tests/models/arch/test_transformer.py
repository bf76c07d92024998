"""Growing the vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import refused
from models.weights.saved import loads_as
from tiny import tiny_model
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import resize_vocabulary
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
