"""What Ling 2.0 and LLaDA2 share: a mixture of experts behind fused query-key-value projections, and its published sizes.

Source: LLaDA2.0 report (2512.15745) and the Ling 2.0 model cards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig, MoEConfig
from unmask.models.families.base import ModelFamily
from unmask.models.families.hf_values import flag, integer, number, optional_integer
from unmask.models.families.tensors import StoredTensor, feed_forward_tensors

VOCAB_SIZE = 157_184
_COMMON = {
    "vocab_size": VOCAB_SIZE, "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 32768,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_bias": False, "use_qkv_bias": False,
    "use_qk_norm": True, "rope_theta": 600_000, "rope_scaling": None, "partial_rotary_factor": 0.5, "num_experts": 256,
    "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "score_function": "sigmoid", "first_k_dense_replace": 1, "eos_token_id": 156_892,
    "pad_token_id": 156_892, "torch_dtype": "bfloat16",
}  # fmt: skip
MINI: Mapping[str, Any] = _COMMON | {
    "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "intermediate_size": 5120,
    "moe_intermediate_size": 512,
}  # fmt: skip
FLASH: Mapping[str, Any] = _COMMON | {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
}  # fmt: skip
# Keys of the mixture of experts, their fields in `MoEConfig`, and what an absent key means (None: it must be there).
_MOE_KEYS: Mapping[str, tuple[str, int | None]] = {
    "num_experts": ("num_experts", None), "num_experts_per_tok": ("num_active", None),
    "moe_intermediate_size": ("expert_size", None), "num_shared_experts": ("num_shared", 0), "n_group": ("num_groups", 1),
    "topk_group": ("num_active_groups", 1), "first_k_dense_replace": ("num_dense_layers", 0),
}  # fmt: skip


class LingMoE(ModelFamily):
    """The architecture of Ling 2.0; the families differ in name, diffusion defaults and export."""

    rotary_fraction = 0.5
    embedding = "model.word_embeddings"
    attention = "attention"
    optional_keys = frozenset({"expert_capacity"})
    attention_names: ClassVar = {
        "qkv": "query_key_value", "out": "dense", "query_norm": "query_layernorm", "key_norm": "key_layernorm",
    }  # fmt: skip

    def read_own_keys(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        sizes: dict[str, Any] = {field: integer(hf, key, default) for key, (field, default) in _MOE_KEYS.items()}
        # The reference code never normalises a single weight: it would always be 1.
        normalize = flag(hf, "norm_topk_prob", True) and sizes["num_active"] > 1
        # 0 is no block routing, as in the published code.
        capacity = optional_integer(hf, "expert_capacity") or None
        routed_scale = number(hf, "routed_scaling_factor", 1.0)
        moe = MoEConfig(**sizes, routed_scale=routed_scale, normalize=normalize, expert_capacity=capacity)
        shared_size = integer(hf, "moe_shared_expert_intermediate_size", moe.expert_size)
        if moe.num_shared and shared_size != moe.expert_size:
            raise ConfigError(
                f"moe_shared_expert_intermediate_size is {shared_size}; it must be moe_intermediate_size, {moe.expert_size}"
            )
        qkv_bias, out_bias = flag(hf, "use_qkv_bias", False), flag(hf, "use_bias", False)
        return {"moe": moe, "qkv_bias": qkv_bias, "out_bias": out_bias, "qk_norm": flag(hf, "use_qk_norm", True)}

    def write_own_keys(self, config: ModelConfig) -> dict[str, Any]:
        moe = config.moe
        assert moe is not None
        return {
            "use_qkv_bias": config.qkv_bias,
            "use_bias": config.out_bias,
            "use_qk_norm": config.qk_norm,
            **{key: getattr(moe, field) for key, (field, _) in _MOE_KEYS.items()},
            "routed_scaling_factor": moe.routed_scale,
            "norm_topk_prob": moe.normalize,
            "num_nextn_predict_layers": 0,
            **({} if moe.expert_capacity is None else {"expert_capacity": moe.expert_capacity}),
        }

    def mlp_tensors(self, config: ModelConfig, layer: int, disk: str, ours: str) -> dict[str, StoredTensor]:
        if config.moe is None or not config.is_moe_layer(layer):
            return super().mlp_tensors(config, layer, disk, ours)
        moe, hidden, ffn = config.moe, config.hidden_size, config.moe.expert_size
        tensors = {
            f"{disk}.gate.weight": StoredTensor(f"{ours}.router", (), (moe.num_experts, hidden)),
            f"{disk}.gate.expert_bias": StoredTensor(f"{ours}.expert_bias", (), (moe.num_experts,)),
        }
        for expert in range(moe.num_experts):
            name = f"{disk}.experts.{expert}"
            tensors[f"{name}.gate_proj.weight"] = StoredTensor(f"{ours}.gate_up", (expert, slice(0, ffn)), (ffn, hidden))
            tensors[f"{name}.up_proj.weight"] = StoredTensor(f"{ours}.gate_up", (expert, slice(ffn, 2 * ffn)), (ffn, hidden))
            tensors[f"{name}.down_proj.weight"] = StoredTensor(f"{ours}.down", (expert,), (hidden, ffn))
        if moe.num_shared:
            tensors |= feed_forward_tensors(hidden, ffn * moe.num_shared, f"{disk}.shared_experts", f"{ours}.shared")
        return tensors
