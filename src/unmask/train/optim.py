"""AdamW on float32 master weights, and the learning-rate schedule.

Owns the optimiser state and the precision of updates. Knows nothing of losses or data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

LearningRateSchedule = Literal["constant", "cosine", "linear"]


class MasterAdamW:
    """AdamW whose weights, gradients and moments are float32 whatever the model computes in.

    Each backward pass adds its gradient to the float32 master and frees the model's own, so that accumulation over
    micro-batches never rounds to bfloat16. Where the model is float32 already, master and model share memory.
    Matrices decay; norms, biases and other vectors do not.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], *, betas: tuple[float, float], weight_decay: float) -> None:
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            if parameter.dtype == torch.float32:
                self._pairs[name] = (parameter, parameter)
            else:
                master = nn.Parameter(parameter.detach().float().clone())
                self._pairs[name] = (parameter, master)
                parameter.register_post_accumulate_grad_hook(self._hook(master))
        masters = [master for _, master in self._pairs.values()]
        groups = [
            {"params": [m for m in masters if m.ndim >= 2], "weight_decay": weight_decay},
            {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=True)

    @staticmethod
    def _hook(master: nn.Parameter):  # type: ignore[no-untyped-def]
        def collect(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

        return collect

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The master weights, whose `.grad` holds the accumulated gradients."""
        return [master for _, master in self._pairs.values()]

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to at most `max_norm`; returns their norm before, a float32 scalar."""
        return nn.utils.clip_grad_norm_(self.parameters, max_norm)

    def drop_gradients(self) -> None:
        """Discard the accumulated gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def step(self, learning_rate: float) -> None:
        """Update the masters, copy them to the model, drop the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self._pairs.values():
                if parameter is not master:
                    parameter.copy_(master)

    def state_tensors(self) -> dict[str, Tensor]:
        """State for a resumed run, by name: `master.*`, `moment1.*`, `moment2.*`, `step.*`."""
        tensors: dict[str, Tensor] = {}
        for name, (_, master) in self._pairs.items():
            state = self._adamw.state.get(master)
            tensors[f"master.{name}"] = master.detach()
            if state:
                tensors[f"moment1.{name}"], tensors[f"moment2.{name}"] = state["exp_avg"], state["exp_avg_sq"]
                tensors[f"step.{name}"] = state["step"]
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state of `state_tensors`; the model's weights are copied from the masters."""
        with torch.no_grad():
            for name, (parameter, master) in self._pairs.items():
                master.copy_(tensors[f"master.{name}"])
                if parameter is not master:
                    parameter.copy_(master)
                if f"moment1.{name}" in tensors:
                    self._adamw.state[master] = {
                        "step": tensors[f"step.{name}"].clone(),
                        "exp_avg": tensors[f"moment1.{name}"].to(master.device).clone(),
                        "exp_avg_sq": tensors[f"moment2.{name}"].to(master.device).clone(),
                    }


def learning_rate(
    step: int, progress: float, *, peak: float, warmup_steps: int, schedule: LearningRateSchedule, final_share: float
) -> float:
    """Rate of step `step` (from 0) at `progress` in [0, 1] of the token budget.

    Linear warmup over steps, then constant, or cosine / linear decay over tokens to `final_share` of the peak.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = min(max(progress, 0.0), 1.0)
    if schedule == "cosine":
        decay = final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        decay = final_share + (1 - final_share) * (1 - progress)
    else:
        decay = 1.0
    return peak * warm * decay
