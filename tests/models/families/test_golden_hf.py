"""Logits equal transformers' for every dense family, in both directions of the mapping, and for every rotary scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.loading import load_model

TOLERANCE = 1e-4
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "llama untied, grouped heads": LlamaConfig(**SIZES),
    "llama tied, biases": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, head_dim of its own": LlamaConfig(**SIZES, head_dim=16),
    "llama llama3 rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama yarn, own attention factor and betas": LlamaConfig(
        **SIZES, rope_parameters={**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}
    ),
    "llama yarn, mscale": LlamaConfig(**SIZES, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}),
    "llama linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "qwen2 untied": Qwen2Config(**SIZES),
    "qwen2 tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3 untied": Qwen3Config(**SIZES, head_dim=16),
    "qwen3 tied, biases": Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True, attention_bias=True),
    "qwen3 yarn": Qwen3Config(**SIZES, head_dim=16, rope_parameters=YARN),
}


def their_model(config: Any) -> PreTrainedModel:
    """A random model in which no tensor is trivial: norms and biases too, so that a misplaced one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if "norm" in name else 0.0)
    return model


def our_logits(model: Transformer, tokens_BT: torch.Tensor) -> torch.Tensor:
    batch, length = tokens_BT.shape
    causal = torch.ones(batch, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        hidden = model(tokens_BT, torch.arange(length).expand(batch, length), DenseAttend(causal))
        return model.head(hidden)


def tokens() -> torch.Tensor:
    # Longer than the original length of the scaled ropes, so that scaling is seen at large positions too.
    return torch.randint(0, SIZES["vocab_size"], (2, 100), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
def test_reads_what_transformers_saved(case: str, tmp_path: Path) -> None:
    theirs = their_model(CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(ours, tokens()), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_saved(case: str, tmp_path: Path) -> None:
    theirs = their_model(CASES[case])
    theirs.save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs", dtype=torch.float32), tmp_path / "ours", max_shard_bytes=40_000)
    back, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(back(tokens()).logits, theirs(tokens()).logits, atol=0, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_saves_transformers_names_and_values(case: str, tmp_path: Path) -> None:
    their_model(CASES[case]).save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs", dtype=torch.float32), tmp_path / "ours")
    with (
        safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as theirs,
        safe_open(tmp_path / "ours" / "model.safetensors", "pt") as ours,
    ):
        assert sorted(ours.keys()) == sorted(theirs.keys())
        for name in theirs.keys():  # noqa: SIM118 (not a dict)
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name


def test_reads_the_spelling_of_transformers_4(tmp_path: Path) -> None:
    theirs = their_model(CASES["llama llama3 rope"])
    theirs.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    rope = hf.pop("rope_parameters")
    hf["rope_theta"] = rope.pop("rope_theta")
    hf["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    hf["torch_dtype"] = hf.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(hf))
    ours = load_model(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(our_logits(ours, tokens()), theirs(tokens()).logits, atol=TOLERANCE, rtol=0)
