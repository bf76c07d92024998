"""Ling 2.0 (`bailing_moe_v2`): the autoregressive parents of LLaDA2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from unmask.errors import CheckpointError
from unmask.models.arch.config import ModelConfig
from unmask.models.families.ling import FLASH, MINI, LingMoE
from unmask.models.families.llada2_moe import LLaDA2MoE

_PUBLISHED_TYPE = {"model_type": "bailing_moe"}


class BailingMoEV2(LingMoE):
    """Ling 2.0. Converted to diffusion it computes what LLaDA2 does, and is exported as one.

    The published checkpoints call themselves `bailing_moe`, as Ling 1 does, and are told from it by their architecture.
    """

    name = "bailing_moe_v2"
    architecture = "BailingMoeV2ForCausalLM"
    published: ClassVar = {"ling-mini-2.0": {**MINI, **_PUBLISHED_TYPE}, "ling-flash-2.0": {**FLASH, **_PUBLISHED_TYPE}}

    def write_own_keys(self, config: ModelConfig) -> dict[str, Any]:
        return super().write_own_keys(config) | _PUBLISHED_TYPE

    def for_export(self, config: ModelConfig) -> ModelConfig:
        if config.mask_id is None:
            return config
        normalizes = config.moe is None or config.moe.normalize or config.moe.num_active == 1
        required = {"use_qk_norm": config.qk_norm, "use_bias": not config.out_bias, "norm_topk_prob": normalizes}
        differing = [key for key, fits in required.items() if not fits]
        if differing:
            raise CheckpointError(
                f"{differing[0]} is not what the code of {LLaDA2MoE.name} takes for granted; use the model with unmask"
            )
        return LLaDA2MoE().for_export(replace(config, family=LLaDA2MoE.name))
