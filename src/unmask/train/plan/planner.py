"""Plans: every legal layout of a recipe on so many GPUs, with its memory, traffic, time and cost, best first.

Owns the search and what is said of layouts that do not work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Checkpointing
from unmask.train.parallel.dims import ParallelDims, layout_name
from unmask.train.plan.gpus import GIB, PER_NODE, Efficiency, Gpu
from unmask.train.plan.memory import Memory, stage_memory, stages
from unmask.train.plan.step import Batch, Transfer, stage_flops, stage_seconds, stage_transfers
from unmask.train.plan.work import RowWork, StageOptions, Trained, as_trained, mean_row, model_flops, row_works, trained_of
from unmask.train.recipe import Recipe

_DAY = 86_400
CHECKPOINTING: dict[Checkpointing, str] = {False: "no", "selective": "selective", True: "yes"}
"""Kinds of activation checkpointing, and what tables call them."""


@dataclass(frozen=True)
class Plan:
    """One layout with one kind of activation checkpointing. Memory is that of the worst rank, in the phase that needs most.

    Attributes:
        dims, recompute: the layout, and whether activations are computed again in the backward pass.
        batch: rows of a micro-batch, and micro-batches of a step: the fastest that fit.
        memory: at the peak.
        fits: on the GPU.
        seconds: of a step, mean over the phases.
        mfu: model FLOP utilisation: without what is computed twice.
        nvlink, network: bytes that a GPU of the slowest stage sends in a step, by dimension.
        tokens_per_day: clean tokens, as a recipe counts them.
        days, cost: of the run; cost only with a price.
    """

    dims: ParallelDims
    recompute: Checkpointing
    batch: Batch
    memory: Memory
    fits: bool
    seconds: float
    mfu: float
    nvlink: dict[str, float]
    network: dict[str, float]
    tokens_per_day: float
    days: float
    cost: float | None

    def as_json(self) -> dict[str, Any]:
        """All of it, in bytes, seconds and days."""
        return asdict(self) | {"layout": layout_name(self.dims), "memory_total": self.memory.total}


@dataclass(frozen=True)
class Plans:
    """The result of a search: what fits, fastest first; what does not; and how many layouts break which rule."""

    fitting: list[Plan]
    too_large: list[Plan]
    refused: Counter[str]


@dataclass(frozen=True)
class Question:
    """What is planned: a recipe and its model on a number of GPUs, at `price` for each GPU and hour (None: not known)."""

    recipe: Recipe
    config: ModelConfig
    gpu: Gpu
    num_gpus: int
    price: float | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)

    @cached_property
    def _recipe(self) -> Recipe:
        return as_trained(self.recipe, self.config)

    @cached_property
    def trained(self) -> Trained:
        """What trains."""
        return trained_of(self._recipe)

    @cached_property
    def mean_row(self) -> RowWork:
        """A row of the whole run; raises ConfigError for an objective that plans are not made for."""
        return mean_row(row_works(self._recipe))

    @cached_property
    def largest_row(self) -> RowWork:
        """The row that needs most memory."""
        return max(row_works(self._recipe), key=lambda row: (row.positions, row.predictions))

    @cached_property
    def trained_config(self) -> ModelConfig:
        """The model as it trains: with the recipe's gated LoRA, which a shifted diffusion model has."""
        rank = self._recipe.train.gated_lora_rank
        if rank is None:
            return self.config
        return replace(self.config, gated_lora_rank=rank, mask_id=self.config.mask_id or 0, start_id=self.config.start_id or 0)


def find_plans(question: Question, layout: ParallelDims | None = None) -> Plans:
    """Plan every layout, or this one.

    Raises:
        ConfigError: `layout` breaks a rule, or the recipe has an objective that plans are not made for.
    """
    found, refused = [], Counter[str]()
    for dims in [layout] if layout is not None else _layouts(question.num_gpus, question.config):
        try:
            batches = legal_batches(question, dims)
        except ConfigError as error:
            if layout is not None:
                raise
            refused[str(error)] += 1
            continue
        # What zero bubble splits, checkpointing computes again for every matrix, and holds all of it.
        for recompute in CHECKPOINTING if dims.pipeline_schedule != "zero_bubble" else (False,):
            plans = [make_plan(question, dims, batch, recompute=recompute) for batch in batches]
            found.append(min(plans, key=lambda plan: (not plan.fits, plan.seconds if plan.fits else plan.memory.total)))
    fitting = sorted((plan for plan in found if plan.fits), key=lambda plan: (plan.seconds, plan.memory.total))
    too_large = sorted((plan for plan in found if not plan.fits), key=lambda plan: plan.memory.total)
    return Plans(fitting, too_large, refused)


