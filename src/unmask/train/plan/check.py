"""Check of a plan: the real modules, divided by the real `parallelize`, run on one rank of a world that is not there.

Owns the run under fake tensors on a fake process group. Shapes, shards, memory and FLOP come from the code that would train.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unmask.diffusion.corrupt import Stream
from unmask.diffusion.masks import StreamIndex
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Checkpointing, Layers, Transformer
from unmask.models.weights.adapter import adapters_off
from unmask.models.weights.checkpoint import parameter_dtype
from unmask.train.forward import over_clean_copy
from unmask.train.objectives.base import ReferencePolicy, Setting
from unmask.train.optim import MasterAdamW
from unmask.train.parallel.apply import parallelize
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.expert import ExpertExchange, routed_layers
from unmask.train.parallel.ranks import Ranks
from unmask.train.passes import Pass, Pipeline, StageLayers
from unmask.train.plan.footprint import flex_shapes, train_adapters
from unmask.train.plan.memory import Memory, Stage, stage_memory, stages
from unmask.train.plan.planner import Plan, Question
from unmask.train.plan.step import Batch, stage_flops
from unmask.train.plan.tracker import Tracker
from unmask.train.plan.work import RowWork, StageOptions, Trained
from unmask.train.sections import TrainSection


@dataclass(frozen=True)
class Checked:
    """What one rank held and computed in one micro-batch: bytes (`peak` of everything), FLOP without attention's, and how long
    the check took. `memory` is what was predicted for the micro-batches that were run."""

    memory: Memory
    weights: int
    gradients: int
    optimizer: int
    peak: int
    flops: int
    predicted_flops: float
    seconds: float

    def comparison(self) -> list[tuple[str, float, float, str]]:
        """Name, predicted value, tracked value and unit of each figure."""
        memory = self.memory
        return [
            ("weights", memory.weights, self.weights, "GiB"),
            ("gradients", memory.optimizer / 2, self.gradients, "GiB"),
            ("optimizer", memory.optimizer, self.optimizer, "GiB"),
            ("peak", memory.total, self.peak, "GiB"),
            ("products of a micro-batch", self.predicted_flops, self.flops, "TFLOP"),
        ]


def check_plan(question: Question, plan: Plan) -> Checked:
    """Check a plan in the phase that needs most memory and, of a pipeline, on the rank that does."""
    config, dims, batch, trained = question.trained_config, plan.dims, plan.batch, question.trained
    row = question.largest_row

    def needed(stage: Stage) -> float:
        rows = {"micro_rows": batch.micro_rows, "micro_batches": batch.micro_batches}
        return stage_memory(config, row, dims, stage, recompute=plan.recompute, trained=trained, **rows).total

    every = stages(config, dims)
    place = every.index(max(every, key=needed))
    return check_layout(config, row, dims, batch, recompute=plan.recompute, place=place, trained=trained)


@contextmanager
def fake_world(dims: ParallelDims, rank: int = 0) -> Iterator[Ranks]:
    """One rank of a world of `dims.size` processes that are not there: what it sends and receives is nothing, at once."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=dims.size, store=FakeStore())
    try:
        yield Ranks(dims, "cpu")
    finally:
        dist.destroy_process_group()
        # It holds meshes whose groups are gone; another rank's are equal.
        _clear_sharding_prop_cache()


