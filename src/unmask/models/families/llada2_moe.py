"""LLaDA2 (`llada2_moe`): Ling 2.0 as a block-diffusion model, and what its published code and SGLang read.

LLaDA2.2's keys are read and written, and its tensors are named as those of 2.1; edits that change the length are not decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from unmask.errors import CheckpointError, ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.families.hf_values import eos, integer, token
from unmask.models.families.ling import FLASH, MINI, VOCAB_SIZE, LingMoE

MASK_ID = 156_895
BLOCK_SIZE = 32
CODE_REPOSITORY = "inclusionAI/LLaDA2.0-mini"
"""The repository with the modelling code that Hugging Face runs for this family."""
# LLaDA2.2: keys of the tokens that delete and insert, and their fields in `ModelConfig`.
_EDIT_TOKENS: Mapping[str, str] = {"delete_token_id": "delete_id", "split_token_id": "insert_id"}
_DIFFUSION = {"mask_token_id": MASK_ID, "block_size": BLOCK_SIZE}
# What the published config.json says beside the sizes. SGLang leaves the selection bias out without the first of these.
_EXPORT_KEYS: Mapping[str, Any] = {
    "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "router_dtype": "fp32", "norm_head": False,
    "norm_softmax": False, "attention_dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0,
    "output_router_logits": False, "use_cache": False, "use_sliding_window": False,
    "auto_map": {
        "AutoConfig": f"{CODE_REPOSITORY}--configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": f"{CODE_REPOSITORY}--modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": f"{CODE_REPOSITORY}--modeling_llada2_moe.LLaDA2MoeModelLM",
    },
}  # fmt: skip


class LLaDA2MoE(LingMoE):
    """LLaDA2.0 to 2.2. The published configs name no mask token, before 2.2 no block size; their vocabulary identifies them."""

    name = "llada2_moe"
    architecture = "LLaDA2MoeModelLM"
    published: ClassVar = {"llada2-mini": {**MINI, **_DIFFUSION}, "llada2-flash": {**FLASH, **_DIFFUSION}}
    index_required = True  # by dInfer
    optional_keys = LingMoE.optional_keys | _EDIT_TOKENS.keys()
    token_editing = True  # of 2.1; the configs of 2.0 are the same

    def read_own_keys(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        fields, mask_id = super().read_own_keys(hf), token(hf, "mask_token_id")
        if mask_id is None:
            if hf.get("vocab_size") != VOCAB_SIZE:
                raise ConfigError(
                    f"{self.name} with vocab_size {hf.get('vocab_size')!r} names no mask_token_id; add it to config.json"
                )
            fields["mask_id"] = mask_id = MASK_ID
        if hf.get("block_size") is None:
            fields["block_size"] = BLOCK_SIZE
        if hf.get("eos_token_id") in (None, -1, []):
            fields["eos_ids"] = eos({"eos_token_id": hf.get("pad_token_id")}, vocab_size=integer(hf, "vocab_size"))
        fields |= {field: token(hf, key) for key, field in _EDIT_TOKENS.items()}
        edits = [fields[field] for field in _EDIT_TOKENS.values()]
        if edits != [None, None] and len({*edits, None, mask_id}) < 4:
            named = ", ".join(f"{key} is {hf.get(key)!r}" for key in _EDIT_TOKENS)
            raise ConfigError(f"{named}; give both or neither, apart from each other and from the mask token")
        return fields

    def write_own_keys(self, config: ModelConfig) -> dict[str, Any]:
        edits = {key: getattr(config, name) for key, name in _EDIT_TOKENS.items()}
        return super().write_own_keys(config) | {key: value for key, value in edits.items() if value is not None}

    def for_export(self, config: ModelConfig) -> ModelConfig:
        if config.shifted:
            raise CheckpointError(f"the code of {self.name} does not run shifted models (shift_start_token_id); use unmask")
        return replace(config, hf_extras={**config.hf_extras, **_EXPORT_KEYS, "rotary_dim": config.rotary_dim})

    def export_notes(self, config: ModelConfig) -> tuple[str, ...]:
        notes = []
        if config.mask_id != MASK_ID:
            notes.append(f"SGLang knows no mask token but {MASK_ID} for {self.name}; this model's is {config.mask_id}")
        if config.block_size != BLOCK_SIZE:
            notes.append(
                f"SGLang decodes blocks of {BLOCK_SIZE} unless --dllm-algorithm-config sets block_size: {config.block_size}"
            )
        return tuple(notes)
