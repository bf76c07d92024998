"""The only training loop. Stages differ by objective, data and block schedule, all given.

Owns the order of a step, when to evaluate and when to save. Knows nothing of what is minimised, of where a model or its data
come from, nor how progress is shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.data.packing import PackedRows, Packer
from unmask.data.tokenizer import Tokenizer
from unmask.diffusion.blocks import BlockSchedule, Phase
from unmask.errors import ConfigError, TrainingError
from unmask.models.arch.transformer import Transformer
from unmask.train.metrics import MetricLog, Record
from unmask.train.objective import Objective
from unmask.train.optim import MasterAdamW, learning_rate
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.router import RouterMonitor
from unmask.train.state import TrainState, list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from unmask.train.step import AttentionBackend


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    model: Transformer
    objective: Objective
    router: RouterMonitor | None
    packer: Packer
    validation: PackedRows | None
    recipe: Recipe
    mask_id: int | None
    backend: AttentionBackend
    tokenizer: Tokenizer


class Trainer:
    """Trains a model through its block-size schedule.

    Args:
        parts: model (in its compute dtype, on its device), data, recipe.
        run: the run's folder: checkpoints, metrics, plot.
        on_record: sees every metric record as it is written.
        should_stop: asked after every step; True ends the run in a resumable state.
    """

    def __init__(
        self,
        parts: Parts,
        run: Path,
        *,
        on_record: Callable[[Record], None] = lambda record: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.parts, self.run_folder = parts, run
        self.recipe, self.train = parts.recipe, parts.recipe.train
        self.schedule: BlockSchedule = parts.recipe.blocks
        self.optimizer = MasterAdamW(
            parts.model.named_parameters(), betas=self.train.betas, weight_decay=self.train.weight_decay
        )
        self.step, self.tokens = 0, 0
        self._packer_state: dict[str, Any] = parts.packer.state_dict()
        self._validation: dict[str, Any] = {}
        self._on_record, self._should_stop = on_record, should_stop

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint; False when there is none.

        Raises:
            TrainingError: the checkpoint belongs to another recipe.
        """
        checkpoints = list_checkpoints(self.run_folder)
        if not checkpoints:
            return False
        state, tensors = load_checkpoint(checkpoints[-1])
        ours, theirs = self.recipe.model_dump(mode="json"), _completed(state.recipe)
        changed = sorted(key for key in ours if ours[key] != theirs.get(key))
        if changed:
            raise TrainingError(
                f"{checkpoints[-1]} was trained with another recipe ({', '.join(changed)} differ); "
                "resume with the recipe it was started with, or choose another --out"
            )
        self.optimizer.load_state_tensors(tensors)
        if self.parts.router is not None:
            self.parts.router.load_state_tensors(tensors)
        self.parts.packer.load_state_dict(state.packer)
        self.step, self.tokens, self._validation = state.step, state.tokens, state.validation
        self._packer_state = state.packer
        return True

    @property
    def phase_index(self) -> int:
        """Which phase of the schedule the next step belongs to."""
        return self.schedule.index_at(self.tokens)

    @property
    def finished(self) -> bool:
        """Whether the token budget is spent."""
        return self.tokens >= self.train.tokens

    def fit(self) -> bool:
        """Train until the budget is spent (True) or `should_stop` says so (False); a checkpoint exists either way."""
        with MetricLog(self.run_folder, from_step=self.step) as log:
            while not self.finished:
                before = self.phase_index
                self._emit(log, self._train_step())
                phase_ended = self.finished or self.phase_index != before
                if self.parts.validation is not None and (phase_ended or self.step % self.train.eval_every == 0):
                    self._emit(log, self._evaluate(self.schedule.phases[before]))
                stop = self._should_stop()
                if phase_ended or stop or self.step % self.train.checkpoint_every == 0:
                    self.save()
                if stop:
                    return self.finished
        return True

    def save(self) -> Path:
        """Write a checkpoint and drop those no longer wanted."""
        state = TrainState(
            step=self.step,
            tokens=self.tokens,
            packer=self._packer_state,
            recipe=self.recipe.model_dump(mode="json"),
            validation=self._validation,
        )
        routers = {} if self.parts.router is None else self.parts.router.state_tensors()
        tensors = {**self.optimizer.state_tensors(), **routers}
        path = save_checkpoint(self.run_folder, state, tensors, self.parts.model, self.parts.tokenizer)
        prune_checkpoints(self.run_folder, self.train.keep_checkpoints)
        return path

    def _emit(self, log: MetricLog, record: Record) -> None:
        log.write(record)
        self._on_record(record)

    def _train_step(self) -> Record:
        """One optimiser step over the global batch; returns its metrics."""
        started = time.perf_counter()
        phase = self.schedule.phases[self.phase_index]
        rows = self.parts.packer.next_rows(self.train.batch_rows)
        if not self.recipe.data.document_mask:
            rows = rows.joined()
        router = self.parts.router
        if router is not None:
            router.begin_step(rows.num_tokens)
        figures = self.parts.objective.accumulate(rows, phase, self.step)
        loss, norm = figures["loss"], float(self.optimizer.clip(self.train.clip_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.drop_gradients()
            path = self.save()
            raise TrainingError(
                f"loss {loss:g}, gradient norm {norm:g} at step {self.step + 1} (phase {phase.name}, "
                f"block size {phase.block_size}); the state before the step is in {path}; lower train.learning_rate"
            )
        rate = learning_rate(
            self.step,
            self.tokens / self.train.tokens,
            peak=self.train.learning_rate,
            warmup_steps=self.train.warmup_steps,
            schedule=self.train.schedule,
            final_share=self.train.final_lr_share,
        )
        self.optimizer.step(rate)
        loads = {} if router is None else router.end_step()
        self.step += 1
        self.tokens += rows.num_tokens
        self._packer_state = self.parts.packer.state_dict()
        seconds = time.perf_counter() - started
        return {
            "kind": "train",
            "step": self.step,
            "tokens": self.tokens,
            "phase": phase.name,
            "block_size": phase.block_size,
            "row_length": rows.tokens_RL.shape[1],
            **figures,
            "grad_norm": norm,
            "learning_rate": rate,
            **loads,
            "seconds": seconds,
            "tokens_per_second": rows.num_tokens / seconds,
        }

    def _evaluate(self, phase: Phase) -> Record:
        assert self.parts.validation is not None
        figures = self.parts.objective.evaluate(self.parts.validation, phase)
        self._validation = {"nelbo": figures["nelbo"], "step": self.step, "block_size": phase.block_size}
        return {
            "kind": "validation",
            "step": self.step,
            "tokens": self.tokens,
            "phase": phase.name,
            "block_size": phase.block_size,
            **figures,
        }


def _completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe on disk as this version writes it: with the defaults of options that came later; as it is if it has others."""
    try:
        return parse_recipe(recipe, "of the checkpoint").model_dump(mode="json")
    except ConfigError:
        return recipe
