"""LoRA adapters of tiny models, for tests: folders as training writes them, and the models with one folded in."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch

from unmask.models.arch.transformer import Transformer
from unmask.models.weights.adapter import attach_lora, fold_adapter, load_adapter, save_adapter


def write_adapter(model: Transformer, folder: Path, *, seed: int = 0, rank: int = 3, train_embedding: bool = False) -> Path:
    """An adapter of the model as training could have left it."""
    adapted = attach_lora(deepcopy(model).float(), rank=rank, alpha=6.0, seed=seed, train_embedding=train_embedding)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_b" in name:
                parameter.normal_(std=0.3, generator=generator)
    save_adapter(adapted, folder, base="base")
    return folder


def folded(model: Transformer, folder: Path) -> Transformer:
    """The model with that adapter and no other, as it is loaded alone."""
    return fold_adapter(load_adapter(deepcopy(model), folder)).requires_grad_(False).eval()
