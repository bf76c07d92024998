"""Compiled layers compute what the layers compute."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tiny import MASK, tiny_model
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.arch.transformer import Transformer
from unmask.train.fuse import fuse


def outcome(model: Transformer, length: int, noisy: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    tokens = torch.arange(2 * length).view(2, length) % 20
    attend = DenseAttend(torch.ones(2, length, length, dtype=torch.bool).tril())
    noisy_BT = tokens > 7 if noisy else None
    hidden = model(tokens, torch.arange(length).expand(2, -1), attend, noisy_BT=noisy_BT)
    hidden.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return hidden.detach(), gradients


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "llada2"])
def test_compiled_layers_equal_those_that_are_not(family: str) -> None:
    model = tiny_model(family, 1, torch.float64).train()
    compiled = deepcopy(model)
    fuse(compiled, backend="aot_eager")
    for length in (5, 9):
        torch.testing.assert_close(outcome(compiled, length, False), outcome(model, length, False), rtol=1e-9, atol=1e-9)


def test_gated_lora_is_compiled_too() -> None:
    model = add_gated_lora(tiny_model("llama", 1, torch.float64, mask_id=MASK, block_size=4, start_id=1), 2, seed=0).train()
    compiled = deepcopy(model)
    fuse(compiled, backend="eager")
    torch.testing.assert_close(outcome(compiled, 6, True), outcome(model, 6, True), rtol=1e-9, atol=1e-9)
