"""Model families as published on Hugging Face: their config keys and their tensor names, both ways.

Owns what a `config.json` key means and where each tensor on disk lies inside our fused parameters. Knows no file, no dtype
and no weights.

Legend: D hidden, F feed-forward, H query heads, G kv heads, S head dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig, MoEConfig
from unmask.models.families.hf_values import eos, flag, integer, number, token
from unmask.models.families.rope_keys import ROPE_KEYS, read_rope, write_rope


@dataclass(frozen=True)
class Slot:
    """Where one tensor on disk belongs: `state_dict()[parameter][index]`, which has shape `shape`."""

    parameter: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What distinguishes a family: its architecture, its defaults for absent keys, and its tensor names."""

    architecture: str
    qk_norm: bool = False
    fused_qkv: bool = False
    rotary_fraction: float = 1.0
    head_dim: int | None = None
    embedding: str = "model.embed_tokens"
    attention: str = "self_attn"
    out: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"


_LING = {
    "qk_norm": True, "fused_qkv": True, "rotary_fraction": 0.5, "embedding": "model.word_embeddings",
    "attention": "attention", "out": "dense", "query_norm": "query_layernorm", "key_norm": "key_layernorm",
}  # fmt: skip
FAMILIES: Mapping[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM"),
    "qwen2": Family(architecture="Qwen2ForCausalLM"),
    "qwen3": Family(architecture="Qwen3ForCausalLM", qk_norm=True, head_dim=128),
    "bailing_moe_v2": Family(architecture="BailingMoeV2ForCausalLM", **_LING),  # type: ignore[arg-type]
    "llada2_moe": Family(architecture="LLaDA2MoeModelLM", **_LING),  # type: ignore[arg-type]
}

# The published LLaDA2 checkpoints leave these two out of config.json; their vocabulary identifies them.
LLADA2_VOCABULARY = 157_184
LLADA2_MASK_ID = 156_895
LLADA2_BLOCK_SIZE = 32

