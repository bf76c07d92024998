"""Grouped-query attention: the projections, and the attention backends of training.

Owns the projections, qk-norm and rotary placement. The attention pattern is an argument: whoever calls the model passes an
`Attend`. Never builds a mask and never holds a KV cache.

Legend: B batch, T query tokens, K key tokens, D hidden, H query heads, G kv heads, S head dim.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unmask.diffusion.masks import BlockedMask, Tile
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.layers import RMSNorm, apply, apply_rope, linear

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Attend(Protocol):
    """The attention pattern and the KV cache of one forward: the only thing training and inference do differently."""

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        """Attention output [B, H, T, S] of layer `layer`, given rotated queries and this forward's keys and values."""
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
    """Attention under one dense boolean mask [B, T, K] (None: full attention). The reference backend."""

    def __init__(self, mask_BTK: Tensor | None) -> None:
        self.mask = None if mask_BTK is None else mask_BTK[:, None]

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        return sdpa(q_BHTS, k_BGTS, v_BGTS, self.mask)


class BlockedAttend:
    """Block-sparse attention for the CPU: each chunk of queries visits only the keys that one of them may see.

    Equal to `DenseAttend`.
    """

    def __init__(self, mask: BlockedMask) -> None:
        self.mask = mask

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        if q_BHTS.device.type == "cpu":
            out: Tensor = _TiledAttention.apply(q_BHTS, k_BGTS, v_BGTS, self.mask)  # type: ignore[no-untyped-call]
            return out
        return self.slice_by_slice(q_BHTS, k_BGTS, v_BGTS)

    def slice_by_slice(self, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        """The same for any device, differentiated by autograd."""
        rows = []
        for row, tiles in enumerate(self.mask.rows):
            q, k, v = q_BHTS[row : row + 1], k_BGTS[row : row + 1], v_BGTS[row : row + 1]
            outs = [sdpa(q[:, :, t.start : t.stop], _visible(k, t), _visible(v, t), t.mask) for t in tiles]
            rows.append(torch.cat(outs, dim=2))
        return torch.cat(rows, dim=0)


class _TiledAttention(torch.autograd.Function):
    """All tiles as one node of the autograd graph, so that their gradients are summed in place."""

    @staticmethod
    def forward(ctx: Any, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor, mask: BlockedMask) -> Tensor:
        # Heads innermost, as the output projection reads them.
        out_BHTS = torch.empty_like(q_BHTS.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        normalisers = []
        for row, tile in mask.tiles():
            q, k, v, bias = _tile_inputs(q_BHTS[row], k_BGTS[row], v_BGTS[row], tile)
            out, log_z = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)
            at = out_BHTS[row, :, tile.start : tile.stop]
            at.copy_(out.reshape(at.shape))
            normalisers.append(log_z)
        ctx.mask = mask
        # Values are a view of the fused projection, all of which would stay in memory.
        ctx.save_for_backward(q_BHTS, k_BGTS, v_BGTS.contiguous(), out_BHTS, *normalisers)
        return out_BHTS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTS: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTS, k_BGTS, v_BGTS, out_BHTS, *normalisers = ctx.saved_tensors
        wide = torch.promote_types(k_BGTS.dtype, torch.float32)
        grad_q, grad_k, grad_v = torch.empty_like(q_BHTS), *(torch.zeros_like(x, dtype=wide) for x in (k_BGTS, v_BGTS))
        for (row, tile), log_z in zip(ctx.mask.tiles(), normalisers, strict=True):
            q, k, v, bias = _tile_inputs(q_BHTS[row], k_BGTS[row], v_BGTS[row], tile)
            grad, out = (x[row, :, tile.start : tile.stop].reshape(q.shape) for x in (grad_BHTS, out_BHTS))
            of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, out, log_z, 0.0, False, attn_mask=bias
            )
            at = grad_q[row, :, tile.start : tile.stop]
            at.copy_(of_q.reshape(at.shape))
            sizes = [stop - start for start, stop in tile.keys]
            for total, part in ((grad_k[row], of_k[0]), (grad_v[row], of_v[0])):
                for (start, stop), piece in zip(tile.keys, part.split(sizes, dim=1), strict=True):
                    total[:, start:stop] += piece
        return grad_q, grad_k.to(k_BGTS.dtype), grad_v.to(v_BGTS.dtype), None


def _tile_inputs(q_HTS: Tensor, k_GTS: Tensor, v_GTS: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and additive mask of one tile, each with a batch of 1; heads that share keys are query rows."""
    groups, _, size = k_GTS.shape
    q_1GQS = q_HTS[:, tile.start : tile.stop].reshape(1, groups, -1, size)
    k_1GKS, v_1GKS = _visible(k_GTS[None], tile), _visible(v_GTS[None], tile)
    if tile.mask is None:
        return q_1GQS, k_1GKS, v_1GKS, None
    bias_QK = torch.zeros_like(tile.mask, dtype=q_HTS.dtype).masked_fill_(~tile.mask, float("-inf"))
    return q_1GQS, k_1GKS, v_1GKS, bias_QK.repeat(q_HTS.shape[0] // groups, 1)[None, None]


class FlexAttend:
    """Attention through FlexAttention's block-sparse kernel, for CUDA; equal to `DenseAttend`."""

    def __init__(self, block_mask: BlockMask) -> None:
        self.block_mask = block_mask

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        # Imported here: it loads torch._dynamo, which takes seconds and which only this backend needs.
        from torch.nn.attention.flex_attention import flex_attention

        kernel = _compiled_flex() if q_BHTS.is_cuda else flex_attention
        out = kernel(q_BHTS, k_BGTS, v_BGTS, block_mask=self.block_mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out


@cache
def _compiled_flex():  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _visible(x_1GTS: Tensor, tile: Tile) -> Tensor:
    """The keys or values that a tile's queries may see."""
    ranges = [x_1GTS[:, :, start:stop] for start, stop in tile.keys]
    return ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim=2)


class Attention(nn.Module):
    """Fused query-key-value projection, optional per-head RMSNorm, rotary embedding, and the output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        size, rank = config.hidden_size, config.gated_lora_rank
        self.qkv = linear(size, config.qkv_size, bias=config.qkv_bias, rank=rank)
        self.out = linear(config.num_heads * config.head_dim, size, bias=config.out_bias, rank=rank)
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def project(self, x_BTD: Tensor, cos: Tensor, sin: Tensor, noisy_BT: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [B, H, T, S], rotated keys and values [B, G, T, S]; `noisy_BT` as in `Transformer.forward`."""
        batch, length, _ = x_BTD.shape
        heads = apply(self.qkv, x_BTD, noisy_BT).view(batch, length, -1, self.head_dim).transpose(1, 2)
        if self.query_norm is None or self.key_norm is None:
            qk, v = heads.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=1)
            q, k = apply_rope(qk, cos, sin).split((self.num_heads, self.num_kv_heads), dim=1)
            return q, k, v
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return apply_rope(self.query_norm(q), cos, sin), apply_rope(self.key_norm(k), cos, sin), v

    def merge(self, heads_BHTS: Tensor, noisy_BT: Tensor | None = None) -> Tensor:
        """Output projection of the attended heads: [B, T, D]."""
        batch, _, length, _ = heads_BHTS.shape
        return apply(self.out, heads_BHTS.transpose(1, 2).reshape(batch, length, -1), noisy_BT)
