"""A new family is one class: registered in one place, it is read, written, saved, loaded and adapted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from tiny import tiny_model
from unmask.models.arch.config import ModelConfig
from unmask.models.families import registry
from unmask.models.families.base import ModelFamily
from unmask.models.families.hf_values import flag
from unmask.models.weights.adapter import attach_lora, save_adapter
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.export import export_model
from unmask.models.weights.loading import load_model


class Toy(ModelFamily):
    """A dense family with fused projections, other names, and a bias key of its own."""

    name = "toy"
    architecture = "ToyForCausalLM"
    rotary_fraction = 0.25
    embedding = "model.tokens"
    attention = "attn"
    attention_names: ClassVar = {"qkv": "fused", "out": "dense"}

    def read_own_keys(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": flag(hf, "projection_bias", False)}

    def write_own_keys(self, config: ModelConfig) -> dict[str, Any]:
        return {"projection_bias": config.qkv_bias}


@pytest.fixture(autouse=True)
def toy_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", {**registry.FAMILIES, Toy.name: Toy()})


def test_a_registered_family_is_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("llama", qkv_bias=True)
    model.config = replace(model.config, family=Toy.name, rope=replace(model.config.rope, fraction=0.5))
    save_model(model, tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    assert (hf["model_type"], hf["architectures"], hf["projection_bias"]) == ("toy", ["ToyForCausalLM"], True)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {"model.tokens.weight", "model.layers.1.attn.fused.bias", "model.layers.0.attn.dense.weight"} <= names
    loaded = load_model(tmp_path, dtype=torch.float32)
    assert loaded.config == model.config
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_registered_family_is_adapted_and_exported(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config = replace(model.config, family=Toy.name, rope=replace(model.config.rope, fraction=0.25))
    save_model(model, tmp_path / "base")
    attach_lora(model, rank=2, alpha=2.0, seed=0, train_embedding=True)
    save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
    exported = export_model(tmp_path / "adapter", tmp_path / "out")
    assert (exported.config, exported.notes) == (model.config, ())
    assert torch.equal(load_model(tmp_path / "out", dtype=torch.float32).embed.weight, model.embed.weight)
