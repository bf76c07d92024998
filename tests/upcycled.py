"""A mixture of experts with real predictions: a dense model upcycled in memory, as `scripts/upcycle.py` does on disk."""

from __future__ import annotations

from typing import Any

import torch
from upcycle import UpcycledTensors, Upcycling

from unmask.models.arch.transformer import Transformer
from unmask.models.families.registry import stored_tensors


def upcycled(dense: Transformer, *, family: str = "bailing_moe_v2", **options: Any) -> Transformer:
    """The mixture that says what `dense` says; options as of `Upcycling`."""
    tensors = UpcycledTensors(dense, Upcycling(family=family, **options))
    model = Transformer(tensors.config).to(dense.embed.weight.dtype)
    state = model.state_dict()
    for name, tensor in stored_tensors(tensors.config).items():
        with torch.no_grad():
            tensor.view(state).copy_(tensors.read(name))
    return model.eval()
