"""Qwen2 and Qwen2.5: biases on queries, keys and values, always."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.models.families.base import ModelFamily


class Qwen2(ModelFamily):
    """Qwen2 and Qwen2.5, dense."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def read_own_keys(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"qkv_bias": True}
