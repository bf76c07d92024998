"""Mixture of experts with Ling 2.0's router: sigmoid scores, group-limited top-k, shared expert.

Owns routing and the grouped expert products. Knows nothing of balancing policies or of training: those observe it through
`RouterObserver`.

Legend: N tokens, D hidden, E experts, A active experts per token, F expert feed-forward, P = N * A routed pairs, C blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.errors import ConfigError
from unmask.models.arch.config import MoEConfig
from unmask.models.arch.layers import FeedForward


class TokenBlocks(NamedTuple):
    """The block of each token, for block routing: its number [N] int64, and how many blocks there are."""

    number_N: Tensor
    num_blocks: int


def route(logits_NE: Tensor, bias_E: Tensor, moe: MoEConfig, blocks: TokenBlocks | None = None) -> tuple[Tensor, Tensor]:
    """Choose experts and their weights.

    Scores are sigmoids of the logits. `bias_E` only selects: groups are ranked by the sum of their two best biased
    scores, the best groups stay eligible, the top experts among them are chosen by biased score, the lowest of equals first,
    and the weights are the *unbiased* scores, normalised over the chosen and scaled. With an `expert_capacity` there are no
    groups: the experts with the best biased score at any token of a block are open to its tokens.

    Args:
        logits_NE: router logits, float32 or wider.
        bias_E: selection bias.
        moe: the router's sizes.
        blocks: of the tokens, which block routing needs.

    Returns:
        Weights [N, A] in the logits' dtype and expert indices [N, A] int64.

    Raises:
        ConfigError: the model routes by blocks, and there are none.

    Source: DeepSeek-V3 (2412.19437) Eqs 13-16 with group limiting, as used by Ling 2.0 / LLaDA2.0; block routing: the LLaDA2.2
        report, `g_j = max_i s_ij`.
    Departs: the report does not say whether its scores are biased; here they are, as in the published code.
    """
    # Rounded from float64, a score is the same number on every device and in the CPU kernels.
    scores_NE = logits_NE.double().sigmoid().to(logits_NE.dtype)
    biased_NE = scores_NE + bias_E
    if moe.expert_capacity is not None:
        if blocks is None:
            raise ConfigError(
                f"expert_capacity is {moe.expert_capacity}: only decoding knows block routing (LLaDA2.2); for training and "
                "likelihoods take a LLaDA2.0 or 2.1 checkpoint"
            )
        biased_NE = _open_experts(biased_NE, moe.expert_capacity, blocks)
    elif moe.num_active_groups < moe.num_groups:
        grouped = biased_NE.view(-1, moe.num_groups, moe.num_experts // moe.num_groups)
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best_groups = largest(group_scores, moe.num_active_groups)
        eligible = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best_groups, True)
        biased_NE = grouped.masked_fill(~eligible[..., None], float("-inf")).flatten(1)
    indices_NA = largest(biased_NE, moe.num_active)
    weights_NA = scores_NE.gather(1, indices_NA)
    if moe.normalize:
        weights_NA = weights_NA / (weights_NA.sum(-1, keepdim=True) + 1e-20)
    return weights_NA * moe.routed_scale, indices_NA


def _open_experts(biased_NE: Tensor, capacity: int, blocks: TokenBlocks) -> Tensor:
    """Biased scores, those of experts that are not open to the token's block at -inf."""
    number_NE = blocks.number_N[:, None].expand_as(biased_NE)
    best_CE = biased_NE.new_full((blocks.num_blocks, biased_NE.shape[1]), float("-inf"))
    best_CE.scatter_reduce_(0, number_NE, biased_NE, "amax")
    closed_CE = torch.ones_like(best_CE, dtype=torch.bool).scatter_(1, largest(best_CE, capacity), False)
    return biased_NE.masked_fill(closed_CE[blocks.number_N], float("-inf"))


