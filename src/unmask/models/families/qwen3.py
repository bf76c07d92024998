"""Qwen3: query and key norms, and a head size of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.models.arch.config import ModelConfig
from unmask.models.families.base import ModelFamily
from unmask.models.families.hf_values import flag


class Qwen3(ModelFamily):
    """Qwen3, dense."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    head_dim = 128

    def read_own_keys(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        attention = flag(hf, "attention_bias", False)
        return {"qk_norm": True, "qkv_bias": attention, "out_bias": attention}

    def write_own_keys(self, config: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": config.qkv_bias}
