"""Compiled layers: what a layer computes beside attention and matrix products, fused into a few kernels, for training.

Owns what is compiled. On a GPU norms, rotary embedding, gates, residuals and low-rank updates are some dozens of small kernels
a layer, each of which reads and writes all activations.
"""

from __future__ import annotations

import torch

from unmask.models.arch.layers import FeedForward
from unmask.models.arch.transformer import Block, Transformer


def fuse(model: Transformer, *, backend: str = "inductor") -> None:
    """Compile the dense layers of a model, in place: all of each but its attention, one program for all layers.

    The first step takes some seconds longer. Experts stay as they are: their shapes depend on the data.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        block.before_attention = torch.compile(block.before_attention, dynamic=True, backend=backend)  # type: ignore[method-assign]
        if isinstance(block.mlp, FeedForward):
            block.after_attention = torch.compile(block.after_attention, dynamic=True, backend=backend)  # type: ignore[method-assign]
