"""What the engines of a model have learnt for drafting, kept for the next engine and, in a file, for the next process.

Owns the file: one for each model, kind of kernels and number of threads. What it holds are estimates (`engine.costs`,
`engine.acceptance`) that go on changing: a file that is damaged or gone costs nothing but a slower start. It decides the speed,
and no text.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import torch

from unmask.engine.acceptance import DraftHistory
from unmask.engine.costs import ForwardCosts, MeasuredCosts
from unmask.engine.ngrams import NgramTable, find_ngrams
from unmask.errors import CheckpointError
from unmask.files import atomic_write, bytes_writer
from unmask.models.weights.hub import cache_folder, cache_name

_LEAST_SECONDS = 2.0
"""Between two writes."""


class DraftStatistics:
    """Costs of forwards, acceptance of drafts and the model's n-grams, shared by the engines of a model.

    Args:
        kernels: what computes, as of `Backend.kernels`.
        path: of the file; None: kept in memory alone.
        costs: given ones, which are not kept; None: learnt.
        ngrams: of text that the model wrote; None: nothing is drafted from such text.
    """

    def __init__(
        self,
        kernels: str = "",
        path: Path | None = None,
        *,
        costs: ForwardCosts | None = None,
        ngrams: NgramTable | None = None,
    ) -> None:
        learnt = MeasuredCosts(kernels.partition("-")[0])
        self.costs: ForwardCosts = learnt if costs is None else costs
        self.history, self.ngrams = DraftHistory(), ngrams
        self._learnt, self._path, self._written = learnt, path, -_LEAST_SECONDS
        if path is not None:
            with suppress(OSError, ValueError, KeyError, TypeError):  # not there, damaged, or of another version
                state = json.loads(path.read_text(encoding="utf-8"))
                learnt.restore(state["costs"])
                self.history.restore(state["acceptance"])

    def keep(self) -> None:
        """Write the file, unless it has just been written."""
        now = time.monotonic()
        if self._path is None or now - self._written < _LEAST_SECONDS:
            return
        self._written = now
        content = json.dumps({"costs": self._learnt.state(), "acceptance": self.history.state()})
        with suppress(CheckpointError):  # no room, or another user's folder
            # Not synchronised with the disk, which takes long: what a power cut damages is not read.
            atomic_write(self._path, bytes_writer(content.encode()), synced=False)


def open_statistics(model: str, folder: Path | None, kernels: str, vocab_size: int) -> DraftStatistics:
    """Those of a model, by its name and folder (None: it has none), as they were kept.

    Raises:
        CheckpointError: the model's table of n-grams is damaged, or of another model.
    """
    path = statistics_path(folder, kernels, torch.get_num_threads())
    return DraftStatistics(kernels, path, ngrams=find_ngrams(model, folder, vocab_size))


def statistics_path(folder: Path | None, kernels: str, num_threads: int) -> Path | None:
    """The file of the model in a folder; None where nothing is kept: no folder, or `UNMASK_DRAFT_STATISTICS=0`."""
    if folder is None or os.environ.get("UNMASK_DRAFT_STATISTICS") == "0":
        return None
    return statistics_folder() / f"{cache_name(folder)}-{kernels}-{num_threads}.json"


def statistics_folder() -> Path:
    """Where the files are kept."""
    return cache_folder() / "drafting"
