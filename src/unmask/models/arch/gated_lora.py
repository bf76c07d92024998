"""Gated low-rank updates: a diffusion model inside an autoregressive one, which it leaves as it is.

Owns giving a model such updates and taking them away again; `layers.GatedLinear` applies them. A row of a forward is *open* if
it denoises; only open rows pass the updates, so that every other row computes what the parent did, to the bit.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer


def add_gates(model: Transformer, rank: int, *, seed: int) -> Transformer:
    """The same weights, frozen, with updates of rank `rank` beside every linear layer and a mask vector; these are trainable.

    Args:
        model: dense, a shifted diffusion model's config, without updates.
        rank: R.
        seed: of what the updates read; what they write starts at zero, so that open rows compute what they did before.

    Raises:
        ConfigError: a rank below 1, or a model that has updates already or cannot have them.

    Source: gated LoRA (2507.11851) section 3.2. Departs: one update for each fused matrix; its scale is in what it reads.
    """
    if model.config.gated_lora_rank is not None:
        raise ConfigError(
            f"the model has gated updates of rank {model.config.gated_lora_rank} already; leave train.gated_lora_rank out"
        )
    gated = _same_weights(model, replace(model.config, gated_lora_rank=rank))
    generator = torch.Generator().manual_seed(seed)
    state = gated.state_dict()
    for name in filter(is_gated, state):
        like = state[name]
        if name.endswith("gated_in"):
            bound = 2 * math.sqrt(3.0 / like.shape[1])
            start = torch.empty(like.shape).uniform_(-bound, bound, generator=generator)
        elif name.endswith("gated_out"):
            start = torch.zeros(like.shape)
        else:
            start = model.embed.weight.detach()[model.config.mask_id].clone()
        state[name] = start.to(device=model.embed.weight.device, dtype=model.embed.weight.dtype)
    gated.load_state_dict(state, strict=True, assign=True)
    return train_gates(gated)


def train_gates(model: Transformer) -> Transformer:
    """Freeze all but what open rows alone compute with."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_gated(name))
    return model


def parent_config(config: ModelConfig) -> ModelConfig:
    """Of the autoregressive model that rows which are not open compute.

    Raises:
        ConfigError: the model has no gated updates, so that nothing of its parent is left.
    """
    if config.gated_lora_rank is None:
        raise ConfigError("the model has no gated updates; its autoregressive parent is not in it")
    return replace(config, gated_lora_rank=None, mask_id=None, block_size=None, start_id=None)


def autoregressive_parent(model: Transformer) -> Transformer:
    """The model that rows which are not open compute: autoregressive, predicting the next token; it shares the weights.

    Raises:
        ConfigError: as of `parent_config`.
    """
    return _same_weights(model, parent_config(model.config))


def is_gated(name: str) -> bool:
    """Whether a parameter of this name (in our state dict) acts in open rows only."""
    return name.rpartition(".")[2] in ("gated_in", "gated_out", "mask_vector")


def _same_weights(model: Transformer, config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        made = Transformer(config)
    state, wanted = model.state_dict(), made.state_dict()
    made.load_state_dict({name: state.get(name, empty) for name, empty in wanted.items()}, strict=True, assign=True)
    made.inv_freq = model.inv_freq
    return made
