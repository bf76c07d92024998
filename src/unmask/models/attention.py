"""Grouped-query attention: projections here, the pattern as an argument.

Owns the projections, qk-norm and rotary placement, and the plain attention backends. Never builds a mask and never stores a
cache: whoever calls the model passes an `Attend`.

Legend: B batch, T query tokens, K key tokens, D hidden, H query heads, G kv heads, S head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from unmask.diffusion.masks import BlockedMask, Tile
from unmask.models.config import ModelConfig
from unmask.models.layers import RMSNorm, apply_rope


class Attend(Protocol):
    """Who may see whom, and where past keys and values live: the only thing training and inference do differently."""

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        """Attention output [B, H, T, S] of layer `layer` for rotated queries and this forward's keys and values."""
        ...


def sdpa(q_BHTS: Tensor, k_BGKS: Tensor, v_BGKS: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with grouped keys; `mask` is boolean (True: may attend) and broadcasts to [B, H, T, K].

    Raises:
        TypeError: `mask` is not boolean (an additive 0/1 mask would mask nothing).
    """
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"attention mask has dtype {mask.dtype}; it must be torch.bool")
    batch, heads, length, size = q_BHTS.shape
    shared = heads // k_BGKS.shape[1]
    if shared == 1:
        return F.scaled_dot_product_attention(q_BHTS, k_BGKS, v_BGKS, attn_mask=mask)
    # Heads that share keys become extra queries of one head: no copy of keys and values.
    q_BGQS = q_BHTS.reshape(batch, -1, shared * length, size)
    if mask is not None and length > 1:
        mask = mask.repeat(*(1,) * (mask.ndim - 2), shared, 1)
    out = F.scaled_dot_product_attention(q_BGQS, k_BGKS, v_BGKS, attn_mask=mask)
    return out.reshape(batch, heads, length, size)


class DenseAttend:
    """Attention under one dense boolean mask [B, T, K] (None: everything sees everything). The reference backend."""

    def __init__(self, mask_BTK: Tensor | None) -> None:
        self.mask = None if mask_BTK is None else mask_BTK[:, None]

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        return sdpa(q_BHTS, k_BGTS, v_BGTS, self.mask)


class BlockedAttend:
    """Attention that visits only key chunks some query of the chunk may see. For CPU; equal to `DenseAttend`."""

    def __init__(self, mask: BlockedMask) -> None:
        self.mask = mask

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        rows = []
        for row, tiles in enumerate(self.mask.rows):
            q, k, v = q_BHTS[row : row + 1], k_BGTS[row : row + 1], v_BGTS[row : row + 1]
            parts = []
            for tile in tiles:
                parts.append(sdpa(q[:, :, tile.start : tile.stop], _visible(k, tile), _visible(v, tile), tile.mask))
            rows.append(torch.cat(parts, dim=2))
        return torch.cat(rows, dim=0)


class FlexAttend:
    """Attention through FlexAttention's block-sparse kernel, for CUDA; equal to `DenseAttend`."""

    def __init__(self, block_mask: BlockMask) -> None:
        self.block_mask = block_mask

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        kernel = _compiled_flex() if q_BHTS.is_cuda else flex_attention
        out = kernel(q_BHTS, k_BGTS, v_BGTS, block_mask=self.block_mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out


@cache
def _compiled_flex():  # type: ignore[no-untyped-def]
    return torch.compile(flex_attention, dynamic=True)


def _visible(x_1GTS: Tensor, tile: Tile) -> Tensor:
    """The keys or values that a tile's queries may see."""
    ranges = [x_1GTS[:, :, start:stop] for start, stop in tile.keys]
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim=2)


class Attention(nn.Module):
    """Fused query-key-value projection, optional per-head RMSNorm, rotary; output projection after `Attend`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.hidden_size, config.qkv_size, bias=config.qkv_bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, S], rotated keys and values [B, G, T, S]."""
        batch, length, _ = x_BTD.shape
        heads = self.qkv(x_BTD).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v

    def merge(self, heads_BHTS: Tensor) -> Tensor:
        """Output projection of the attended heads: [B, T, D]."""
        batch, _, length, _ = heads_BHTS.shape
        merged: Tensor = self.out(heads_BHTS.transpose(1, 2).reshape(batch, length, -1))
        return merged
