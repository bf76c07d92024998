"""The training loop: optimiser steps over a block-size schedule, evaluations, checkpoints.

Owns the order of a step and the normalisation of losses and figures. Stages differ by objective, data and schedule, all given;
the loop knows nothing of what is minimised, of where a model or its data come from, nor how progress is shown.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.data.packing import PackedRows, RowStream
from unmask.data.tokenizer import Tokenizer
from unmask.diffusion.blocks import Phase
from unmask.errors import ConfigError, TrainingError, UnmaskNote
from unmask.models.arch.transformer import Transformer
from unmask.train.checkpoints import Checkpoints, fill_tensors, newest_checkpoint
from unmask.train.metrics import MetricLog, MetricRecord
from unmask.train.objectives.base import Figure, MicroBatch, Objective, Output, StreamBatch
from unmask.train.optim import MasterAdamW, learning_rate
from unmask.train.parallel.world import World
from unmask.train.passes import Pass, Pipeline
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.router import RouterMonitor
from unmask.train.speed import Utilisation, gpu_of, peak_memory, speed_figures
from unmask.train.state import TrainState, read_state


@dataclass(frozen=True)
class Components:
    """Everything a run is made of."""

    model: Transformer
    objective: Objective
    router: RouterMonitor | None
    packer: RowStream
    validation: PackedRows | None
    recipe: Recipe
    tokenizer: Tokenizer
    skeleton: Transformer | None = None
    """Of a model that is divided over ranks: the whole, on the meta device, as it is saved."""

    @property
    def world(self) -> World:
        """The ranks."""
        return self.objective.setting.world


_BatchResult = tuple[float, Mapping[str, Figure]]
"""Loss (nats) and figures of a micro-batch."""


def accumulate(objective: Objective, rows: PackedRows, phase: Phase, step: int) -> MetricRecord:
    """Add the gradient of a global batch, micro-batch by micro-batch.

    Args:
        objective: what is minimised.
        rows: of the global batch, those of this rank.
        phase: where the run stands in its block-size schedule.
        step: optimiser steps before this one.

    Returns:
        `loss` (nats) and the objective's figures; none of them, nor the gradient, depends on how the batch is split.
    """
    setting = objective.setting
    batches = [objective.prepare(part, phase, step) for part in setting.micro_batches(rows)]
    # A single micro-batch brings the counts of the global batch along; of several they are needed before the first backward.
    single = batches[0].forward() if len(batches) == 1 and setting.pipeline is None else None
    parts = [batch.counts() for batch in batches] if single is None else [tuple(term.count for term in single.terms)]
    # Gathered in the order of the rows, and not summed by rank, so that sums are the same to the bit on every layout.
    counts = [sum(column) for column in zip(*chain.from_iterable(setting.world.gather(parts)), strict=True)]
    results: list[_BatchResult] = []
    if setting.pipeline is not None:
        results = _train_stages(setting.pipeline, batches, counts)
    else:
        for number, batch in enumerate(batches, start=1):
            output = single or batch.forward()
            partial_loss = _partial_loss(output, counts)
            setting.world.begin_backward(setting.model, is_last=number == len(batches))
            partial_loss.backward()
            results.append((float(partial_loss.detach()), output.figures))
    setting.world.sum_gradients(setting.model.parameters())
    losses, figures = zip(*chain.from_iterable(setting.world.gather(results)), strict=True)
    return {"loss": sum(losses), **_means(figures)}


def _partial_loss(output: Output, counts: Sequence[float]) -> Tensor:
    """A micro-batch's part of the loss; `counts` are the global batch's."""
    first, *others = [term.sum / max(count, 1) for term, count in zip(output.terms, counts, strict=True)]
    return sum(others, start=first)


def _train_stages(pipeline: Pipeline, batches: Sequence[MicroBatch], counts: Sequence[float]) -> list[_BatchResult]:
    """Add the gradient of micro-batches whose layers are on several ranks; every rank gets their losses and figures."""
    results: list[_BatchResult | None] = [None] * len(batches)

    def stages(number: int, batch: MicroBatch) -> Pass[Tensor]:
        def finish(output: Output) -> Tensor:
            loss = _partial_loss(output, counts)
            results[number] = (float(loss.detach()), output.figures)
            return loss

        assert isinstance(batch, StreamBatch)
        return batch.stages(finish)

    pipeline.train([stages(number, batch) for number, batch in enumerate(batches)])
    return [result for result in pipeline.from_last(results) if result is not None]


@torch.no_grad()
def evaluate(objective: Objective, rows: PackedRows, phase: Phase) -> MetricRecord:
    """Figures of held-out rows under fixed noise, among them `nelbo` (nats per token); data ranks share the batches."""
    world, batches = objective.setting.world, list(objective.setting.micro_batches(rows))
    figures: list[Mapping[str, Figure]] = []
    for start in range(0, len(batches), world.dims.data):
        number = start + world.index("data")
        # Every rank takes part in every forward pass: one that has no batch left repeats the first, for nothing.
        part = objective.evaluate(batches[number if number < len(batches) else 0], phase)
        figures.append(part if number < len(batches) else {})
    return _means(chain.from_iterable(zip(*world.gather(figures), strict=True)))


def _means(parts: Iterable[Mapping[str, Figure]]) -> MetricRecord:
    """The mean of every figure over the parts of a batch; 0 where nothing was counted."""
    totals: dict[str, Figure] = {}
    for part in parts:
        for name, figure in part.items():
            total = totals.get(name, Figure(0.0, 0.0))
            totals[name] = Figure(total.sum + figure.sum, total.count + figure.count)
    return {name: total.sum / max(total.count, 1) for name, total in totals.items()}


class Trainer:
    """Trainer of one model over its block-size schedule.

    Args:
        components: model (in its compute dtype, on its device), objective, data, recipe.
        run: folder of checkpoints, metrics and plot.
        on_record: called with every metric record as it is written.
        should_stop: called after every step; True ends the run in a resumable state.
    """

    def __init__(
        self,
        components: Components,
        run: Path,
        *,
        on_record: Callable[[MetricRecord], None] = lambda record: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.components, self.run_folder = components, run
        self.recipe, self.train = components.recipe, components.recipe.train
        self.schedule = components.recipe.blocks
        self.world, pipeline = components.world, components.objective.setting.pipeline
        self.optimizer = MasterAdamW(
            components.model.named_parameters(),
            betas=self.train.betas,
            weight_decay=self.train.weight_decay,
            world=self.world,
            duplicates=frozenset() if pipeline is None else pipeline.duplicates,
        )
        self.checkpoints = Checkpoints(run, self.world, keep=self.train.keep_checkpoints)
        config, device = components.model.config, components.model.inv_freq.device
        self._utilisation = Utilisation.of_run(self.recipe, config, gpu_of(device), self.world.size)
        self.step, self.tokens = 0, 0
        self._packer_state: dict[str, Any] = components.packer.state_dict()
        self._tokenizer_identity = components.tokenizer.identity
        self._validation: dict[str, Any] = {}
        self._on_record, self._should_stop = on_record, should_stop
        self._stop = False

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint; False when there is none.

        Raises:
            TrainingError: the checkpoint belongs to another recipe or tokenizer.
            DataError: the data have changed.
        """
        folder = newest_checkpoint(self.run_folder, self.world)
        if folder is None:
            return False
        state = read_state(folder)
        changed = _differences(_meaning(self.recipe.model_dump(mode="json")), _meaning(_with_defaults(state.recipe)))
        if changed:
            raise TrainingError(
                f"{folder} was trained with another recipe ({', '.join(changed)} differ); "
                "resume with the recipe it was started with, or choose another folder"
            )
        if state.tokenizer != self._tokenizer_identity:
            raise TrainingError(
                f"the tokenizer or chat template of {self.recipe.model} has changed since {folder} was saved; "
                "put the old one back, or start a run in another folder"
            )
        routers = self._router_state()
        tensors = {**self.optimizer.empty_state(), **routers}
        names = fill_tensors(folder, tensors, self.components.model, self.world)
        missing = sorted(name for name in tensors if name not in names and name.startswith(("master.", "router.")))
        if missing:
            raise TrainingError(f"{folder} holds no {missing[0]}; resume with the model it was started with")
        self.optimizer.load_state_tensors({name: tensors[name] for name in names})
        if self.components.router is not None:
            self.components.router.load_state_tensors(tensors)
        self.components.packer.load_state_dict(state.packer)
        self.step, self.tokens, self._validation = state.step, state.tokens, state.validation
        self._packer_state = state.packer
        return True

    def check_agreement(self) -> None:
        """Raise ConfigError, on every rank, when one has another recipe, tokenizer, data or checkpoint than the main one."""
        recipe = _meaning(self.recipe.model_dump(mode="json"))
        own = {"recipe": recipe, "tokenizer": self._tokenizer_identity, "checkpoint": self.step, "data": self._packer_state}
        digests = {what: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for what, value in own.items()}
        first, *others = self.world.gather_all(digests)
        for rank, other in enumerate(others, start=1):
            for what in first:
                if other[what] != first[what]:
                    raise ConfigError(f"rank {rank} has another {what} than rank 0; give all hosts the same files and options")

    @property
    def phase_index(self) -> int:
        """Which phase of the schedule the next step belongs to."""
        return self.schedule.index_at(self.tokens)

    @property
    def finished(self) -> bool:
        """Whether the token budget is spent."""
        return self.tokens >= self.train.tokens

    def fit(self) -> bool:
        """Train until the budget is spent (True) or `should_stop` returns True (False); a checkpoint exists either way."""
        with MetricLog(self.run_folder, from_step=self.step) if self.world.is_main else nullcontext() as log:
            while not self.finished:
                before = self.phase_index
                self._emit(log, self.train_step())
                phase_ended = self.finished or self.phase_index != before
                self._warn_of_skipped(before)
                if self.components.validation is not None and (phase_ended or self.step % self.train.eval_every == 0):
                    self._emit(log, self._evaluate(self.schedule.phases[before]))
                if phase_ended or self._stop or self.step % self.train.checkpoint_every == 0:
                    self.save()
                if self._stop:
                    break
            self.checkpoints.wait()
        return self.finished

    def _warn_of_skipped(self, before: int) -> None:
        """Say which phases the last step went past: they are shorter than it."""
        last = self.phase_index
        if self.world.is_main:
            for phase in self.schedule.phases[before + 1 : last]:
                size = "whole sequence" if phase.block_size is None else f"block size {phase.block_size}"
                warnings.warn(
                    f"phase {phase.name}, {size}, has {phase.tokens} tokens, fewer than a step's, and was skipped; raise "
                    "train.tokens or its share, or leave it out",
                    UnmaskNote,
                    stacklevel=2,
                )

    def save(self) -> Path:
        """Write a checkpoint and drop those no longer wanted; several ranks write in the background."""
        recipe, parts = self.recipe.model_dump(mode="json"), self.components
        state = TrainState(self.step, self.tokens, self._packer_state, recipe, self._tokenizer_identity, self._validation)
        tensors = {**self.optimizer.state_tensors(), **self._router_state()}
        return self.checkpoints.save(state, tensors, parts.model, parts.tokenizer, parts.skeleton)

    def _router_state(self) -> dict[str, Tensor]:
        return {} if self.components.router is None else self.components.router.state_tensors()

    def _emit(self, log: MetricLog | None, record: MetricRecord) -> None:
        if log is not None:
            log.write(record)
            self._on_record(record)

    def train_step(self) -> MetricRecord:
        """One optimiser step over the global batch; returns its metrics."""
        started = time.perf_counter()
        phase_index = self.phase_index
        phase = self.schedule.phases[phase_index]
        packer, setting = self.components.packer, self.components.objective.setting
        rows = packer.next_rows(self.train.batch_rows, setting.share(self.train.batch_rows))
        if not self.recipe.data.document_mask:
            rows = rows.joined()
        router = self.components.router
        if router is not None:
            router.begin_step(packer.batch_tokens)
        figures = accumulate(self.components.objective, rows, phase, self.step)
        loss, norm = figures["loss"], float(self.optimizer.clip(self.train.clip_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.drop_gradients()
            path = self.save()
            self.checkpoints.wait()
            raise TrainingError(
                f"loss {loss:g}, gradient norm {norm:g} at step {self.step + 1} (phase {phase.name}, "
                f"block size {phase.block_size}); the state before the step is in {path}; lower train.learning_rate"
            )
        rate = learning_rate(self.train, self.step, self.tokens)
        self.optimizer.step(rate)
        loads = {} if router is None else router.end_step()
        self.step += 1
        self.tokens += packer.batch_tokens
        self._packer_state = packer.state_dict()
        peaks, stops = zip(*self.world.gather_all((peak_memory(), self._should_stop() or self.checkpoints.failed)), strict=True)
        self._stop = any(stops)
        seconds = time.perf_counter() - started
        speed = speed_figures(packer.batch_tokens, seconds, peaks)
        if self._utilisation is not None:
            speed["mfu"] = self._utilisation.mfu(phase_index, seconds)
        figures = {"row_length": rows.tokens_RL.shape[1], **figures, "grad_norm": norm, "learning_rate": rate, **loads, **speed}
        return self._record("train", phase, figures)

    def _evaluate(self, phase: Phase) -> MetricRecord:
        assert self.components.validation is not None
        figures = evaluate(self.components.objective, self.components.validation, phase)
        self._validation = {"nelbo": figures["nelbo"], "step": self.step, "block_size": phase.block_size}
        return self._record("validation", phase, figures)

    def _record(self, kind: str, phase: Phase, figures: MetricRecord) -> MetricRecord:
        where = {"step": self.step, "tokens": self.tokens, "phase": phase.name, "block_size": phase.block_size}
        return {"kind": kind, **where, **figures}


def _meaning(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the keys that change neither losses nor gradients: a run may be resumed on another layout."""
    train = {key: value for key, value in recipe.get("train", {}).items() if key not in ("micro_rows", "compile")}
    return {key: value for key, value in recipe.items() if key != "parallel"} | {"train": train}


def _differences(recipe: Any, saved: Any, key: str = "") -> list[str]:
    """The keys, with dots, at which two recipes differ."""
    if not isinstance(recipe, dict) or not isinstance(saved, dict):
        return [] if recipe == saved else [key]
    names = sorted(recipe.keys() | saved.keys())
    return [each for name in names for each in _differences(recipe.get(name), saved.get(name), f"{key}.{name}".lstrip("."))]


def _with_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe with the defaults of keys that were added since; unchanged if it cannot be read any more."""
    try:
        return parse_recipe(recipe, "of the checkpoint").model_dump(mode="json")
    except ConfigError:
        return recipe
