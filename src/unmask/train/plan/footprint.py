"""Footprint of a layer and of the loss: what their forward and backward passes keep and need, measured on the real modules.

Owns the measurement, under fake tensors, and the stand-in for FlexAttention in it. Knows nothing of devices or layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Block, run_checkpointed
from unmask.train.plan.tracker import Tracker

_TOKENS = 2**22
"""Tokens in a measurement: so many that weights and their gradients do not count."""


class FlexShapes(torch.autograd.Function):
    """Attention as FlexAttention allocates it, without its products: queries, keys, values, output and normalisers are kept."""

    @staticmethod
    def forward(ctx: Any, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        out_BHTS = torch.empty_like(q_BHTS)
        log_z_BHT = torch.empty(q_BHTS.shape[:-1], dtype=torch.float32, device=q_BHTS.device)
        ctx.save_for_backward(q_BHTS, k_BGTS, v_BGTS, out_BHTS, log_z_BHT)
        return out_BHTS

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BHTS, k_BGTS, v_BGTS, _, _ = ctx.saved_tensors
        return torch.empty_like(q_BHTS), torch.empty_like(k_BGTS), torch.empty_like(v_BGTS)


def flex_shapes(layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
    """`FlexShapes` as an `Attend`."""
    out: Tensor = FlexShapes.apply(q_BHTS, k_BGTS, v_BGTS)  # type: ignore[no-untyped-call]
    return out


@dataclass(frozen=True)
class Footprint:
    """Bytes for each token, beside the layer's input: kept by the forward pass; at most held in a forward or backward pass."""

    kept: float
    peak: float


def layer_footprint(config: ModelConfig, layer: int, tensor: int, dtype: torch.dtype, *, selective: bool) -> Footprint:
    """Footprint of layer `layer` of one of `tensor` ranks that divide its matrices; `selective`: activation checkpointing."""
    whole = _measure(_Key(config, config.is_moe_layer(layer), 1, dtype, selective))
    if tensor == 1:
        return whole
    # What is divided shrinks with 1 / tensor, and the rest stays: two measurements tell them apart.
    half = _measure(_Key(config, config.is_moe_layer(layer), 2, dtype, selective))
    share = 2 * (1 - 1 / tensor)
    return Footprint(*(one - share * (one - two) for one, two in ((whole.kept, half.kept), (whole.peak, half.peak))))


@dataclass(frozen=True)
class _Key:
    """What a measurement depends on; configs of the same sizes are equal."""

    config: ModelConfig
    routed: bool
    tensor: int
    dtype: torch.dtype
    selective: bool

    def __hash__(self) -> int:
        return hash((self.routed, self.tensor, self.dtype, self.selective, self.config.num_layers, self.config.hidden_size))


@cache
def _measure(key: _Key) -> Footprint:
    config = key.config
    local = replace(
        config,
        num_heads=config.num_heads // key.tensor,
        num_kv_heads=max(config.num_kv_heads // key.tensor, 1),
        ffn_size=config.ffn_size // key.tensor,
    )
    layer = next(layer for layer in range(config.num_layers) if config.is_moe_layer(layer) == key.routed)
    with torch.device("meta"):
        block = Block(local, layer).to(key.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        block.to_empty(device="cpu")
        x_BTD = torch.empty(1, _TOKENS, config.hidden_size, dtype=key.dtype, requires_grad=True)
        cos = torch.empty(1, 1, _TOKENS, config.rotary_dim, dtype=key.dtype)
        gradient, before = torch.empty_like(x_BTD), tracker.current
        tracker.reset()
        run = partial(run_checkpointed, block, checkpointing="selective") if key.selective else block
        out_BTD = run(x_BTD, cos, cos, flex_shapes)
        kept = tracker.current - before - out_BTD.nbytes
        out_BTD.backward(gradient)
    return Footprint(kept / _TOKENS, (tracker.peak - before) / _TOKENS)
