"""AdamW on float32 master weights, and the learning-rate schedule.

Owns the optimiser state and the precision of updates. Knows nothing of losses or data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from unmask.train.parallel.world import World
from unmask.train.sections import TrainSection

_STATE_NAMES = {"step": "step", "exp_avg": "moment1", "exp_avg_sq": "moment2"}
"""Torch's names of AdamW's state, and those in a checkpoint."""


class MasterAdamW:
    """AdamW whose weights, gradients and moments are float32 whatever the model computes in.

    Each backward pass adds its gradient to the float32 master and frees the model's own, so that accumulation over
    micro-batches never rounds to bfloat16. Where the model is float32 already, master and model share memory; so they do on
    several ranks, where a master is this rank's shard of a parameter. Matrices decay; norms, biases and other vectors do not.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        world: World | None = None,
        duplicates: frozenset[str] = frozenset(),
    ) -> None:
        """Take the trained ones of named parameters.

        Args:
            named: all parameters of the model.
            betas, weight_decay: AdamW's.
            world: the ranks.
            duplicates: parameters whose gradients another stage of a pipeline counts in the norm.
        """
        self._world, self._duplicates = world or World.single(), duplicates
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            master = parameter
            if self._world.size > 1:
                master = nn.Parameter(self._world.local(parameter.detach()))
            elif parameter.dtype != torch.float32:
                master = nn.Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(partial(_collect, master))
            self._pairs[name] = (parameter, master)
        groups = [
            {"params": [master for master in self.parameters if master.ndim >= 2], "weight_decay": weight_decay},
            {"params": [master for master in self.parameters if master.ndim < 2], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The master weights of this rank, whose `.grad` holds the accumulated gradients once `clip` was called."""
        return [master for _, master in self._pairs.values()]

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients of all ranks to at most `max_norm`; returns their norm before, a float32 scalar."""
        pairs = self._pairs.values()
        counted = [pair for name, pair in self._pairs.items() if name not in self._duplicates]
        gradients = [master.grad if parameter.grad is None else parameter.grad for parameter, master in counted]
        norm = self._world.norm([gradient for gradient in gradients if gradient is not None])
        for parameter, master in pairs:
            if parameter is not master and parameter.grad is not None:
                master.grad = self._world.local(parameter.grad)
        nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
        return norm

    def drop_gradients(self) -> None:
        """Discard the accumulated gradients."""
        self._adamw.zero_grad()
        for parameter, _ in self._pairs.values():
            parameter.grad = None

    def step(self, learning_rate: float) -> None:
        """Update the masters, copy them to a model of narrower dtype, drop the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self.drop_gradients()
        with torch.no_grad():
            for parameter, master in self._pairs.values():
                if parameter.dtype != master.dtype:
                    parameter.copy_(master)

    def state_tensors(self) -> dict[str, Tensor]:
        """State for a resumed run, by name: `master.*`, `moment1.*`, `moment2.*`, `step.*`; sharded like the parameters."""
        tensors: dict[str, Tensor] = {}
        for name, (parameter, master) in self._pairs.items():
            state = {"master": master.detach()}
            state |= {_STATE_NAMES[key]: tensor for key, tensor in self._adamw.state.get(master, {}).items()}
            for kind, tensor in state.items():
                tensors[f"{kind}.{name}"] = tensor if kind == "step" else self._world.sharded(tensor, parameter)
        return tensors

    def empty_state(self) -> dict[str, Tensor]:
        """Tensors like those of `state_tensors` after a step, to be filled and given to `load_state_tensors`.

        Zero, since no checkpoint holds the padding of a vocabulary that is divided over tensor ranks.
        """
        tensors: dict[str, Tensor] = {}
        for name, (parameter, master) in self._pairs.items():
            for kind in ("master", "moment1", "moment2"):
                tensors[f"{kind}.{name}"] = self._world.sharded(torch.zeros_like(master.detach()), parameter)
            tensors[f"step.{name}"] = torch.zeros((), device=master.device)
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of `state_tensors`; the model's weights are copied from the masters."""
        with torch.no_grad():
            for name, (parameter, master) in self._pairs.items():
                master.copy_(self._world.local(tensors[f"master.{name}"]))
                if parameter.dtype != master.dtype:
                    parameter.copy_(master)
                if f"step.{name}" in tensors:
                    state = {key: tensors[f"{saved}.{name}"] for key, saved in _STATE_NAMES.items()}
                    self._adamw.state[master] = {key: self._world.local(tensor) for key, tensor in state.items()}


def _collect(master: nn.Parameter, parameter: Tensor) -> None:
    """Move the gradient of a parameter to its master."""
    assert parameter.grad is not None
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None


def learning_rate(train: TrainSection, step: int, tokens: int) -> float:
    """Rate of step `step` (from 0) after `tokens` of the budget `train.tokens`.

    Linear warmup over steps, then constant, or cosine / linear decay over tokens to `final_lr_share` of the peak.
    """
    warm = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    progress = min(tokens / train.tokens, 1.0)
    height = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}[train.schedule]
    return train.learning_rate * warm * (train.final_lr_share + (1 - train.final_lr_share) * height)