_SHARED_KEYS = ROPE_KEYS | {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "block_size",
    "shift_start_token_id", "gated_lora_rank", "torch_dtype", "dtype", "hidden_act", "num_nextn_predict_layers",
}  # fmt: skip
_BIAS_KEYS = {"llama": {"attention_bias", "mlp_bias"}, "qwen2": set[str](), "qwen3": {"attention_bias"}}
_LING_KEYS = {
    "use_qkv_bias", "use_bias", "use_qk_norm", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "num_shared_experts", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace",
}  # fmt: skip
# Keys that change the computation, and the only values for which they do not.
_REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "rope_interleave": (None, False),
    "norm_head": (None, False),
    "use_rmsnorm": (None, True),
    "score_function": (None, "sigmoid"),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "moe_router_enable_expert_bias": (None, True),
    "no_rope_layers": (None, []),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Our record of a Hugging Face config.

    Args:
        hf: parsed config.json, as written by transformers 4 or 5 or by the models' remote code.

    Raises:
        ConfigError: an unknown family, a missing or ill-typed key, or a key whose value changes the computation in a way
            that is not supported.
    """
    name = _family_name(hf)
    family = FAMILIES[name]
    _reject_unsupported(hf)
    hidden_size, num_heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    max_positions = integer(hf, "max_position_embeddings")
    biases = _read_biases(name, hf)
    mask_id, block_size = _read_diffusion(name, hf)
    config = ModelConfig(
        family=name,
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=integer(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=integer(hf, "num_key_value_heads", num_heads),
        head_dim=integer(hf, "head_dim", family.head_dim or hidden_size // max(num_heads, 1)),
        ffn_size=integer(hf, "intermediate_size"),
        max_positions=max_positions,
        norm_eps=number(hf, "rms_norm_eps", 1e-6),
        rope=read_rope(hf, max_positions=max_positions, default_fraction=family.rotary_fraction),
        qkv_bias=biases[0], out_bias=biases[1], mlp_bias=biases[2],
        qk_norm=flag(hf, "use_qk_norm", True) if family.fused_qkv else family.qk_norm,
        tied_head=flag(hf, "tie_word_embeddings", False),
        moe=_read_moe(hf) if family.fused_qkv else None,
        bos_id=token(hf, "bos_token_id"),
        eos_ids=eos(hf) or (eos({"eos_token_id": hf.get("pad_token_id")}) if name == "llada2_moe" else ()),
        pad_id=token(hf, "pad_token_id"),
        mask_id=mask_id,
        block_size=block_size,
        start_id=token(hf, "shift_start_token_id"),
        gated_lora_rank=None if hf.get("gated_lora_rank") is None else integer(hf, "gated_lora_rank"),
        hf_extras={key: value for key, value in hf.items() if key not in _known_keys(name)},
    )  # fmt: skip
    if not family.fused_qkv and config.rope.fraction != 1.0:
        raise ConfigError(f"partial_rotary_factor is {config.rope.fraction}; family '{name}' rotates the whole head (1.0)")
    return config


def write_config(config: ModelConfig, *, dtype: str | None = None) -> dict[str, Any]:
    """The Hugging Face config.json of `config`; `read_config` gives `config` back.

    Args:
        config: any supported family; a diffusion model adds `mask_token_id` and `block_size`, shifted `shift_start_token_id`,
            with gated updates `gated_lora_rank`.
        dtype: dtype of the stored weights as Hugging Face spells it ("bfloat16"), or None to leave it out.
    """
    family = FAMILIES[config.family]
    hf: dict[str, Any] = {
        **config.hf_extras,
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        **write_rope(config.rope, default_fraction=family.rotary_fraction),
    }
    if config.family in ("llama", "qwen3"):
        hf["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        hf["mlp_bias"] = config.mlp_bias
    if config.moe is not None:
        hf |= _write_moe(config, config.moe)
    if config.mask_id is not None:
        hf["mask_token_id"] = config.mask_id
    if config.block_size is not None:
        hf["block_size"] = config.block_size
    if config.start_id is not None:
        hf["shift_start_token_id"] = config.start_id
    if config.gated_lora_rank is not None:
        hf["gated_lora_rank"] = config.gated_lora_rank
    if dtype is not None:
        hf["torch_dtype"] = dtype
    return hf


def ignored_keys(config: ModelConfig) -> tuple[str, ...]:
    """Hugging Face keys kept for the next save but without effect on the computation here, sorted."""
    return tuple(sorted(config.hf_extras))


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor a checkpoint of `config` holds: its name on disk and its place in our state dict."""
    family = FAMILIES[config.family]
    vocabulary = (config.vocab_size, config.hidden_size)
    found = {f"{family.embedding}.weight": Slot("embed.weight", (), vocabulary)}
    for layer in range(config.num_layers):
        disk, ours = f"model.layers.{layer}", f"blocks.{layer}"
        norm = (config.hidden_size,)
        found[f"{disk}.input_layernorm.weight"] = Slot(f"{ours}.attention_norm.weight", (), norm)
        found |= _attention_slots(config, family, f"{disk}.{family.attention}", f"{ours}.attention")
        found[f"{disk}.post_attention_layernorm.weight"] = Slot(f"{ours}.mlp_norm.weight", (), norm)
        if config.moe is not None and config.is_moe_layer(layer):
            found |= _moe_slots(config.hidden_size, config.moe, f"{disk}.mlp", f"{ours}.mlp")
        else:
            found |= _ffn_slots(config.hidden_size, config.ffn_size, config.mlp_bias, f"{disk}.mlp", f"{ours}.mlp")
    found["model.norm.weight"] = Slot("norm.weight", (), (config.hidden_size,))
    if not config.tied_head:
        found["lm_head.weight"] = Slot("lm_head.weight", (), vocabulary)
    return found if config.gated_lora_rank is None else found | _gated_slots(found, config.gated_lora_rank, config.hidden_size)


def _gated_slots(found: Mapping[str, Slot], rank: int, hidden: int) -> dict[str, Slot]:
    """Of the updates beside the linear layers and of the mask vector; on disk they have our names, nobody else having any."""
    linear = dict[str, tuple[int, int]]()
    for slot in found.values():
        if slot.parameter.startswith("blocks.") and len(slot.shape) == 2:
            layer = slot.parameter.removesuffix(".weight")
            linear[layer] = (linear.get(layer, (0, 0))[0] + slot.shape[0], slot.shape[1])
    gated = {"gated.mask_vector": Slot("mask_vector", (), (hidden,))}
    for layer, (outputs, inputs) in linear.items():
        gated[f"gated.{layer}.in"] = Slot(f"{layer}.gated_in", (), (rank, inputs))
        gated[f"gated.{layer}.out"] = Slot(f"{layer}.gated_out", (), (outputs, rank))
    return gated


