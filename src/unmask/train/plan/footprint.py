"""Footprint of a layer and of the loss: what their forward and backward passes keep and need, measured on the real modules.

Owns the measurement, under fake tensors, and the stand-in for FlexAttention in it. Knows nothing of devices or layouts.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining._backward import stage_backward_input

from unmask.models.arch.config import ModelConfig
from unmask.models.arch.gated_lora import train_gated_lora
from unmask.models.arch.transformer import Block, Transformer, run_checkpointed
from unmask.models.weights.adapter import attach_lora
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
    """Bytes for each token, beside the layer's input: kept by the forward pass; at most held in a forward or backward pass;
    and, where zero bubble computes the gradients of weights later, kept for them beside what the forward pass kept."""

    kept: float
    peak: float
    delayed: float = 0.0


def layer_footprint(
    config: ModelConfig,
    layer: int,
    tensor: int,
    dtype: torch.dtype,
    *,
    selective: bool,
    lora: int | None = None,
    split: bool = False,
) -> Footprint:
    """Footprint of layer `layer` of one of `tensor` ranks that divide its matrices.

    `selective`: activation checkpointing; `lora`: rank of the adapters that train in it; `split`: gradients of weights come
    later (zero bubble). With gated LoRA: of noisy tokens.
    """
    whole = _measure(_Key(config, config.is_moe_layer(layer), 1, dtype, selective, lora, split))
    if tensor == 1:
        return whole
    # What is divided shrinks with 1 / tensor, and the rest stays: two measurements tell them apart.
    half = _measure(_Key(config, config.is_moe_layer(layer), 2, dtype, selective, lora, split))
    share = 2 * (1 - 1 / tensor)
    return Footprint(*(one - share * (one - two) for one, two in zip(astuple(whole), astuple(half), strict=True)))


@dataclass(frozen=True)
class _Key:
    """What a measurement depends on; configs of the same sizes are equal."""

    config: ModelConfig
    routed: bool
    tensor: int
    dtype: torch.dtype
    selective: bool
    lora: int | None
    split: bool

    def __hash__(self) -> int:
        sizes = self.config.num_layers, self.config.hidden_size
        return hash((self.routed, self.tensor, self.dtype, self.selective, self.lora, self.split, *sizes))


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
    block = _block(local, layer, key.lora).to(key.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
        block.to_empty(device="cpu")
        x_BTD = torch.empty(1, _TOKENS, config.hidden_size, dtype=key.dtype, requires_grad=True)
        cos = torch.empty(1, 1, _TOKENS, config.rotary_dim, dtype=key.dtype)
        noisy_BT = None if config.gated_lora_rank is None else torch.empty(1, _TOKENS, dtype=torch.bool)
        gradient, before = torch.empty_like(x_BTD), tracker.current
        tracker.reset()
        run = partial(run_checkpointed, block, checkpointing="selective") if key.selective else block
        out_BTD = run(x_BTD, cos, cos, flex_shapes, noisy_BT)
        kept = tracker.current - before - out_BTD.nbytes
        if key.split:
            delayed = stage_backward_input([out_BTD], [gradient], [x_BTD], block.parameters())[1]
            assert delayed
            return Footprint(kept / _TOKENS, (tracker.peak - before) / _TOKENS, (tracker.current - before - kept) / _TOKENS)
        out_BTD.backward(gradient)
    return Footprint(kept / _TOKENS, (tracker.peak - before) / _TOKENS)


def _block(config: ModelConfig, layer: int, lora: int | None) -> Block:
    """A layer on the meta device, with what trains in it."""
    with torch.device("meta"):
        if lora is None and config.gated_lora_rank is None:
            return Block(config, layer)
        model = Transformer(replace(config, num_layers=layer + 1))
    train_adapters(model, lora, vocabulary=False)
    block = model.blocks[layer]
    assert isinstance(block, Block)
    return block


def train_adapters(model: Transformer, lora: int | None, *, vocabulary: bool) -> None:
    """Let the adapters of a model on the meta device train, in place: LoRA of this rank or, with None, its gated LoRA."""
    if lora is None:
        train_gated_lora(model)
    else:
        attach_lora(model, rank=lora, alpha=1.0, seed=0, train_embedding=vocabulary).to("meta")
