"""Llama: the dense decoder whose names the other families follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.models.arch.config import ModelConfig
from unmask.models.families.base import ModelFamily
from unmask.models.families.hf_values import flag


class Llama(ModelFamily):
    """Llama 2 and 3, SmolLM2 and their like."""

    name = "llama"
    architecture = "LlamaForCausalLM"

    def read_own_keys(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        attention = flag(hf, "attention_bias", False)
        return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": flag(hf, "mlp_bias", False)}

    def write_own_keys(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
