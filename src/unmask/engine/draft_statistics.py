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

from unmask.engine.acceptance import DraftHistory
from unmask.engine.costs import ForwardCosts, MeasuredCosts
from unmask.errors import CheckpointError
from unmask.files import atomic_write, bytes_writer
from unmask.models.weights.hub import cache_folder, cache_name

_LEAST_SECONDS = 2.0
"""Between two writes."""


class DraftStatistics:
    """Costs of forwards and acceptance of drafts, shared by the engines of a model.

    Args:
        kernels: what computes, as of `Backend.kernels`.
        path: of the file; None: kept in memory alone.
        costs: given ones, which are not kept; None: learnt.
    """

    def __init__(self, kernels: str = "", path: Path | None = None, *, costs: ForwardCosts | None = None) -> None:
        learnt = MeasuredCosts(kernels.partition("-")[0])
        self.costs: ForwardCosts = learnt if costs is None else costs
        self.history = DraftHistory()
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


def statistics_path(folder: Path | None, kernels: str, num_threads: int) -> Path | None:
    """The file of the model in a folder; None where nothing is kept: no folder, or `UNMASK_DRAFT_STATISTICS=0`."""
    if folder is None or os.environ.get("UNMASK_DRAFT_STATISTICS") == "0":
        return None
    return statistics_folder() / f"{cache_name(folder)}-{kernels}-{num_threads}.json"


def statistics_folder() -> Path:
    """Where the files are kept."""
    return cache_folder() / "drafting"
