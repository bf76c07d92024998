"""The suite's models: one tiny random transformer of every family, and a shifted one; the same on every machine.

Weights come from NumPy's frozen Mersenne Twister, not from torch, whose generators differ between CPUs in the last bit.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from tiny import FAMILIES, MASK, tiny_config
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import save_model

KINDS = (*FAMILIES, "shifted")
"""A family, or "shifted": a qwen3 that reads token p - 1 at position p (`shift_start_token_id` in config.json)."""
START = 1

STD = 0.4
"""Large enough that predictions are decisive and varied."""


@cache
def golden_model(family: str, dtype: torch.dtype = torch.float64) -> Transformer:
    """float32 weights, uniform with deviation 0.4, norms 1; the parameters in alphabetical order."""
    shift = {"start_id": START} if family == "shifted" else {}
    model = Transformer(tiny_config("qwen3" if shift else family, mask_id=MASK, block_size=8, **shift))
    drawn = np.random.RandomState(3)
    state = model.state_dict()
    with torch.no_grad():
        for name in sorted(state):
            if name.endswith("norm.weight"):
                state[name].fill_(1.0)
            elif not name.endswith("inv_freq"):
                scale = (0.1 if name.endswith("expert_bias") else STD) * 3**0.5
                values = drawn.uniform(-scale, scale, tuple(state[name].shape))
                state[name].copy_(torch.from_numpy(values.astype(np.float32)))
    return model.to(dtype).eval()


def checksum(family: str) -> str:
    """Of the weights, so that a change of the models is not taken for one of the decoder."""
    state = golden_model(family, torch.float32).state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].numpy().tobytes())
    return digest.hexdigest()[:16]


def save_golden_model(family: str, folder: Path) -> Path:
    """A Hugging Face folder, float32."""
    save_model(golden_model(family, torch.float32), folder)
    return folder