def tolerated(config: ModelConfig) -> re.Pattern[str]:
    """Names that may lie in a checkpoint and are skipped: rotary tables, a tied head's copy, next-token-prediction layers."""
    names = [r"(.*\.)?rotary_emb\.inv_freq"]
    if config.tied_head:
        names.append(r"lm_head\.weight")
    if config.moe is not None:
        # Ling stores its multi-token-prediction layers after the last decoder layer; the main model never runs them.
        names.append(rf"model\.layers\.{config.num_layers}\..*")
    return re.compile("|".join(names))


def _attention_slots(config: ModelConfig, family: Family, disk: str, ours: str) -> dict[str, Slot]:
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {"q_proj": (0, q_rows), "k_proj": (q_rows, q_rows + kv_rows), "v_proj": (q_rows + kv_rows, config.qkv_size)}
    if family.fused_qkv:
        parts = {"query_key_value": (0, config.qkv_size)}
    found = {}
    for name, (start, stop) in parts.items():
        rows = (slice(start, stop),)
        found[f"{disk}.{name}.weight"] = Slot(f"{ours}.qkv.weight", rows, (stop - start, config.hidden_size))
        if config.qkv_bias:
            found[f"{disk}.{name}.bias"] = Slot(f"{ours}.qkv.bias", rows, (stop - start,))
    found[f"{disk}.{family.out}.weight"] = Slot(f"{ours}.out.weight", (), (config.hidden_size, q_rows))
    if config.out_bias:
        found[f"{disk}.{family.out}.bias"] = Slot(f"{ours}.out.bias", (), (config.hidden_size,))
    if config.qk_norm:
        found[f"{disk}.{family.query_norm}.weight"] = Slot(f"{ours}.query_norm.weight", (), (config.head_dim,))
        found[f"{disk}.{family.key_norm}.weight"] = Slot(f"{ours}.key_norm.weight", (), (config.head_dim,))
    return found


def _ffn_slots(hidden: int, ffn: int, bias: bool, disk: str, ours: str) -> dict[str, Slot]:
    found = {
        f"{disk}.gate_proj.weight": Slot(f"{ours}.gate_up.weight", (slice(0, ffn),), (ffn, hidden)),
        f"{disk}.up_proj.weight": Slot(f"{ours}.gate_up.weight", (slice(ffn, 2 * ffn),), (ffn, hidden)),
        f"{disk}.down_proj.weight": Slot(f"{ours}.down.weight", (), (hidden, ffn)),
    }
    if bias:
        found[f"{disk}.gate_proj.bias"] = Slot(f"{ours}.gate_up.bias", (slice(0, ffn),), (ffn,))
        found[f"{disk}.up_proj.bias"] = Slot(f"{ours}.gate_up.bias", (slice(ffn, 2 * ffn),), (ffn,))
        found[f"{disk}.down_proj.bias"] = Slot(f"{ours}.down.bias", (), (hidden,))
    return found


def _moe_slots(hidden: int, moe: MoEConfig, disk: str, ours: str) -> dict[str, Slot]:
    ffn = moe.expert_size
    found = {
        f"{disk}.gate.weight": Slot(f"{ours}.router", (), (moe.num_experts, hidden)),
        f"{disk}.gate.expert_bias": Slot(f"{ours}.expert_bias", (), (moe.num_experts,)),
    }
    for expert in range(moe.num_experts):
        name = f"{disk}.experts.{expert}"
        found[f"{name}.gate_proj.weight"] = Slot(f"{ours}.gate_up", (expert, slice(0, ffn)), (ffn, hidden))
        found[f"{name}.up_proj.weight"] = Slot(f"{ours}.gate_up", (expert, slice(ffn, 2 * ffn)), (ffn, hidden))
        found[f"{name}.down_proj.weight"] = Slot(f"{ours}.down", (expert,), (hidden, ffn))
    if moe.num_shared:
        found |= _ffn_slots(hidden, ffn * moe.num_shared, False, f"{disk}.shared_experts", f"{ours}.shared")
    return found


