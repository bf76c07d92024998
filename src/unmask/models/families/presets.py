"""Geometries of published models, as Hugging Face config dicts.

Owns numbers from the reports and nothing else. Source: LLaDA2.0 report (2512.15745) and the Ling 2.0 model cards.
"""

from __future__ import annotations

from typing import Any

from unmask.errors import ConfigError
from unmask.models.families.registry import FAMILIES, LLADA2_BLOCK_SIZE, LLADA2_MASK_ID, LLADA2_VOCABULARY

_MINI = {
    "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "intermediate_size": 5120,
    "moe_intermediate_size": 512,
}  # fmt: skip
_FLASH = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
}  # fmt: skip
_COMMON = {
    "vocab_size": LLADA2_VOCABULARY, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 32768,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_bias": False, "use_qkv_bias": False,
    "use_qk_norm": True, "rope_theta": 600_000, "rope_scaling": None, "partial_rotary_factor": 0.5, "num_experts": 256,
    "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "score_function": "sigmoid", "first_k_dense_replace": 1, "eos_token_id": 156_892,
    "pad_token_id": 156_892, "torch_dtype": "bfloat16",
}  # fmt: skip
_DIFFUSION = {"mask_token_id": LLADA2_MASK_ID, "block_size": LLADA2_BLOCK_SIZE}
_PRESETS: dict[str, dict[str, Any]] = {
    "llada2-mini": {"model_type": "llada2_moe", **_COMMON, **_MINI, **_DIFFUSION},
    "llada2-flash": {"model_type": "llada2_moe", **_COMMON, **_FLASH, **_DIFFUSION},
    "ling-mini-2.0": {"model_type": "bailing_moe_v2", **_COMMON, **_MINI},
    "ling-flash-2.0": {"model_type": "bailing_moe_v2", **_COMMON, **_FLASH},
}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> dict[str, Any]:
    """The Hugging Face config of a published model, as a fresh dict; see `PRESETS` for names.

    Raises:
        ConfigError: no such preset.
    """
    if name not in _PRESETS:
        raise ConfigError(f"{name!r} is not a preset; choose one of {', '.join(PRESETS)}")
    hf = _PRESETS[name]
    return {"architectures": [FAMILIES[hf["model_type"]].architecture], **hf}
