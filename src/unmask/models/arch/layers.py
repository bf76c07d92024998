"""RMSNorm, linear layers, rotary embedding and the dense feed-forward.

Owns position-wise layers. Knows nothing of attention patterns, caches, masks or files.

Legend: B batch, T tokens, D hidden, F feed-forward, H heads, S head dim, R rotary dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unmask.models.arch.config import RopeConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, statistics in float32 (float64 stays float64)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., size]; returns the same shape and dtype."""
        if torch.compiler.is_compiling():
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            normed: Tensor = (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(x.dtype)
            return normed * self.weight
        if not torch.is_grad_enabled():
            return _normalise(x, self.weight, self.eps)[0]
        out: Tensor = _Normalise.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


def _normalise(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x) * weight`, and 1 / rms(x) of each row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale.square_().div_(float(x.shape[-1])).add_(eps).rsqrt_()
    normed: Tensor = (x * scale).to(x.dtype)
    return normed.mul_(weight), scale


class _Normalise(torch.autograd.Function):
    """`x / rms(x) * weight`, keeping `x` and one number per row for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normalise(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        product = grad.to(scale.dtype) * x
        along = (product @ weight.to(scale.dtype))[..., None]
        grad_weight = (scale.flatten() @ product.flatten(0, -2)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad_x = (grad * weight).to(scale.dtype).mul_(scale)
        grad_x.addcmul_(x.to(scale.dtype), along * scale.pow(3), value=-1 / x.shape[-1])
        return grad_x.to(x.dtype), grad_weight, None


class GatedLoraLinear(nn.Linear):
    """Gated LoRA: a linear layer with a low-rank update for noisy rows, `W x + g * B A x` with g = 1 in noisy rows, else 0.

    Source: gated LoRA (2507.11851) section 3.2.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rank: int) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.gated_in = nn.Parameter(torch.zeros(rank, inputs))
        self.gated_out = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor, noisy: Tensor | None = None) -> Tensor:
        """Outputs [..., outputs] of `x` [..., inputs]; `noisy` (bool [...]) marks the noisy rows, None: there are none."""
        out = super().forward(x)
        if noisy is None:
            return out
        return out + F.linear(F.linear(x, self.gated_in) * noisy[..., None], self.gated_out)


def linear(inputs: int, outputs: int, *, bias: bool, rank: int | None) -> nn.Linear:
    """A linear layer; with a `rank`, one with gated LoRA."""
    if rank is None:
        return nn.Linear(inputs, outputs, bias=bias)
    return GatedLoraLinear(inputs, outputs, bias=bias, rank=rank)


def apply(layer: nn.Module, x: Tensor, noisy: Tensor | None) -> Tensor:
    """The layer's output for `x`, whose noisy rows are `noisy` (None: there are none, and any layer will do)."""
    out: Tensor = layer(x) if noisy is None else layer(x, noisy)
    return out


class FeedForward(nn.Module):
    """SwiGLU: `down(silu(gate x) * up x)` with gate and up in one matrix product."""

    def __init__(self, hidden_size: int, ffn_size: int, *, bias: bool = False, rank: int | None = None) -> None:
        super().__init__()
        self.gate_up = linear(hidden_size, 2 * ffn_size, bias=bias, rank=rank)
        self.down = linear(ffn_size, hidden_size, bias=bias, rank=rank)

    def forward(self, x_BTD: Tensor, noisy_BT: Tensor | None = None) -> Tensor:
        """Apply to `x_BTD`; returns [B, T, D]."""
        gate_up = apply(self.gate_up, x_BTD, noisy_BT)
        by_hand = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        gated: Tensor = _Gate.apply(gate_up) if by_hand else swiglu(gate_up)  # type: ignore[no-untyped-call]
        return apply(self.down, gated, noisy_BT)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `gate | up` [..., 2F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up if torch.compiler.is_compiling() else F.silu(gate).mul_(up)


class _Gate(torch.autograd.Function):
    """`silu(gate) * up` of `gate | up` [..., 2F], keeping only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        of_gate, of_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=of_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=of_gate)
        return out


def rope_frequencies(rope: RopeConfig, rotary_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies and the factor on cos and sin.

    Args:
        rope: the scaling rule.
        rotary_dim: even number of rotating dimensions R.

    Returns:
        Float32 [R / 2] frequencies in radians per position, and YaRN's attention factor (1.0 otherwise).

    Source: RoFormer Eq. 34; YaRN (2309.00071) Eqs 18-22; Llama 3.1's frequency-dependent scaling.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    inv_freq = 1.0 / (rope.theta**exponent)
    if rope.kind == "default":
        return inv_freq, 1.0
    if rope.kind == "linear":
        return inv_freq / rope.factor, 1.0
    assert rope.original_max_positions is not None
    if rope.kind == "llama3":
        return _llama3_frequencies(inv_freq, rope, rope.original_max_positions), 1.0
    return _yarn_frequencies(inv_freq, rope, rope.original_max_positions, rotary_dim)


def _llama3_frequencies(inv_freq: Tensor, rope: RopeConfig, original: int) -> Tensor:
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    scaled = torch.where(wavelength > original / rope.low_freq_factor, inv_freq / rope.factor, inv_freq)
    medium = (wavelength <= original / rope.low_freq_factor) & (wavelength >= original / rope.high_freq_factor)
    return torch.where(medium, smooth, scaled)


def _yarn_frequencies(inv_freq: Tensor, rope: RopeConfig, original: int, rotary_dim: int) -> tuple[Tensor, float]:
    def dimension_of(rotations: float) -> float:
        return rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension_of(rope.beta_fast)), 0)
    high = min(math.ceil(dimension_of(rope.beta_slow)), rotary_dim - 1)
    index = torch.arange(rotary_dim // 2, dtype=torch.float32)
    extrapolate = 1 - ((index - low) / (high - low or 0.001)).clamp(0, 1)
    scaled = inv_freq / rope.factor * (1 - extrapolate) + inv_freq * extrapolate
    attention = rope.attention_factor
    if attention is None:
        attention = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return scaled, attention


def rope_cos_sin(positions_BT: Tensor, inv_freq: Tensor, factor: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines at `positions_BT` (int64): each [B, 1, T, R], ready to broadcast over heads."""
    wide = torch.promote_types(dtype, torch.float32)
    angles_BTr = positions_BT[..., None].to(wide) * inv_freq.to(wide)
    angles = torch.cat((angles_BTr, angles_BTr), dim=-1)[:, None]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def apply_rope(x_BHTS: Tensor, cos_B1TR: Tensor, sin_B1TR: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head, halves convention (Hugging Face's `rotate_half`)."""
    rotary_dim = cos_B1TR.shape[-1]
    x_rot, x_pass = x_BHTS[..., :rotary_dim], x_BHTS[..., rotary_dim:]
    first, second = x_rot.chunk(2, dim=-1)
    rotated = x_rot * cos_B1TR + torch.cat((-second, first), dim=-1) * sin_B1TR
    return rotated if x_pass.shape[-1] == 0 else torch.cat((rotated, x_pass), dim=-1)
