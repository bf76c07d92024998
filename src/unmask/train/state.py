"""Training checkpoints: everything that an interrupted run needs to resume exactly.

Owns the layout of `checkpoints/step-N/`: `model/` (a Hugging Face folder), `optimizer.safetensors` (or, of several processes,
`shards/`), `state.json`. A checkpoint appears under its name only when it is complete. How tensors are read, and written by
several processes, is `checkpoints`' matter.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.data.tokenizer import Tokenizer
from unmask.errors import CheckpointError, TrainingError
from unmask.files import bytes_writer, sync_folder, write_synced
from unmask.models.arch.transformer import Transformer
from unmask.models.weights import checkpoint
from unmask.models.weights.safetensors_io import specs_of, write_safetensors

FORMAT = 2
OPTIMIZER, SHARDS = "optimizer.safetensors", "shards"


@dataclass(frozen=True)
class TrainState:
    """State of a run after `step` optimiser steps.

    `packer` is the data position, with digests of the data; `tokenizer` is `Tokenizer.identity`. Noise needs no state.
    """

    step: int
    tokens: int
    packer: dict[str, Any]
    recipe: dict[str, Any]
    tokenizer: str
    validation: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "state.json").exists())


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return run / "checkpoints" / f"step-{step:07d}"


def save_model(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (adapters folded in), config and tokenizer as a Hugging Face folder."""
    checkpoint.save_model(model, folder)
    tokenizer.save(folder)


def save_checkpoint(run: Path, state: TrainState, tensors: dict[str, Tensor], model: Transformer, tokenizer: Tokenizer) -> None:
    """Write a checkpoint beside its final name, then rename it into place.

    Args:
        run: the run's folder.
        state: step, tokens, data position, recipe.
        tensors: optimiser state.
        model, tokenizer: contents of `model/`.

    Raises:
        TrainingError: the disk is full or not writable; earlier checkpoints stay untouched.
    """
    final = checkpoint_folder(run, state.step)
    partial = partial_folder(final)
    try:
        begin_checkpoint(final)
        save_model(model, tokenizer, partial / "model")
        write_synced(partial / OPTIMIZER, lambda file: write_safetensors(file, specs_of(tensors), tensors, tensors.__getitem__))
        finish_checkpoint(final, state)
    except (OSError, CheckpointError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(f"checkpoint {final} cannot be written: {error}; free some space and resume") from error


def partial_folder(final: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return final.with_name(f".{final.name}.partial")


def begin_checkpoint(final: Path) -> None:
    """Make the empty folder that a checkpoint is written in; what killed saves and removals left beside it goes."""
    for left in final.parent.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    partial_folder(final).mkdir(parents=True)


def finish_checkpoint(final: Path, state: TrainState) -> None:
    """Give a checkpoint, all else of which is on disk, its state and its name."""
    partial = partial_folder(final)
    write_synced(partial / "state.json", bytes_writer(json.dumps(asdict(state)).encode()))
    sync_folder(partial)
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    sync_folder(final.parent)


def read_state(folder: Path) -> TrainState:
    """A checkpoint's state, without its tensors.

    Raises:
        CheckpointError: unreadable, or of another format.
    """
    try:
        values = json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}; remove it to resume from another") from error
    if values.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {folder} has format {values.get('format')}; this version reads {FORMAT}")
    return TrainState(**values)


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but `keep` checkpoints: keep the newest, to resume from, and the best of the others.

    The best have the lowest validation NELBO at the newest one's block size; checkpoints that do not compare come last, the
    newer before the older.
    """
    *others, newest = list_checkpoints(run) or [run]
    block_size = json.loads((newest / "state.json").read_text())["validation"].get("block_size") if others else None

    def rank(path: Path) -> tuple[float, int]:
        score = validation_score(path)
        comparable = score is not None and score.block_size == block_size
        return (score.nelbo if score is not None and comparable else float("inf"), -others.index(path))

    for path in sorted(others, key=rank)[keep - 1 :]:
        # At once: a half of it must not be taken for a checkpoint when this process is killed.
        removed = path.rename(path.with_name(f".{path.name}.removed"))
        shutil.rmtree(removed)


@dataclass(frozen=True)
class ValidationScore:
    """Validation NELBO (nats per token) of a checkpoint, and the block size it was measured at (None: whole sequence)."""

    nelbo: float
    block_size: int | None


def validation_score(folder: Path) -> ValidationScore | None:
    """Validation score of a checkpoint; None if it was not evaluated at the step it was saved."""
    values = json.loads((folder / "state.json").read_text())
    score = values["validation"]
    if not score or score["step"] != values["step"]:
        return None
    return ValidationScore(score["nelbo"], score["block_size"])
