"""Checkpoints of a run, whatever the number of its processes: saved, pruned, and read back at any other number.

Owns who writes what and when. One process writes a folder at once, in the layout of `state`. Several write theirs in the
background while training goes on: `shards/` (torch.distributed.checkpoint) in the place of `optimizer.safetensors`, and from it
`model/`. Either is read by any number of processes in any layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from unmask.data.tokenizer import Tokenizer
from unmask.errors import CheckpointError, TrainingError
from unmask.files import disk_errors
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.boxes import BoxedTensor
from unmask.models.weights.safetensors_io import fill_boxes, names_in
from unmask.train.parallel.whole import on_main
from unmask.train.parallel.world import World
from unmask.train.state import (
    OPTIMIZER,
    SHARDS,
    TrainState,
    begin_checkpoint,
    checkpoint_folder,
    finish_checkpoint,
    list_checkpoints,
    partial_folder,
    prune_checkpoints,
    save_checkpoint,
)


class Checkpoints:
    """Checkpoints of one run.

    All methods are called by every rank, in the same order.
    """

    def __init__(self, run: Path, world: World, *, keep: int) -> None:
        """Open the checkpoints of a run.

        Args:
            run: its folder.
            world: the ranks.
            keep: how many checkpoints stay (see `prune_checkpoints`).
        """
        self._run, self._world, self._keep = run, world, keep
        self._group = world.background_group()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in the background has failed; `wait` then raises on every rank."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def save(
        self,
        state: TrainState,
        tensors: Mapping[str, Tensor],
        model: Transformer,
        tokenizer: Tokenizer,
        skeleton: Transformer | None,
    ) -> Path:
        """Save a checkpoint; of several processes, in the background: `wait` says when it is complete.

        Args:
            state: step, tokens, data position, recipe.
            tensors: optimiser state, laid out like the parameters of `model`.
            model: this rank's; whole where there is one process.
            tokenizer: goes with the model.
            skeleton: see `parallel.whole.skeleton_of`; None: one process.

        Returns:
            The checkpoint's folder.

        Raises:
            TrainingError: this save, or the one before it, cannot be written; earlier checkpoints stay untouched.
        """
        self.wait()
        final = checkpoint_folder(self._run, state.step)
        if newest_checkpoint(self._run, self._world) == final:
            # Of this very state: a step that was not taken is the only one that is saved twice.
            return final
        if skeleton is None:
            save_checkpoint(self._run, state, dict(tensors), model, tokenizer)
            prune_checkpoints(self._run, self._keep)
            return final
        partial = partial_folder(final)
        on_main(self._world, lambda: _begin(final))
        staged = {name: tensor.staged() for name, tensor in _with_frozen(tensors, model, self._world).items()}
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._thread.submit(self._write, state, staged, skeleton, tokenizer, partial, final)
        return final

    def wait(self) -> None:
        """Wait until the last save is complete.

        Raises:
            TrainingError: a rank could not write it; on every rank.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        text = next((each for each in self._world.gather_all(None if error is None else str(error)) if each is not None), None)
        if text is not None:
            raise TrainingError(text) from error

    def _write(
        self,
        state: TrainState,
        staged: Mapping[str, BoxedTensor],
        skeleton: Transformer,
        tokenizer: Tokenizer,
        partial: Path,
        final: Path,
    ) -> None:
        from unmask.train.parallel.dcp import write_boxes
        from unmask.train.parallel.export import LayerReader, write_weights
        from unmask.train.parallel.ranks import gathered

        assert self._group is not None
        error: str | None = None
        try:
            with disk_errors(final):
                write_boxes(partial / SHARDS, staged, self._group)
                reader = LayerReader(partial / SHARDS, skeleton)
                write_weights(partial / "model", reader, rank=self._world.rank, size=self._world.size)
        except CheckpointError as caught:
            error = str(caught)
        except Exception as caught:
            # Of whatever kind: the others wait in `gathered`.
            error = self._in_one_line(caught)
        error = next((each for each in gathered(error, self._group) if each is not None), None)
        try:
            if error is None and self._world.is_main:
                tokenizer.save(partial / "model")
                finish_checkpoint(final, state)
                prune_checkpoints(self._run, self._keep)
        except Exception as caught:
            error = self._in_one_line(caught)
        if error is not None:
            if self._world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(f"checkpoint {final} cannot be written: {error}; free some space and resume")

    def _in_one_line(self, error: Exception) -> str:
        return " ".join(f"rank {self._world.rank}: {type(error).__name__}: {error}".split())


def fill_tensors(folder: Path, tensors: Mapping[str, Tensor], model: Transformer, world: World) -> set[str]:
    """Read the saved state of a run into tensors laid out like the parameters of `model`, nothing but this rank's shards.

    Args:
        folder: of a checkpoint, saved by any number of processes in any layout.
        tensors: filled in place, as far as the checkpoint holds them.
        model: this rank's.
        world: the ranks.

    Returns:
        The names that the checkpoint holds.

    Raises:
        CheckpointError: a tensor has another shape, or a file is damaged.
    """
    boxed = _boxed(tensors, model, world)
    if not (folder / SHARDS).is_dir():
        names = set(names_in(folder / OPTIMIZER)) & tensors.keys()
        fill_boxes(folder / OPTIMIZER, {name: boxed[name] for name in names})
        return names
    from unmask.train.parallel.dcp import read_boxes, stored_shapes

    names = stored_shapes(folder / SHARDS).keys() & tensors.keys()
    read_boxes(folder / SHARDS, {name: boxed[name] for name in names})
    return names


def _boxed(tensors: Mapping[str, Tensor], model: Transformer, world: World) -> dict[str, BoxedTensor]:
    if world.size == 1:
        return {name: BoxedTensor.whole(tensor) for name, tensor in tensors.items()}
    from unmask.train.parallel.placement import boxed, reorderings

    orders = reorderings(model, world)
    return {  # a count of steps has no rows to reorder
        name: boxed(tensor, orders.get(name.partition(".")[2]) if tensor.ndim else None) for name, tensor in tensors.items()
    }


def _with_frozen(tensors: Mapping[str, Tensor], model: Transformer, world: World) -> dict[str, BoxedTensor]:
    """Optimiser state and the parameters that are not trained, so that the checkpoint holds the model."""
    from unmask.train.parallel.export import FROZEN, MASTER

    state = model.state_dict()
    # What is on the meta device another stage of a pipeline has.
    own = {name: tensor for name, tensor in state.items() if f"{MASTER}{name}" not in tensors and not tensor.is_meta}
    frozen = {f"{FROZEN}{name}": tensor for name, tensor in own.items()}
    return _boxed({**tensors, **frozen}, model, world)


def _begin(final: Path) -> None:
    try:
        begin_checkpoint(final)
    except OSError as error:
        raise TrainingError(f"checkpoint {final} cannot be written: {error}; free some space and resume") from error


def newest_checkpoint(run: Path, world: World) -> Path | None:
    """The newest complete checkpoint, as the main rank sees it; None: there is none."""
    checkpoints = list_checkpoints(run) if world.is_main else []
    return world.gather_all(checkpoints[-1] if checkpoints else None)[0]
