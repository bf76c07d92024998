"""SDAR (`sdar`): Qwen3 as a block-diffusion model, under the names that SGLang and LMDeploy read.

Source: SDAR report (2510.06303) and its published code; `srt/models/sdar.py`, `srt/dllm/config.py` of SGLang;
`pytorch/models/sdar.py`, `pytorch/configurations/sdar.py` of LMDeploy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unmask.errors import CheckpointError, ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.families.hf_values import token
from unmask.models.families.qwen3 import Qwen3

MASK_ID = 151_669
BLOCK_SIZE = 4
VOCAB_SIZE = 151_936
ALGORITHM_CONFIG = "sglang_dllm.yaml"
"""Of an exported folder: what SGLang takes as --dllm-algorithm-config."""
# What the published config.json says beside the sizes. LMDeploy reads `sliding_window` of every model.
_EXPORT_KEYS: Mapping[str, Any] = {
    "attention_dropout": 0.0, "sliding_window": None, "use_sliding_window": False, "use_cache": True, "initializer_range": 0.02,
}  # fmt: skip


class SDAR(Qwen3):
    """SDAR, dense. The published configs name neither mask token nor block size; their vocabulary identifies the first."""

    name = "sdar"
    architecture = "SDARForCausalLM"

    def read_own_keys(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        fields = super().read_own_keys(hf)
        if token(hf, "mask_token_id") is None:
            if hf.get("vocab_size") != VOCAB_SIZE:
                raise ConfigError(
                    f"{self.name} with vocab_size {hf.get('vocab_size')!r} names no mask_token_id; add it to config.json"
                )
            fields["mask_id"] = MASK_ID
        if hf.get("block_size") is None:
            fields["block_size"] = BLOCK_SIZE
        return fields

    def for_export(self, config: ModelConfig) -> ModelConfig:
        if config.shifted:
            raise CheckpointError(
                f"the code for {self.name} does not run shifted models (shift_start_token_id); export the model with remote "
                "code, or convert its parent unshifted"
            )
        return replace(config, hf_extras={**_EXPORT_KEYS, "max_window_layers": config.num_layers, **config.hf_extras})

    def export_notes(self, config: ModelConfig) -> tuple[str, ...]:
        notes = []
        if config.mask_id != MASK_ID:
            notes.append(
                f"SGLang and LMDeploy know no mask token but {MASK_ID} for {self.name}; this model's is {config.mask_id}: "
                f"convert Qwen3 with the token of id {MASK_ID} as mask_token"
            )
        if config.block_size != BLOCK_SIZE:
            notes.append(
                f"SGLang decodes blocks of {BLOCK_SIZE} unless given --dllm-algorithm-config {ALGORITHM_CONFIG} of the folder, "
                f"and LMDeploy's are set by --dllm-block-length {config.block_size}"
            )
        return tuple(notes)

    def export_files(self, config: ModelConfig, threshold: float) -> dict[str, Any]:
        # SGLang reads YAML, of which JSON is a part.
        return {ALGORITHM_CONFIG: {"block_size": config.block_size, "threshold": threshold}}


def as_sdar(config: ModelConfig) -> ModelConfig:
    """The config of a block-diffusion Qwen3 as one of SDAR; the tensors are the same.

    Raises:
        CheckpointError: SDAR's code does not compute what the model does.
    """
    if config.family not in (Qwen3.name, SDAR.name):
        raise CheckpointError(f"SDAR is made of {Qwen3.name}, not of family '{config.family}'; export it with remote code")
    if config.mask_id is None:
        raise CheckpointError("the model is autoregressive (no mask_token_id); convert it to block diffusion first")
    if config.gated_lora_rank is not None:
        raise CheckpointError("the code for sdar has no gated LoRA (gated_lora_rank); export the model with remote code")
    return SDAR().for_export(replace(config, family=SDAR.name, block_size=config.block_size or BLOCK_SIZE))