def largest(x_NE: Tensor, count: int) -> Tensor:
    """Indices [N, count] of the largest numbers of each row, in order: the lowest of equals first, which `topk` leaves open."""
    return x_NE.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def grouped_linear(x_PD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Grouped matrix product [P, F]: rows of `x_PD`, sorted by expert, times their expert's matrix.

    `ends_E` (int32) is where each expert's rows end. What the grouped kernel does not support (float64, rows that are not a
    multiple of 16 bytes, no rows at all) runs expert by expert.
    """
    ragged = any(size * weight_EFD.element_size() % 16 for size in weight_EFD.shape[1:])
    if ragged or x_PD.dtype == torch.float64 or not len(x_PD):
        starts = [0, *ends_E.tolist()]
        spans = zip(starts, starts[1:], weight_EFD, strict=False)
        return torch.cat([F.linear(x_PD[a:b], weight_FD) for a, b, weight_FD in spans])
    out: Tensor = F.grouped_mm(x_PD, weight_EFD.transpose(1, 2), offs=ends_E)
    return out


class RunExperts(Protocol):
    """The feed-forward [P, D] of rows `x_PD` sorted by expert; `ends_E` (int32) is where each expert's rows end."""

    def __call__(self, x_PD: Tensor, ends_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor: ...


def run_experts(x_PD: Tensor, ends_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
    """`down(silu(gate x) * up x)` of each row by its expert, all experts being here."""
    gate_PF, up_PF = grouped_linear(x_PD, gate_up_EFD, ends_E).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate_PF) * up_PF, down_EDF, ends_E)


class RouterObserver(Protocol):
    """A callback for every routing decision of one layer; a tensor it returns is added to the training loss."""

    def __call__(self, logits_NE: Tensor, indices_NA: Tensor) -> Tensor | None: ...


class _AuxiliaryLoss(torch.autograd.Function):
    """Auxiliary loss: the identity of `x`, whose backward pass gives the scalar `loss` a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones_like(ctx.like)


class MoE(nn.Module):
    """Routed and shared experts, in place of a `FeedForward`."""

    expert_bias: Tensor

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.moe = moe
        self.router = nn.Parameter(torch.empty(moe.num_experts, hidden_size))
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts))
        self.gate_up = nn.Parameter(torch.empty(moe.num_experts, 2 * moe.expert_size, hidden_size))
        self.down = nn.Parameter(torch.empty(moe.num_experts, hidden_size, moe.expert_size))
        self.shared = FeedForward(hidden_size, moe.expert_size * moe.num_shared) if moe.num_shared else None
        self.observer: RouterObserver | None = None
        self.run_experts: RunExperts = run_experts
        for weight in (self.router, self.gate_up, self.down):
            if not weight.is_meta:  # as in `Transformer`
                nn.init.normal_(weight, std=0.02)

    def router_logits(self, x_ND: Tensor) -> Tensor:
        """Router logits in at least float32: casting them to bfloat16 would choose other experts."""
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.to(wide), self.router.to(wide))

    def forward(self, x_BTD: Tensor, blocks: TokenBlocks | None = None) -> Tensor:
        """Apply to `x_BTD`, `blocks` as of `route`; returns [B, T, D]."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = self.router_logits(x_ND)
        weights_NA, indices_NA = route(logits_NE, self.expert_bias.to(logits_NE.dtype), self.moe, blocks)
        extra_loss = None if self.observer is None else self.observer(logits_NE, indices_NA)
        if extra_loss is not None:
            weights_NA = _AuxiliaryLoss.apply(weights_NA, extra_loss)  # type: ignore[no-untyped-call]
        experts_P, order_P = indices_NA.flatten().sort(stable=True)
        # No shape depends on the data: `bincount` would stop fake and meta tensors.
        number_E = torch.arange(self.moe.num_experts, device=experts_P.device)
        ends_E = torch.searchsorted(experts_P, number_E, right=True, out_int32=True)
        out_PD = self.run_experts(x_ND[order_P // self.moe.num_active], ends_E, self.gate_up, self.down)
        # Back in token order, then weighted and summed in the weights' float32: no scatter, so the order is fixed.
        out_NAD = out_PD[order_P.argsort()].view(*indices_NA.shape, x_ND.shape[-1])
        out_ND = (out_NAD * weights_NA[..., None]).sum(1).to(x_ND.dtype)
        if self.shared is not None:
            out_ND = out_ND + self.shared(x_ND)
        return out_ND.view_as(x_BTD)
