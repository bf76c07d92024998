"""LoRA by row: several adapters in one forward, each applied to rows of its own, all other rows computed as without them.

Owns the layer and how a model gets it. Knows neither files nor what a row belongs to.

Legend: T rows of a forward, K inputs and V outputs of a layer, R rank.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.arch.layers import apply
from unmask.models.arch.transformer import Transformer, reconfigured


class LayerUpdate(NamedTuple):
    """The low-rank update of a linear layer, `B A x`."""

    a_RK: Tensor
    b_VR: Tensor


class AdaptedRows(NamedTuple):
    """Consecutive rows of a forward, and the updates that apply to them, by the name of the layer."""

    start: int
    stop: int
    updates: Mapping[str, LayerUpdate]


class RowSelection(threading.local):
    """Which rows of the forward that a thread is about to run are adapted."""

    rows: Sequence[AdaptedRows] = ()


class RowLoraLinear(nn.Module):
    """A linear layer, `W x`, to which some rows add the update of an adapter."""

    def __init__(self, base: nn.Module, name: str, selection: RowSelection) -> None:
        super().__init__()
        self.base, self._name, self._selection = base, name, selection

    def forward(self, x: Tensor, noisy: Tensor | None = None) -> Tensor:
        """Outputs [..., T, V] of `x` [..., T, K]; `noisy` as of the layer itself."""
        out = apply(self.base, x, noisy)
        for start, stop, updates in self._selection.rows:
            if (update := updates.get(self._name)) is not None:
                out[..., start:stop, :] += F.linear(F.linear(x[..., start:stop, :], update.a_RK), update.b_VR)
        return out


def with_row_lora(model: Transformer, layers: Iterable[str], selection: RowSelection) -> Transformer:
    """A model for inference that shares the weights of `model` and reads from `selection` which rows are adapted.

    Args:
        model: stays as it is.
        layers: names of the linear layers that adapters may change.
        selection: set before each forward, of one row of tokens.
    """
    adapted = reconfigured(model, model.config).requires_grad_(False).eval()
    for name in layers:
        parent, _, child = name.rpartition(".")
        setattr(adapted.get_submodule(parent), child, RowLoraLinear(adapted.get_submodule(name), name, selection))
    return adapted