def _family_name(hf: Mapping[str, Any]) -> str:
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"model_type is {name!r}; supported families: {', '.join(FAMILIES)}")
    return name


def _known_keys(name: str) -> set[str]:
    return set(_SHARED_KEYS) | _BIAS_KEYS.get(name, _LING_KEYS)


def _reject_unsupported(hf: Mapping[str, Any]) -> None:
    for key, allowed in _REQUIRED_VALUES.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{key} is {hf[key]!r}; only {' or '.join(repr(value) for value in allowed)} is supported")
    layer_types = hf.get("layer_types") or []
    other = [kind for kind in layer_types if kind != "full_attention"]
    if other:
        raise ConfigError(f"layer_types holds {other[0]!r}; only 'full_attention' is supported")
    # Qwen switches its window on by `use_sliding_window` from layer `max_window_layers` on; `layer_types` overrides both.
    in_use = hf.get("use_sliding_window", "use_sliding_window" not in hf) and hf.get("sliding_window") is not None
    windowless = hf.get("max_window_layers")
    if isinstance(windowless, int) and windowless >= hf.get("num_hidden_layers", 0):
        in_use = False
    if in_use and not layer_types:
        raise ConfigError(f"sliding_window is {hf['sliding_window']!r} and in use; only full attention is supported")


def _read_biases(name: str, hf: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    """Biases of the qkv projection, the attention output and the feed-forward."""
    if name == "qwen2":
        return True, False, False
    if name in ("llama", "qwen3"):
        attention = flag(hf, "attention_bias", False)
        return attention, attention, name == "llama" and flag(hf, "mlp_bias", False)
    return flag(hf, "use_qkv_bias", False), flag(hf, "use_bias", False), False


def _read_moe(hf: Mapping[str, Any]) -> MoEConfig:
    num_active = integer(hf, "num_experts_per_tok")
    return MoEConfig(
        num_experts=integer(hf, "num_experts"),
        num_active=num_active,
        expert_size=integer(hf, "moe_intermediate_size"),
        num_shared=integer(hf, "num_shared_experts", 0),
        num_groups=integer(hf, "n_group", 1),
        num_active_groups=integer(hf, "topk_group", 1),
        routed_scale=number(hf, "routed_scaling_factor", 1.0),
        # The reference code never normalises a single weight: it would always be 1.
        normalize=flag(hf, "norm_topk_prob", True) and num_active > 1,
        num_dense_layers=integer(hf, "first_k_dense_replace", 0),
    )


def _write_moe(config: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    return {
        "use_qkv_bias": config.qkv_bias,
        "use_bias": config.out_bias,
        "use_qk_norm": config.qk_norm,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.num_active,
        "moe_intermediate_size": moe.expert_size,
        "num_shared_experts": moe.num_shared,
        "n_group": moe.num_groups,
        "topk_group": moe.num_active_groups,
        "routed_scaling_factor": moe.routed_scale,
        "norm_topk_prob": moe.normalize,
        "first_k_dense_replace": moe.num_dense_layers,
        "num_nextn_predict_layers": 0,
    }


def _read_diffusion(name: str, hf: Mapping[str, Any]) -> tuple[int | None, int | None]:
    mask_id, block_size = token(hf, "mask_token_id"), hf.get("block_size")
    if name == "llada2_moe":
        if mask_id is None and hf.get("vocab_size") != LLADA2_VOCABULARY:
            raise ConfigError(
                f"llada2_moe with vocab_size {hf.get('vocab_size')!r} names no mask_token_id; add it to config.json"
            )
        mask_id = LLADA2_MASK_ID if mask_id is None else mask_id
        block_size = LLADA2_BLOCK_SIZE if block_size is None else block_size
    if block_size is not None and (isinstance(block_size, bool) or not isinstance(block_size, int)):
        raise ConfigError(f"block_size is {block_size!r}; it must be an integer")
    return mask_id, block_size
