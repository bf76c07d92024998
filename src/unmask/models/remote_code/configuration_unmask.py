# Copyright 2026 The unmask authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
# License. You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on an
# "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific
# language governing permissions and limitations under the License.
"""Configuration of a block-diffusion model exported by unmask, and its rotary frequencies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig


class UnmaskConfig(PretrainedConfig):  # type: ignore[misc]
    """The keys of config.json as attributes; `remote_code` holds what differs between model families.

    Rotary settings keep their names of transformers 4 (`rope_theta`, `rope_scaling`) in every version of transformers: other
    programs read them from here.
    """

    model_type = "unmask"  # of the exported folder: the model's family

    def __init__(
        self, rope_theta: float = 10_000.0, rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None, **keys: Any,
    ) -> None:  # fmt: skip
        absent = {"mask_token_id": None, "shift_start_token_id": None, "gated_lora_rank": None, "num_experts": 0}
        for name, value in (absent | keys).items():
            if name not in ("model_type", "dtype", "torch_dtype"):
                setattr(self, name, value)
        super().__init__(**keys)
        self.rope_theta = rope_theta
        scaling = rope_scaling or rope_parameters
        # In transformers 5 `rope_scaling` is another name of `rope_parameters`, and setting it warns.
        is_five = isinstance(getattr(type(self), "rope_scaling", None), property)
        setattr(self, "rope_parameters" if is_five else "rope_scaling", scaling and {**scaling, "rope_theta": rope_theta})


def rope_frequencies(config: UnmaskConfig, rotary_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary_dim / 2] and the factor on cosines and sines, for every scaling that unmask writes."""
    inv_freq = 1.0 / (config.rope_theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim))
    scaling = config.rope_scaling or {"rope_type": "default"}
    kind = scaling["rope_type"]
    if kind == "default":
        return inv_freq, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return inv_freq / factor, 1.0
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        rotations = original * inv_freq / (2 * math.pi)
        blend = ((rotations - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * inv_freq / factor + blend * inv_freq, 1.0
    if kind != "yarn":
        raise ValueError(f"rope_type is {kind!r}; it must be default, linear, llama3 or yarn")

    def dimension_of(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension_of(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension_of(scaling["beta_slow"])), rotary_dim - 1)
    keep = 1 - ((torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return inv_freq / factor * (1 - keep) + inv_freq * keep, attention
