"""Gated LoRA: a diffusion model inside an autoregressive one, whose outputs it leaves unchanged.

Owns adding gated LoRA to a model and removing it again; `layers.GatedLoraLinear` applies it. Only *noisy* rows of a forward
(those that denoise) pass the low-rank updates, so that every other row computes what the parent did, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import torch

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer, reconfigured


def add_gated_lora(model: Transformer, rank: int, *, seed: int) -> Transformer:
    """The same weights, frozen, with trainable gated LoRA of rank `rank` beside every linear layer and a mask vector.

    Args:
        model: dense, a shifted diffusion model's config, without gated LoRA.
        rank: R.
        seed: of the input matrices A; the output matrices B start at zero, so that noisy rows compute what they did before.

    Raises:
        ConfigError: a rank below 1, or a model that has gated LoRA already or cannot have it.

    Source: gated LoRA (2507.11851) section 3.2. Departs: one update for each fused matrix; the scale is part of A.
    """
    if model.config.gated_lora_rank is not None:
        raise ConfigError(f"the model has gated LoRA of rank {model.config.gated_lora_rank} already; leave gated_lora_rank out")
    gated = reconfigured(model, replace(model.config, gated_lora_rank=rank))
    generator = torch.Generator().manual_seed(seed)
    state = gated.state_dict()
    for name in filter(is_gated_lora, state):
        shape = state[name].shape
        if name.endswith("gated_in"):
            bound = 2 * math.sqrt(3.0 / shape[1])
            initial = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        elif name.endswith("gated_out"):
            initial = torch.zeros(shape)
        else:
            initial = model.embed.weight.detach()[model.config.mask_id].clone()
        # Beside weights that are still to be loaded, the updates are real: no file holds them.
        device = initial.device if model.embed.weight.is_meta else model.embed.weight.device
        state[name] = initial.to(device, model.embed.weight.dtype)
    gated.load_state_dict(state, strict=True, assign=True)
    return train_gated_lora(gated)


def train_gated_lora(model: Transformer, targets: Collection[str] | None = None) -> Transformer:
    """Make the mask vector and the updates of `targets` trainable and freeze everything else, in place.

    `targets`: which of `qkv`, `out`, `gate_up` and `down` of every layer; None: all. The other updates stay as they are.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_target(name, targets))
    return model


def is_target(name: str, targets: Collection[str] | None) -> bool:
    """Whether the parameter of this name in our state dict belongs to gated LoRA and trains with these `targets`."""
    layer = name.rpartition(".")[0].rpartition(".")[2]
    return is_gated_lora(name) and (targets is None or name == "mask_vector" or layer in targets)


def parent_config(config: ModelConfig) -> ModelConfig:
    """The config of the autoregressive model that rows without noise compute: `reconfigured` makes it.

    Raises:
        ConfigError: the model has no gated LoRA, so that nothing of its parent is left.
    """
    if config.gated_lora_rank is None:
        raise ConfigError("the model has no gated LoRA; its autoregressive parent is not in it")
    return replace(config, gated_lora_rank=None, mask_id=None, block_size=None, start_id=None)


def is_gated_lora(name: str) -> bool:
    """Whether the parameter of this name in our state dict belongs to gated LoRA: an update, or the mask vector."""
    return name.rpartition(".")[2] in ("gated_in", "gated_out", "mask_vector")
