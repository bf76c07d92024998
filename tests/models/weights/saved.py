"""Saved models: made for a test, and compared with models in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiny import tiny_model
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.loading import load_model


def saved_base(family: str, folder: Path, **changes: Any) -> Path:
    """A random model as a checkpoint folder."""
    save_model(tiny_model(family, **changes), folder)
    return folder


def same_weights(a: Transformer, b: Transformer) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


def loads_as(folder: Path, *models: Transformer) -> list[bool]:
    loaded = load_model(folder, dtype=torch.float32)
    return [same_weights(loaded, model) for model in models]
