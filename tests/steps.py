"""One training step of a tiny model on given documents: what tests compare with sums written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tiny import MASK, Doc, Rows, pack
from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.models.arch.transformer import Transformer
from unmask.train.loop import accumulate
from unmask.train.metrics import MetricRecord
from unmask.train.objectives.base import Objective
from unmask.train.recipe import Recipe, parse_recipe

BLOCK, ROW_LENGTH = 4, 16
PHASE = Phase("decay", BLOCK, 1000)


def packed_rows(docs_of_rows: Sequence[Sequence[Doc]]) -> PackedRows:
    """These documents as the loop gives them to an objective."""
    packed = pack(docs_of_rows, ROW_LENGTH)
    return PackedRows(**{name: getattr(packed, name) for name in Rows.__dataclass_fields__})


def recipe_of(objective: Mapping[str, Any], **train: Any) -> Recipe:
    """A recipe without mask noise, for a model and data that are given otherwise."""
    values = {
        "model": "none",
        "decode_block_size": BLOCK,
        "data": {"row_length": ROW_LENGTH, "sources": [{"kind": "jsonl", "path": "none"}]},
        "objective": {"mask_noise_steps": 0, **objective},
        "train": {"tokens": 1000, **train},
    }
    return parse_recipe(values, "test")


def one_step(model: Transformer, objective: Objective, rows: PackedRows) -> tuple[MetricRecord, dict[str, Tensor]]:
    """The figures of a first step, and its gradients by parameter."""
    model.zero_grad()
    figures = accumulate(objective, rows, PHASE, 0)
    return figures, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def log_p(model: Transformer, hidden: Tensor) -> Tensor:
    """Log-probabilities of all tokens but the mask."""
    return model.head(hidden).index_fill(-1, torch.tensor(MASK), float("-inf")).log_softmax(-1)
