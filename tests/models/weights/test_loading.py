"""One entrance for every reference to a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import refused
from models.weights.saved import same_weights
from tiny import tiny_model
from unmask.errors import CheckpointError
from unmask.models.weights.adapter import attach_lora, save_adapter
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.loading import load_model


@pytest.mark.parametrize("reference", [Path, str])
def test_folders_and_adapters(reference: type[Path] | type[str], tmp_path: Path) -> None:
    model = tiny_model("llama")
    save_model(model, tmp_path / "base")
    assert same_weights(load_model(reference(tmp_path / "base"), dtype=torch.float32), model)
    adapted = attach_lora(load_model(tmp_path / "base", dtype=torch.float32), rank=2, alpha=2.0, seed=0, train_embedding=False)
    save_adapter(adapted, tmp_path / "adapter", base=str(tmp_path / "base"))
    assert same_weights(load_model(reference(tmp_path / "adapter"), dtype=torch.float32), model)  # B is zero


def test_an_unknown_reference_is_named() -> None:
    with refused(CheckpointError, "'nothing-of-that-name'"):
        load_model("nothing-of-that-name", dtype=torch.float32)
