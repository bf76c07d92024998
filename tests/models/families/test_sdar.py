"""SDAR: names and keys held against what SGLang and LMDeploy read of them.

Neither program runs here. `TENSORS` and `KEYS` were written down from their sources, independently of ours:
`python/sglang/srt/models/sdar.py` and `srt/dllm/config.py` of SGLang, `lmdeploy/pytorch/models/sdar.py` and
`configurations/sdar.py` of LMDeploy.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import refused
from tiny import causal_logits, tiny_config, tiny_model
from unmask.errors import CheckpointError, ConfigError
from unmask.models.families.registry import read_config, write_config
from unmask.models.families.sdar import as_sdar
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.export import export_model
from unmask.models.weights.loading import load_model

DIFFUSION: dict[str, Any] = {"mask_id": 57, "block_size": 8, "eos_ids": (3,), "pad_id": 4}
# Shapes by name, of hidden size 32, 4 heads and 2 kv heads of 8, feed-forward 48 and 61 tokens.
LAYER_TENSORS = {
    "input_layernorm.weight": (32,), "self_attn.q_proj.weight": (32, 32), "self_attn.k_proj.weight": (16, 32),
    "self_attn.v_proj.weight": (16, 32), "self_attn.o_proj.weight": (32, 32), "self_attn.q_norm.weight": (8,),
    "self_attn.k_norm.weight": (8,), "post_attention_layernorm.weight": (32,), "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32), "mlp.down_proj.weight": (32, 48),
}  # fmt: skip
TENSORS = {
    "model.embed_tokens.weight": (61, 32), "model.norm.weight": (32,), "lm_head.weight": (61, 32),
    **{f"model.layers.{layer}.{name}": shape for layer in range(2) for name, shape in LAYER_TENSORS.items()},
}  # fmt: skip
# SGLang and LMDeploy read all of them but the last two, which are ours and LLaDA2's.
KEYS = {
    "architectures": ["SDARForCausalLM"], "model_type": "sdar", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "max_position_embeddings": 128, "vocab_size": 61,
    "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "sliding_window": None,
    "use_sliding_window": False, "max_window_layers": 2, "pad_token_id": 4, "eos_token_id": 3, "torch_dtype": "float32",
    "mask_token_id": 57, "block_size": 8,
}  # fmt: skip


def saved(folder: Path, **changes: Any) -> Path:
    rope = replace(tiny_config("qwen3").rope, theta=1e6)
    save_model(tiny_model("qwen3", std=0.2, **({"num_kv_heads": 2, "rope": rope} | DIFFUSION | changes)), folder)
    return folder


def test_what_sglang_and_lmdeploy_read(tmp_path: Path) -> None:
    exported = export_model(saved(tmp_path / "source"), tmp_path / "out", sdar=True)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: hf.get(key, "absent") for key in KEYS} == KEYS
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == TENSORS
    # transformers knows no model_type sdar: both programs take the config class from the folder.
    assert hf["auto_map"]["AutoConfig"] == "configuration_unmask.UnmaskConfig"
    assert 'model_type = "sdar"' in (tmp_path / "out" / "configuration_unmask.py").read_text()
    assert json.loads((tmp_path / "out" / "sglang_dllm.yaml").read_text()) == {"block_size": 8, "threshold": 0.95}
    mask, block = exported.notes
    assert "151669" in mask
    assert "57" in mask
    assert "blocks of 4" in block
    assert "--dllm-block-length 8" in block


def test_the_import_is_the_same_to_the_bit(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    export_model(source, tmp_path / "out", sdar=True)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours, imported = (load_model(folder, dtype=torch.float32) for folder in (source, tmp_path / "out"))
    assert torch.equal(causal_logits(imported), causal_logits(ours))
    assert replace(imported.config, family="qwen3", hf_extras={}) == ours.config
    export_model(tmp_path / "out", tmp_path / "again", sdar=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()
    }
    export_model(tmp_path / "out", tmp_path / "plain")
    assert read_model_config(tmp_path / "plain") == imported.config


def test_nothing_to_note_where_their_assumptions_hold(tmp_path: Path) -> None:
    changes = {"vocab_size": 151_936, "hidden_size": 4, "num_layers": 1, "mask_id": 151_669, "block_size": 4}
    assert export_model(saved(tmp_path / "source", **changes), tmp_path / "out", sdar=True).notes == ()


def test_published_configs_name_neither_mask_nor_block_size() -> None:
    hf = write_config(replace(as_sdar(tiny_config("qwen3", **DIFFUSION)), vocab_size=151_936))
    for key in ("mask_token_id", "block_size"):
        del hf[key]
    config = read_config(hf)
    assert (config.mask_id, config.block_size) == (151_669, 4)
    with refused(ConfigError, "mask_token_id", "vocab_size"):
        read_config(hf | {"vocab_size": 61})


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("llama", DIFFUSION, ("qwen3", "'llama'", "remote code")),
        ("llada2", DIFFUSION, ("qwen3", "'bailing_moe_v2'")),
        ("qwen3", {}, ("mask_token_id", "convert")),
        ("qwen3", DIFFUSION | {"start_id": 1}, ("shift_start_token_id", "remote code")),
        ("qwen3", DIFFUSION | {"start_id": 1, "gated_lora_rank": 2}, ("gated_lora_rank", "remote code")),
    ],
)
def test_what_sdar_does_not_compute_is_refused(family: str, changes: dict[str, Any], names: tuple[str, ...]) -> None:
    with refused(CheckpointError, *names):
        as_sdar(tiny_config(family, **changes))
