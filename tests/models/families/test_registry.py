"""Config keys and tensor names of every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import refused
from tiny import tiny_config
from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig, MoEConfig, RopeConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.families.registry import (
    FAMILIES,
    PUBLISHED,
    family_of,
    published_config,
    read_config,
    stored_tensors,
    write_config,
)

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
LING: dict[str, Any] = {
    **LLAMA, "model_type": "bailing_moe_v2", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
CONFIGS: dict[str, ModelConfig] = {
    "llama": tiny_config("llama", qkv_bias=True, out_bias=True, mlp_bias=True, eos_ids=(1, 2), pad_id=0),
    "llama diffusion": tiny_config("llama", tied_head=True).with_diffusion(mask_id=57, block_size=32),
    "shifted": tiny_config("qwen3").with_diffusion(mask_id=57, block_size=8, start_id=1),
    "qwen2": tiny_config("qwen2", rope=RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_positions=32)),
    "qwen3": tiny_config("qwen3", rope=RopeConfig(kind="linear", factor=2.0), bos_id=3, eos_ids=(4,)),
    "bailing_moe_v2": tiny_config("llada2"),
    "llada2_moe": replace(tiny_config("llada2", qkv_bias=True, out_bias=True, mask_id=57, block_size=8), family="llada2_moe"),
    "no shared experts": tiny_config(
        "llada2", moe=MoEConfig(num_experts=4, num_active=1, expert_size=8, num_shared=0, normalize=False)
    ),
    "two shared experts": tiny_config(
        "llada2", moe=MoEConfig(num_experts=4, num_active=2, expert_size=8, num_shared=2, num_dense_layers=2)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip(name: str) -> None:
    hf = write_config(CONFIGS[name], dtype="bfloat16")
    assert read_config(hf) == CONFIGS[name]
    assert hf["torch_dtype"] == "bfloat16"
    assert hf["architectures"] == [FAMILIES[CONFIGS[name].family].architecture]


@pytest.mark.parametrize("name", CONFIGS)
def test_stored_tensors_tile_every_parameter_exactly_once(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in Transformer(config).state_dict().items()}
    written = {key: torch.zeros(shape, dtype=torch.int32) for key, shape in shapes.items()}
    for disk, stored in stored_tensors(config).items():
        part = stored.view(written)
        assert tuple(part.shape) == stored.shape, disk
        part += 1
    assert all((count == 1).all() for count in written.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    config = read_config(published_config(name))
    with torch.device("meta"):
        model = Transformer(config)
    total, active = (16.26, 1.43) if "mini" in name else (102.9, 6.15)
    assert model.num_parameters() / 1e9 == pytest.approx(total, abs=0.05)
    assert model.num_active_parameters() / 1e9 == pytest.approx(active, abs=0.05)
    assert config.eos_ids == (156_892,)
    assert (config.mask_id, config.block_size) == ((156_895, 32) if "llada2" in name else (None, None))
    assert read_config(write_config(config)) == config


def test_unknown_preset_lists_the_known() -> None:
    with refused(ConfigError, "llada2-mini", "llada2-flash"):
        published_config("llada3")


def test_published_llada2_config_names_no_mask_token() -> None:
    hf = {key: value for key, value in published_config("llada2-mini").items() if key not in ("mask_token_id", "block_size")}
    assert (read_config(hf).mask_id, read_config(hf).block_size) == (156_895, 32)
    with refused(ConfigError, "vocab_size", 64, "mask_token_id"):
        read_config({**hf, "vocab_size": 64, "eos_token_id": 1, "pad_token_id": 1})


def test_llada2_ends_with_its_pad_token() -> None:
    hf = published_config("llada2-mini")
    del hf["eos_token_id"]
    assert read_config(hf).eos_ids == (156_892,)
    assert read_config({**published_config("ling-mini-2.0"), "eos_token_id": None}).eos_ids == ()


def test_published_tensor_names_of_ling() -> None:
    names = stored_tensors(CONFIGS["bailing_moe_v2"])
    assert {
        "model.word_embeddings.weight", "model.layers.0.attention.query_key_value.weight", "model.norm.weight",
        "model.layers.0.attention.dense.weight", "model.layers.1.attention.query_layernorm.weight",
        "model.layers.1.attention.key_layernorm.weight", "model.layers.2.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight", "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.expert_bias", "lm_head.weight",
        "model.layers.1.mlp.experts.7.down_proj.weight", "model.layers.1.mlp.shared_experts.up_proj.weight",
    } <= names.keys()  # fmt: skip
    assert not any("q_proj" in name for name in names)


def test_defaults_of_absent_keys() -> None:
    config = read_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.rope.theta) == (4, 8, 1e-6, 10_000.0)
    assert [config.tied_head, config.qkv_bias, config.mlp_bias, config.qk_norm] == [False] * 4
    assert read_config({**LLAMA, "model_type": "qwen3"}).head_dim == 128
    assert read_config({**LLAMA, "model_type": "qwen2"}).qkv_bias
    ling = read_config(LING)
    assert (ling.rope.fraction, ling.qk_norm) == (0.5, True)
    assert ling.moe is not None
    assert ling.moe.normalize
    single = read_config({**LING, "num_experts_per_tok": 1, "norm_topk_prob": True}).moe
    assert single is not None
    assert not single.normalize


def test_harmless_keys_are_kept_and_listed() -> None:
    hf = {**LLAMA, "initializer_range": 0.02, "use_cache": True, "transformers_version": "4.57", "pad_token_id": -1}
    config = read_config(hf)
    assert sorted(config.hf_extras) == ["initializer_range", "transformers_version", "use_cache"]
    assert write_config(config)["initializer_range"] == 0.02
    assert config.pad_id is None


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "gpt2"}, ("model_type", "'gpt2'", "llama", "qwen2")),
        ({"model_type": ["llama"]}, ("model_type", ["llama"])),
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
        ({"hidden_size": None}, ("'hidden_size'",)),
        ({"hidden_size": "32"}, ("hidden_size", "'32'")),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps", "'small'")),
        ({"tie_word_embeddings": "no"}, ("tie_word_embeddings", "'no'")),
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config",)),
        ({"rope_interleaved": True}, ("rope_interleaved", True)),
        ({"sliding_window": 4096}, ("sliding_window", 4096)),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, ("sliding_window", 16)),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types", "'sliding_attention'")),
        ({"layer_types": True}, ("layer_types", True, "list")),
        ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": "2"}, ("max_window_layers", "'2'")),
        ({"num_hidden_layers": 10**30}, ("num_layers", 10**30, "10,000")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", 0.5, "'llama'")),
        ({"block_size": "32"}, ("block_size", "'32'")),
        ({"mask_token_id": 64}, ("mask token id", 64)),
        ({"eos_token_id": ["</s>"]}, ("eos_token_id", "'</s>'")),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, ("attention heads", 3, 2)),
    ],
)
def test_unsupported_values_are_named(change: dict[str, Any], names: tuple[object, ...]) -> None:
    with refused(ConfigError, *names):
        read_config({**LLAMA, **change})


@pytest.mark.parametrize(
    "change",
    [{"score_function": "softmax"}, {"moe_router_enable_expert_bias": False}, {"norm_head": True}, {"n_group": 3}],
)
def test_unsupported_routers_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        read_config({**LING, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2},
        {"sliding_window": None},
        {"layer_types": ["full_attention", "full_attention"], "sliding_window": 64, "use_sliding_window": True},
    ],
)
def test_an_unused_window_is_accepted(change: dict[str, Any]) -> None:
    assert read_config({**LLAMA, "model_type": "qwen2", **change}).num_layers == 2


def test_tolerated_names() -> None:
    configs = tiny_config("llama", tied_head=True), tiny_config("llada2")
    tied, ling = (family_of(config).ignored_tensors(config) for config in configs)
    assert tied.fullmatch("model.layers.1.self_attn.rotary_emb.inv_freq")
    assert tied.fullmatch("lm_head.weight")
    assert not tied.fullmatch("model.layers.2.mlp.gate_proj.weight")
    assert not ling.fullmatch("lm_head.weight")
    assert ling.fullmatch("model.layers.3.eh_proj.weight")  # a next-token-prediction layer after the last
    assert not ling.fullmatch("model.layers.30.eh_proj.weight")
