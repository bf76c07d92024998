"""Ling 2.0 (`bailing_moe_v2`): the autoregressive parents of LLaDA2."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from unmask.errors import CheckpointError
from unmask.models.arch.config import ModelConfig
from unmask.models.families.ling import FLASH, MINI, LingMoE
from unmask.models.families.llada2_moe import LLaDA2MoE


class BailingMoEV2(LingMoE):
    """Ling 2.0. Converted to diffusion it computes what LLaDA2 does, and is exported as one."""

    name = "bailing_moe_v2"
    architecture = "BailingMoeV2ForCausalLM"
    published: ClassVar = {"ling-mini-2.0": MINI, "ling-flash-2.0": FLASH}

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
