"""Compiled layers compute what the layers compute, where the recipe wants them."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Literal

import pytest
import torch

from helpers import refused
from runs import tiny_recipe
from tiny import MASK, tiny_model
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.arch.transformer import Transformer
from unmask.train.fuse import fuse
from unmask.train.recipe import Recipe
from unmask.train.run import build_components


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


def test_a_cpu_compiles_only_where_the_recipe_asks_for_it(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    compiled: list[Transformer] = []
    monkeypatch.setattr("unmask.train.fuse.fuse", compiled.append)
    wishes: list[Literal["always"] | bool] = [True, False, "always"]
    models = [build_components(compiling(base, wish)).model for wish in wishes]
    assert compiled == models[-1:]


def test_compiling_on_a_cpu_takes_a_compiler(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setattr("unmask.train.run.which", lambda name: None)
    with refused(ConfigError, "train.compile is always", "g++"):
        build_components(compiling(base, "always"))


def compiling(base: Path, wish: Literal["always"] | bool) -> Recipe:
    recipe = tiny_recipe(base / "model", base / "data.jsonl")
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": wish, "device": "cpu"})})
