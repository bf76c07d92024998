"""Router balancing of mixtures of experts in training: frozen, by selection bias, or by an auxiliary loss.

Owns the balancing policies and the load of each expert, counted separately for masked and visible tokens: identical mask
embeddings can collapse early routing, and only separate counts show it. Knows nothing of objectives or of the loop.

Legend: K kinds of token (masked, visible), L routed layers, E experts, N tokens, A active experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from unmask.diffusion.corrupt import Stream
from unmask.models.arch.attention import Attend
from unmask.models.arch.moe import MoE, RouterObserver
from unmask.models.arch.transformer import Transformer

RouterPolicy = Literal["frozen", "bias", "aux"]
MASKED, VISIBLE, PADDING = 0, 1, 2


class RouterMonitor:
    """Monitor of all routers of a model, which counts loads and applies one balancing policy.

    - `frozen`: neither router weights nor selection bias change.
    - `bias`: the selection bias moves by `rate` against the sign of the load error after each step, never by gradient.
    - `aux`: a loss `aux_weight * E * sum_e f_e P_e` per layer trains the router weights, P the sum of the normalised scores of
      the step's tokens in all of their copies over the tokens of its documents, f the share of tokens each expert received in
      the step *before*.

    Source: DeepSeek-V3 (2412.19437) Eq. 16 (`bias`); Switch Transformer (2101.03961) Eq. 4 (`aux`). Departs: f is a step old,
        so that the gradient does not depend on how a batch is split.
    """

    def __init__(
        self,
        model: Transformer,
        policy: RouterPolicy,
        *,
        rate: float,
        aux_weight: float,
        sum_over_ranks: Callable[[Tensor], None] = lambda load_KLE: None,
        expert_ranks: int = 1,
    ) -> None:
        """Monitor the routers of a model.

        Args:
            model: with routed layers.
            policy: what changes.
            rate: policy `bias`: change of the selection bias per step.
            aux_weight: policy `aux`: weight of the loss.
            sum_over_ranks: sums counts, in place, over the ranks that see other tokens or hold other layers.
            expert_ranks: ranks that the experts are divided over.
        """
        self.policy = policy
        self._sum_over_ranks, self._expert_ranks = sum_over_ranks, expert_ranks
        self._rate, self._aux_weight = rate, aux_weight
        self._mask_id = -1 if model.config.mask_id is None else model.config.mask_id
        self._layers = [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]
        assert self._layers, "the model has no routed layer"
        self._num_experts = self._layers[0].moe.num_experts
        # The routers may still be on the meta device.
        shape, device = (len(self._layers), self._num_experts), model.inv_freq.device
        self._load_KLE = torch.zeros(3, *shape, dtype=torch.int64, device=device)
        self._share_LE = torch.full(shape, 1 / self._num_experts, device=device)
        self._kind_N = torch.empty(0, dtype=torch.int64)
        self._num_tokens = 1
        self._counting = False
        for number, moe in enumerate(self._layers):
            moe.router.requires_grad_(policy != "frozen" and moe.router.requires_grad)
            moe.observer = self._observer(number)

    def begin_step(self, num_tokens: int) -> None:
        """Reset the counts; `num_tokens` is the size of the *global* batch, the denominator of the auxiliary loss."""
        self._num_tokens = max(num_tokens, 1)
        self._load_KLE.zero_()

    @contextmanager
    def watching(self, stream: Stream, attend: Attend) -> Iterator[Attend]:
        """Count the loads of the forward pass of `stream` inside the `with` block, which is given what to attend with.

        That says, before each layer routes, whose tokens they are: layers are computed once more for their gradients, when
        other streams may have passed in between.
        """
        kind_BT = torch.full_like(stream.tokens_BT, VISIBLE)
        kind_BT[stream.tokens_BT == self._mask_id] = MASKED
        kind_BT[stream.index.document_BT == 0] = PADDING
        kind_N = kind_BT.flatten()

        def announced(layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
            self._kind_N = kind_N
            return attend(layer, q_BHTS, k_BGTS, v_BGTS)

        self._counting = True
        try:
            yield announced
        finally:
            self._counting = False

    def end_step(self) -> dict[str, float]:
        """Update the selection biases (policy `bias`) and return the loads of the step, of all ranks' tokens.

        `load_masked`, `load_visible`: tokens of the busiest expert over the mean, in the worst layer (1: balanced).
        `idle_masked`, `idle_visible`: share of experts that received no token.
        `load_rank`, where experts are on several: tokens of the busiest rank over the mean, in the worst layer.
        """
        self._sum_over_ranks(self._load_KLE)
        load_LE = self._load_KLE[:PADDING].sum(0)
        mean_L1 = load_LE.double().mean(1, keepdim=True)
        if self.policy == "bias":
            for moe, load_E, mean in zip(self._layers, load_LE, mean_L1, strict=True):
                error_E = (mean - load_E).sign().to(moe.expert_bias)
                moe.expert_bias += self._rate * error_E
        self._share_LE.copy_(load_LE / load_LE.sum(1, keepdim=True).clamp(min=1))
        metrics: dict[str, float] = {}
        for name, kind in (("masked", MASKED), ("visible", VISIBLE)):
            counts_LE = self._load_KLE[kind].double()
            metrics[f"load_{name}"] = float((counts_LE.amax(1) / counts_LE.mean(1).clamp(min=1e-9)).max())
            metrics[f"idle_{name}"] = float((counts_LE == 0).double().mean())
        if self._expert_ranks > 1:
            load_LR = load_LE.double().unflatten(1, (self._expert_ranks, -1)).sum(2)
            metrics["load_rank"] = float((load_LR.amax(1) / load_LR.mean(1).clamp(min=1e-9)).max())
        return metrics

    def state_tensors(self) -> dict[str, Tensor]:
        """State for a resumed run: the biases and the shares of the last step."""
        biases_LE = torch.stack([moe.expert_bias for moe in self._layers])
        return {"router.bias": biases_LE, "router.share": self._share_LE}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state of `state_tensors`."""
        for moe, bias_E in zip(self._layers, tensors["router.bias"], strict=True):
            moe.expert_bias.copy_(bias_E)
        self._share_LE.copy_(tensors["router.share"])

    def _observer(self, layer: int) -> RouterObserver:
        def observe(logits_NE: Tensor, indices_NA: Tensor) -> Tensor | None:
            if len(self._kind_N) != len(logits_NE):
                return None
            if self._counting:
                flat_P = (self._kind_N[:, None] * self._num_experts + indices_NA).flatten()
                counts = flat_P.new_zeros(3 * self._num_experts).scatter_add_(0, flat_P, torch.ones_like(flat_P))
                self._load_KLE[:, layer] += counts.view(3, self._num_experts)
            if self.policy != "aux" or not torch.is_grad_enabled():
                return None
            scores_NE = logits_NE.sigmoid() * (self._kind_N != PADDING)[:, None]
            mean_E = (scores_NE / scores_NE.sum(1, keepdim=True).clamp(min=1e-9)).sum(0) / self._num_tokens
            return self._aux_weight * self._num_experts * (self._share_LE[layer].to(mean_E) * mean_E).sum()

        return observe
