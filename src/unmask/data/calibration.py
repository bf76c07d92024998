"""Rows of text to calibrate a quantised model with, and the text that the package brings along."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import torch
from torch import Tensor

from unmask.data.documents import Source
from unmask.errors import DataError

ROW_LENGTH = 256
NUM_ROWS = 64


def packaged_text() -> Path:
    """A jsonl file of a few hundred short answers, written by the embedded model."""
    return Path(str(importlib.resources.files("unmask") / "assets" / "calibration.jsonl"))


def calibration_rows(source: Source, *, num_rows: int = NUM_ROWS, length: int = ROW_LENGTH) -> Tensor:
    """The first documents of a source, end to end.

    Args:
        source: at its beginning.
        num_rows: at most so many.
        length: tokens of a row.

    Returns:
        int64 ids [R, T], of one pass over the source at most.

    Raises:
        DataError: the source does not fill a row.
    """
    tokens: list[int] = []
    while source.epoch == 0 and len(tokens) < num_rows * length:
        tokens += source.next_document().tokens.tolist()
    rows = min(len(tokens) // length, num_rows)
    if rows == 0:
        raise DataError(f"{source.name} holds {len(tokens)} tokens; calibration needs at least {length}")
    return torch.tensor(tokens[: rows * length]).view(rows, length)