def fastest_layout(question: Question) -> ParallelDims:
    """The fastest layout that fits, with the recipe's own micro-batches and activation checkpointing.

    Raises:
        ConfigError: none fits.
    """
    train = question.recipe.train
    plans = []
    for dims in _layouts(question.num_gpus, question.config):
        try:
            batches = legal_batches(question, dims)
        except ConfigError:
            continue
        own = [batch for batch in batches if batch.micro_rows == min(train.micro_rows, train.batch_rows // dims.data)]
        plans += [make_plan(question, dims, batch, recompute=train.activation_checkpointing) for batch in own]
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        raise ConfigError(
            f"parallel is auto, but no layout of {question.num_gpus} {question.gpu.name} fits with train.micro_rows "
            f"{train.micro_rows} and activation_checkpointing {train.activation_checkpointing}; `unmask plan` says what would"
        )
    return min(fitting, key=lambda plan: (plan.seconds, plan.memory.total)).dims


def legal_batches(question: Question, dims: ParallelDims) -> list[Batch]:
    """The batches of a rank: micro-batches of the recipe's rows, and of 2, 4 and 8 times as many.

    Raises:
        ConfigError: the model or the batch cannot be divided so.
    """
    train = question.recipe.train
    dims.check_model(question.config)
    question.recipe.objective.check_dims(dims)
    if dims.pipeline_stages > 1:
        raise ConfigError(f"parallel.pipeline_stages is {dims.pipeline_stages}; plans are made for ranks of 1 stage")
    dims.check_rows(train.batch_rows, pairs=question.recipe.objective.pairs)
    if dims.tensor > PER_NODE:
        raise ConfigError(f"parallel.tensor is {dims.tensor}; it must stay within a node's {PER_NODE} GPUs")
    rows = train.batch_rows // dims.data
    sizes = {min(train.micro_rows * factor, rows) for factor in (1, 2, 4, 8)}
    batches = [Batch(size, -(-rows // size)) for size in sorted(sizes) if -(-rows // size) >= dims.pipeline]
    if not batches:
        raise ConfigError(
            f"parallel.pipeline is {dims.pipeline}; it must not exceed the {rows} rows that a data rank has in a step"
        )
    return batches


def make_plan(question: Question, dims: ParallelDims, batch: Batch, *, recompute: Checkpointing) -> Plan:
    """The plan of a legal layout."""
    config, gpu, efficiency = question.trained_config, question.gpu, question.efficiency
    micro_rows, micro_batches = batch.micro_rows, batch.micro_batches
    every, options = stages(config, dims), StageOptions(recompute=recompute, trained=question.trained)
    of_batch = {"micro_rows": micro_rows, "micro_batches": micro_batches}
    each = (stage_memory(config, question.largest_row, dims, stage, **of_batch, **options) for stage in every)
    memory = max(each, key=lambda memory: memory.total)
    row, seconds = question.mean_row, 0.0
    transfers: list[Transfer] = []
    for stage in every:
        flops = stage_flops(config, row, dims, stage, rows=micro_rows * micro_batches, **options)
        sent = list(stage_transfers(config, row, dims, stage, batch, **options))
        taken = stage_seconds(flops, sent, memory.optimizer / 2, gpu, efficiency)
        if taken > seconds:
            seconds, transfers = taken, sent
    seconds *= (micro_batches + dims.pipeline - 1) / micro_batches
    train = question.recipe.train
    tokens_per_day = train.batch_rows * question.recipe.data.row_length / seconds * _DAY
    days = train.tokens / tokens_per_day
    return Plan(
        dims=dims,
        recompute=recompute,
        batch=batch,
        memory=memory,
        fits=memory.total <= gpu.memory * efficiency.memory,
        seconds=seconds,
        mfu=model_flops(config, row, train.batch_rows, question.trained) / seconds / (gpu.flops * question.num_gpus),
        nvlink=_by_name((transfer.name, transfer.nvlink) for transfer in transfers),
        network=_by_name((transfer.name, transfer.network) for transfer in transfers),
        tokens_per_day=tokens_per_day,
        days=days,
        cost=None if question.price is None else question.price * question.num_gpus * days * 24,
    )


def _by_name(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for name, value in values:
        totals[name] = totals.get(name, 0.0) + value
    return totals


def too_large(plan: Plan, question: Question) -> str:
    """Why a plan does not fit, in a line."""
    room = question.gpu.memory * question.efficiency.memory
    total = plan.memory.total
    parts = sorted(((value, name) for name, value in asdict(plan.memory).items() if value > total / 10), reverse=True)
    largest = ", ".join(f"{name} {value / GIB:.1f}" for value, name in parts)
    kept = {False: ", activations kept", "selective": ", selective checkpointing", True: ""}[plan.recompute]
    return f"{layout_name(plan.dims)}{kept}: {total / GIB:.1f} GiB of {room / GIB:.1f} ({largest})"


def _layouts(num_gpus: int, config: ModelConfig) -> Iterator[ParallelDims]:
    """Every way to write the number of GPUs as a product, with every number of expert ranks that could be legal."""
    for tensor in _divisors(min(num_gpus, PER_NODE), num_gpus):
        for context in _divisors(num_gpus // tensor, num_gpus // tensor):
            left = num_gpus // tensor // context
            for pipeline in _divisors(min(left, config.num_layers), left):
                for data_shard in _divisors(left // pipeline, left // pipeline):
                    shards = data_shard * context
                    experts = [1] if config.moe is None else _divisors(min(shards, config.moe.num_experts), shards)
                    for expert in experts:
                        yield ParallelDims(left // pipeline // data_shard, data_shard, context, tensor, pipeline, expert)


def _divisors(limit: int, number: int) -> list[int]:
    """Divisors of a number, up to a limit."""
    return [divisor for divisor in range(1, limit + 1) if number % divisor == 0]
