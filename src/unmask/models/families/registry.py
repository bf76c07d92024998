"""The families this package knows, and look-up by a config's family.

Owns the list: a new family is one file beside this one and its entry in `FAMILIES`. Nothing outside this folder asks for a
family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.families.bailing_moe_v2 import BailingMoEV2
from unmask.models.families.base import ModelFamily
from unmask.models.families.llada2_moe import LLaDA2MoE
from unmask.models.families.llama import Llama
from unmask.models.families.qwen2 import Qwen2
from unmask.models.families.qwen3 import Qwen3
from unmask.models.families.sdar import SDAR
from unmask.models.families.tensors import StoredTensor

FAMILIES: Mapping[str, ModelFamily] = {
    family.name: family for family in (Llama(), Qwen2(), Qwen3(), SDAR(), BailingMoEV2(), LLaDA2MoE())
}
# What published checkpoints call themselves where another family has the same name: `model_type` and architecture.
_PUBLISHED_AS: Mapping[tuple[str, str], str] = {("bailing_moe", BailingMoEV2.architecture): BailingMoEV2.name}
# Names of known models that are not read, and why.
_UNSUPPORTED: Mapping[str, str] = {
    "bailing_moe": f"Ling 1, with a softmax router (Ling 2.0 has architectures [{BailingMoEV2.architecture!r}])",
    "bailing_moe_linear": "Ling and Ring 2.0 linear, with linear attention in most layers",
    "bailing_hybrid": "Ling 2.5 to 3.0, with linear attention in most layers and multi-head latent attention in the others",
    "bailing2_5_moe": "Ling 2.5 and 2.6, with linear attention in most layers and multi-head latent attention in the others",
    "llada2_moe_veomni": "dFactory's LLaDA2 with merged experts; split them with its scripts/moe_convertor.py",
    "sdar_moe": "SDAR with Qwen3's mixture of experts",
    "llada": "LLaDA 1, which denoises a whole text and no blocks",
}
PUBLISHED: Mapping[str, ModelFamily] = {name: family for family in FAMILIES.values() for name in family.published}
"""Names of published models, and the family of each."""


def family_of(config: ModelConfig) -> ModelFamily:
    """The family of a model."""
    return FAMILIES[config.family]


def read_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The model config that a Hugging Face config describes.

    Args:
        hf: parsed config.json, as written by transformers 4 or 5 or by the models' remote code.

    Raises:
        ConfigError: an unknown family, a missing or ill-typed key, or a key whose value changes the computation in a way
            that is not supported.
    """
    name, architectures = hf.get("model_type"), hf.get("architectures")
    if isinstance(name, str) and isinstance(architectures, list) and architectures:
        name = _PUBLISHED_AS.get((name, str(architectures[0])), name)
    if not isinstance(name, str) or name not in FAMILIES:
        known = f" ({_UNSUPPORTED[name]})" if isinstance(name, str) and name in _UNSUPPORTED else ""
        raise ConfigError(f"model_type is {name!r}{known}; supported families: {', '.join(FAMILIES)}")
    return FAMILIES[name].read_config(hf)


def write_config(config: ModelConfig, *, dtype: str | None = None) -> dict[str, Any]:
    """The Hugging Face config.json of `config`; `read_config` gives `config` back.

    Args:
        config: any supported family; a diffusion model adds `mask_token_id` and `block_size`, a shifted one
            `shift_start_token_id`, one with gated LoRA `gated_lora_rank`.
        dtype: dtype of the stored weights as Hugging Face spells it ("bfloat16"), or None to leave it out.
    """
    return family_of(config).write_config(config, dtype)


def stored_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor a checkpoint of `config` holds: its name on disk and its place in our state dict."""
    return family_of(config).tensors(config)


def published_config(name: str) -> dict[str, Any]:
    """The Hugging Face config of a published model, as a fresh dict; see `PUBLISHED` for names.

    Raises:
        ConfigError: no such model.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"{name!r} is no published model that is known; choose one of {', '.join(PUBLISHED)}")
    family = PUBLISHED[name]
    return {"architectures": [family.architecture], "model_type": family.name, **family.published[name]}
