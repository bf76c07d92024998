"""Adapters to and from the peft library: the same logits, and nothing of a config ignored."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers import refused
from models.weights.saved import saved_base
from tiny import causal_logits, perturb
from unmask.errors import CheckpointError, ConfigError
from unmask.models.arch.transformer import resize_vocabulary
from unmask.models.weights.adapter import attach_lora, load_adapter, save_adapter
from unmask.models.weights.loading import load_model
from unmask.models.weights.peft_keys import ModuleLora, read_settings, write_settings

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.arange(24)[None] % 50
MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(3) for name in "qkv"]


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    return model.eval()(TOKENS).logits


def their_base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("train_embedding", [True, False])
@pytest.mark.parametrize("tied_head", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_peft_reads_ours(family: str, tied_head: bool, train_embedding: bool, tmp_path: Path) -> None:
    base = saved_base(family, tmp_path / "base", tied_head=tied_head)
    model = load_model(base, dtype=torch.float32)
    before = causal_logits(model)
    attach_lora(model, rank=4, alpha=6.0, seed=0, train_embedding=train_embedding)
    perturb(model)
    expected = causal_logits(model)
    assert (expected - before).abs().max() > 0.5
    save_adapter(model, tmp_path / "adapter", base=str(base))
    theirs = peft.PeftModel.from_pretrained(their_base(base), str(tmp_path / "adapter"))
    torch.testing.assert_close(their_logits(theirs), expected, atol=1e-4, rtol=0)
    with theirs.disable_adapter():
        torch.testing.assert_close(their_logits(theirs), before, atol=1e-4, rtol=0)
    torch.testing.assert_close(their_logits(theirs.merge_and_unload()), expected, atol=1e-4, rtol=0)
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32, attn_implementation="eager")
    torch.testing.assert_close(their_logits(by_name), expected, atol=1e-4, rtol=0)
    folded = load_model(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(causal_logits(folded), expected, atol=1e-4, rtol=0)


def test_peft_reads_ours_with_a_new_token(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "base", tied_head=True)
    model = load_model(base, dtype=torch.float32)
    resize_vocabulary(model, 62)
    attach_lora(model, rank=2, alpha=2.0, seed=0, train_embedding=True)
    perturb(model)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    theirs = their_base(base)
    theirs.resize_token_embeddings(62)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))
    torch.testing.assert_close(their_logits(theirs), causal_logits(model), atol=1e-4, rtol=0)


CASES: dict[str, dict[str, Any]] = {
    "a subset of the modules": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "one part of a fused layer": {"target_modules": ["k_proj"]},
    "one layer": {"target_modules": ["model.layers.1.mlp.gate_proj"]},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q_proj|up_proj)"},
    "all linear layers": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\..*q_proj": 5},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 1},
        "use_rslora": True,
    },
    "whole embedding and head": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_we_read_peft_s(case: str, tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "base")
    torch.manual_seed(0)  # peft draws from the global generator
    theirs = peft.get_peft_model(their_base(base), peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **CASES[case]))
    perturb(theirs)
    expected = their_logits(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    ours = load_model(base, dtype=torch.float32)
    assert (causal_logits(ours) - expected).abs().max() > 0.1
    load_adapter(ours, tmp_path / "adapter")
    torch.testing.assert_close(causal_logits(ours), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        causal_logits(load_model(tmp_path / "adapter", dtype=torch.float32)), expected, atol=1e-4, rtol=0
    )
    save_adapter(ours, tmp_path / "ours", base=str(base))
    back = peft.PeftModel.from_pretrained(their_base(base), str(tmp_path / "ours"))
    torch.testing.assert_close(their_logits(back), expected, atol=1e-4, rtol=0)


def test_we_read_a_vocabulary_that_peft_grew(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "base", tied_head=True)
    theirs = their_base(base)
    theirs.resize_token_embeddings(64)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    perturb(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = load_model(tmp_path / "adapter", dtype=torch.float32)
    assert ours.config.vocab_size == 64
    torch.testing.assert_close(causal_logits(ours), their_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"peft_type": "LOHA"}, {"peft_type": None},
        {"init_lora_weights": "pissa"}, {"layers_to_transform": [1]}, {"trainable_token_indices": [3]}, {"revision": "v2"},
        {"target_parameters": ["mlp.experts.gate_up_proj"]}, {"exclude_modules": ["q_proj"]}, {"fan_in_fan_out": True},
        {"made_up_next_year": 0.5},
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "base")
    model = attach_lora(load_model(base, dtype=torch.float32), rank=1, alpha=1.0, seed=0, train_embedding=False)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    key = next(iter(changes))
    with refused(CheckpointError, "adapter_config.json", key, "peft"):
        load_model(tmp_path / "adapter", dtype=torch.float32)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"target_modules": ["query"]}, ("query",)),
        ({"target_modules": None}, ("target_modules", "list")),
        ({"r": 0}, ("rank", 0)),
        ({"r": 2.5}, ("rank", 2.5)),
        ({"lora_alpha": "8"}, ("lora_alpha", "'8'")),
        ({"target_modules": "("}, ("'('", "regular expression")),
        ({"rank_pattern": {"(": 2}}, ("'('", "regular expression")),
        ({"rank_pattern": ["q_proj"]}, ("rank_pattern", "object")),
        ({"modules_to_save": "lm_head"}, ("modules_to_save", "'lm_head'", "list")),
    ],
)
def test_values_of_the_wrong_kind(changes: dict[str, Any], names: tuple[object, ...]) -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    with refused(ConfigError, *names):
        read_settings(settings, MODULES)


def test_an_unnamed_kind_of_adapter_is_refused() -> None:
    with refused(ConfigError, "peft_type", None):
        read_settings({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, MODULES)


def test_written_settings_read_back() -> None:
    pairs = {
        "model.layers.0.self_attn.q_proj": ModuleLora(4, 8.0),
        "model.layers.1.self_attn.q_proj": ModuleLora(4, 8.0),
        "model.layers.2.self_attn.q_proj": ModuleLora(2, 8.0),
        "model.layers.0.self_attn.k_proj": ModuleLora(4, 7.1),
    }
    settings = write_settings(pairs, MODULES, base="here", modules_to_save=None)
    assert settings["target_modules"] == ["model.layers.0.self_attn.k_proj", "q_proj"]
    assert read_settings(json.loads(json.dumps(settings)), MODULES) == pairs
    assert ModuleLora(4, 7.0).scale == 1.75