def check_layout(
    config: ModelConfig,
    row: RowWork,
    dims: ParallelDims,
    batch: Batch,
    *,
    recompute: Checkpointing,
    place: int = 0,
    trained: Trained = Trained(),
) -> Checked:
    """Run one micro-batch, forward and backward, as the first rank of a layout; of a pipeline's, as many as it has in flight.

    Args:
        config: the model.
        row: what a row is.
        dims: the layout.
        batch: rows of the micro-batch; with several micro-batches it is not the first one, and finds gradients.
        recompute: activation checkpointing.
        place: of the rank in its pipeline.
        trained: what trains.
    """
    tensors = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_world(dims, place * (dims.size // dims.pipeline)) as world:
        return track_rank(config, row, world, batch, tensors, recompute=recompute, trained=trained)


def track_rank(
    config: ModelConfig,
    row: RowWork,
    world: Ranks,
    batch: Batch,
    tensors: AbstractContextManager[Any],
    *,
    recompute: Checkpointing,
    trained: Trained = Trained(),
) -> Checked:
    """`check_layout` in a world that is there already; what is allocated is allocated inside `tensors` (a fake tensor mode)."""
    started, dims = time.perf_counter(), world.dims
    model, pipeline = _divided(config, row, world, batch, recompute, trained)
    reference = None
    if trained.reference:
        reference = _frozen_copy(config, row, world, batch)
    elif row.scored:
        reference = ReferencePolicy(model, lambda: adapters_off(model))
    with tensors, Tracker() as tracker:
        _allocate(model, pipeline)
        if reference is not None and reference.model is not model:
            _allocate(reference.model, reference.pipeline)
        optimizer = MasterAdamW(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.0, world=world)
        # One process adds gradients to the master weights; several, to the shards that the parameters are.
        own = [each for each in model.parameters() if not each.is_meta and each.requires_grad]
        summed = optimizer.parameters if world.size == 1 else own
        _fill_gradients(summed)
        optimizer.clip(1.0)
        optimizer.step(1e-4)
        if batch.micro_batches > 1 and pipeline is None:
            _fill_gradients(summed)
        weights = _bytes(world, summed if world.size == 1 else (each for each in model.parameters() if not each.is_meta))
        tracker.reset()
        number = 1 if pipeline is None else min(batch.micro_batches, dims.pipeline + 1)
        one = _micro_batch(model, world, row, batch.micro_rows, pipeline, reference)
        if pipeline is None:
            (hidden_BTD,) = one.run(model, None)
            one.finish(hidden_BTD).backward()
        else:
            with _known_shapes():
                pipeline.train([one] * number)
        gradients = _bytes(world, (parameter.grad for parameter in summed))
        state = _bytes(world, (tensor for name, tensor in optimizer.state_tensors().items() if name.startswith("moment")))
    stage, options = stages(config, dims)[world.index("pipeline")], StageOptions(recompute=recompute, trained=trained)
    counted = replace(row, pairs=0, frozen_pairs=0, scored_pairs=0)
    if pipeline is not None:
        counted = replace(counted, scored=0, scored_predictions=0)
    predicted = stage_flops(config, counted, dims, stage, rows=batch.micro_rows, **options)
    run = batch.micro_batches if pipeline is None else number
    memory = stage_memory(config, row, dims, stage, micro_rows=batch.micro_rows, micro_batches=run, **options)
    seconds = time.perf_counter() - started
    return Checked(memory, weights, gradients, state, tracker.peak, tracker.flops // number, predicted.total, seconds)


def _divided(
    config: ModelConfig, row: RowWork, world: Ranks, batch: Batch, recompute: Checkpointing, trained: Trained | None
) -> tuple[Transformer, Pipeline | None]:
    """The model of this rank on the meta device, in the precision in which it trains; `trained` None: frozen."""
    dims = world.dims
    with torch.device("meta"):
        model = Transformer(config)
    model.activation_checkpointing = recompute
    if trained is None:
        model.requires_grad_(False)
    elif trained.adapts(config):
        train_adapters(model, trained.lora, vocabulary=trained.vocabulary)
    elif not trained.vocabulary:
        for parameter in (model.embed.weight, model.head_weight):
            parameter.requires_grad_(False)
    pipeline = parallelize(model, world, compute_dtype=torch.bfloat16)
    positions = batch.micro_rows * -(-row.positions // dims.context)
    for moe in routed_layers(model) if dims.expert > 1 else ():
        moe.run_experts = _BalancedExchange(world.group("expert"), positions * moe.moe.num_active)
    if world.size == 1:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, torch.bfloat16))
    return model, pipeline


def _frozen_copy(config: ModelConfig, row: RowWork, world: Ranks, batch: Batch) -> ReferencePolicy:
    model, pipeline = _divided(config, row, world, batch, False, None)
    return ReferencePolicy(model, pipeline=pipeline)


def _allocate(model: Transformer, pipeline: Pipeline | None) -> None:
    if pipeline is None:
        model.to_empty(device="cpu")
    else:
        pipeline.apply(lambda tensor: torch.empty_like(tensor, device="cpu"))


@contextmanager
def _known_shapes() -> Iterator[None]:
    """Stages that do not ask the others, who are not there, whether they all know the shapes of what they receive."""
    from torch.distributed.pipelining import PipelineStage

    asked = PipelineStage._warmup_forward_vote, PipelineStage._warmup_backward_result
    PipelineStage._warmup_forward_vote = lambda *args, **options: None  # type: ignore[method-assign, assignment]
    PipelineStage._warmup_backward_result = lambda *args, **options: torch.tensor(1)  # type: ignore[method-assign]
    try:
        yield
    finally:
        PipelineStage._warmup_forward_vote, PipelineStage._warmup_backward_result = asked  # type: ignore[method-assign]


class _BalancedExchange(ExpertExchange):
    """An exchange in which every rank gets equally many rows: how many it would be is in data that are not there."""

    def __init__(self, group: dist.ProcessGroup, num_rows: int) -> None:
        super().__init__(group)
        self._num_rows = num_rows

    def split_sizes(self, leaving_SL: Tensor, arriving_SL: Tensor) -> tuple[list[int], list[int]]:
        share, rest = divmod(self._num_rows, self._size)
        sizes = [share + (rank < rest) for rank in range(self._size)]
        return sizes, sizes


def _fill_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def _micro_batch(
    model: Transformer,
    world: Ranks,
    row: RowWork,
    micro_rows: int,
    pipeline: Pipeline | None,
    reference: ReferencePolicy | None,
) -> Pass[Tensor]:
    """A micro-batch of streams of one token; which positions are predicted changes no shape.

    A reference scores it first, but in a pipeline, where it would do so before the first micro-batch.
    """
    context = world.dims.context
    setting = Setting(model, TrainSection(tokens=1), "flex", mask_id=model.config.mask_id, world=world, pipeline=pipeline)

    def zeros(length: int) -> Tensor:
        return torch.zeros(micro_rows, length, dtype=torch.int64)

    def stream(positions: int, predictions: int) -> Stream:
        zeros_BT, zeros_N = zeros(positions), torch.zeros(micro_rows * predictions // context, dtype=torch.int64)
        index, weight_N, predict = StreamIndex(zeros_BT, zeros_BT, zeros_BT), zeros_N.float(), (zeros_N, zeros_N)
        return Stream(zeros_BT, zeros_BT, index, zeros_BT, zeros_BT, predict, zeros_N, weight_N, weight_N, len(zeros_N))

    def divide(layers: Layers) -> Layers:
        return layers if setting.context is None else setting.context.divide(layers)

    def run(layers: StageLayers | Transformer, received: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        parts = [
            partial(layers) if received is None else partial(layers, received_BTD=each) for each in received or (None, None)
        ]
        zeros_BT = zeros(row.positions)
        if not row.frozen:
            return (divide(parts[0])(zeros_BT, zeros_BT, flex_shapes),)
        attend_clean, attend_all = over_clean_copy(flex_shapes, flex_shapes)
        with torch.no_grad():
            clean_BTD = divide(parts[1])(zeros(row.frozen), zeros(row.frozen), attend_clean)
        noisy_BTD = divide(parts[0])(zeros_BT, zeros_BT, attend_all, noisy_BT=torch.ones_like(zeros_BT, dtype=torch.bool))
        return (noisy_BTD,) if pipeline is None else (noisy_BTD, clean_BTD)

    def score() -> None:
        assert reference is not None
        scored = stream(row.scored, row.scored_predictions)
        with torch.no_grad(), reference.context():
            hidden_BTD = divide(reference.model)(zeros(row.scored), zeros(row.scored), flex_shapes)
            replace(setting, model=reference.model).nll(scored, hidden_ND=hidden_BTD[scored.predict])

    def finish(hidden_BTD: Tensor) -> Tensor:
        one = stream(row.positions, row.predictions)
        return setting.nll(one, hidden_ND=hidden_BTD[one.predict]).sum()

    if reference is not None and pipeline is None:
        score()
    lengths = (row.positions, row.frozen) if row.frozen else (row.positions,)
    return Pass(micro_rows, tuple(-(-length // context) for length in lengths), run, finish)


def _bytes(world: Ranks, tensors: Iterable[Tensor | None]) -> int:
    return sum(world.local(tensor).nbytes for tensor in tensors if tensor is not None)
