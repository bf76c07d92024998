"""Time and traffic of a training step on a layout: products on each GPU, bytes over NVLink and network, and what they take.

Owns the model of time. It is arithmetic: peaks and shares of them are assumptions (`gpus`), and what a GPU waits for others
because their experts have more tokens is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

from unmask.diffusion.objectives import PREDICTIONS_AT_ONCE
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Checkpointing
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.gpus import PER_NODE, Efficiency, Gpu
from unmask.train.plan.memory import LocalParameters, Stage, learnt_layer, local_ends, local_layer
from unmask.train.plan.work import Flops, LayerCount, RowWork, Trained, adapter_flops, backward, head_flops, layer_flops

_UPDATE_BYTES = 32
"""Bytes that the optimiser reads and writes for each parameter: weight, gradient and moments, and the gradient for its norm."""


@dataclass(frozen=True)
class Batch:
    """How a rank sees the global batch: rows of a micro-batch, micro-batches of a step."""

    micro_rows: int
    micro_batches: int


@dataclass(frozen=True)
class Transfer:
    """Bytes that a GPU sends over NVLink and over the network in a step. `hidden`: FSDP sends them while the GPU computes."""

    name: str
    nvlink: float
    network: float
    hidden: bool = False

    def seconds(self, gpu: Gpu, efficiency: Efficiency) -> float:
        """What it takes: both links work at the same time."""
        return max(self.nvlink / gpu.nvlink, self.network / gpu.network) / efficiency.links


def _ring(name: str, num_bytes: float, size: int, stride: int, *, hidden: bool = False) -> Transfer:
    """A reduce-scatter or all-gather of `num_bytes` over `size` ranks, `stride` apart: a ring, over all adapters of a node."""
    sent, local = num_bytes * (size - 1) / size, _local(size, stride)
    return Transfer(name, sent if local > 1 else 0.0, sent / local if local < size else 0.0, hidden)


def _exchange(name: str, num_bytes: float, size: int, stride: int) -> Transfer:
    """An all-to-all of which each rank sends `num_bytes`, in equal parts."""
    local = _local(size, stride)
    return Transfer(name, num_bytes * (local - 1) / size, num_bytes * (size - local) / size)


def _local(size: int, stride: int) -> int:
    """Ranks of a group in one node."""
    return min(size, max(PER_NODE // stride, 1))


def stage_flops(
    config: ModelConfig,
    row: RowWork,
    dims: ParallelDims,
    stage: Stage,
    *,
    rows: int,
    recompute: Checkpointing,
    trained: Trained = Trained(),
) -> Flops:
    """FLOP of a rank for so many rows; routed experts and routers are not divided by tensor parallelism."""
    layers, share, frozen = stage.kinds(config), rows / dims.context, trained.adapts(config)

    def forward(positions: float, pairs: float) -> Flops:
        whole = layer_flops(config, layers, share * positions, share * pairs)
        return Flops(whole.matrices / dims.tensor, whole.experts, whole.attention / dims.tensor)

    learnt = forward(row.positions, row.pairs)
    total = learnt + backward(learnt, frozen=frozen) + forward(row.frozen + row.scored, row.frozen_pairs + row.scored_pairs)
    if frozen:
        adapters = adapter_flops(config, layers, share * row.positions, trained.lora) * (1 / dims.tensor)
        learnt += adapters
        total += adapters + backward(adapters)
        if stage.has_embedding and not trained.vocabulary and config.gated_lora_rank is None:
            # Nothing before the first product takes a gradient.
            total += Flops(-2.0 * config.hidden_size * config.qkv_size * share * row.positions / dims.tensor)
    if recompute == "selective":
        # The last of an expert's three products and, with FlexAttention, attention.
        total += Flops(experts=learnt.experts / 3, attention=learnt.attention)
    elif recompute:
        total += learnt + Flops(-_last_products(config, layers, share * row.positions) / dims.tensor) * (not frozen)
    if stage.has_head:
        head = head_flops(config, share * row.predictions) * (1 / dims.tensor)
        total += head * (2 if share * row.predictions > PREDICTIONS_AT_ONCE else 1)
        total += backward(head, frozen=not trained.vocabulary)
        total += head_flops(config, share * row.scored_predictions) * (1 / dims.tensor)
    return total


def _last_products(config: ModelConfig, layers: LayerCount, positions: float) -> float:
    """FLOP of the layers' last products, which are not computed again: nothing needs their outputs."""
    moe, size = config.moe, 0
    for layer, count in layers.items():
        dense = moe is None or not config.is_moe_layer(layer)
        size += count * (config.ffn_size if moe is None or dense else moe.expert_size * moe.num_shared)
    return 2.0 * size * config.hidden_size * positions


def stage_transfers(
    config: ModelConfig,
    row: RowWork,
    dims: ParallelDims,
    stage: Stage,
    batch: Batch,
    *,
    recompute: Checkpointing,
    trained: Trained = Trained(),
) -> Iterator[Transfer]:
    """What a rank sends in a step, dimension by dimension."""
    yield from _weight_transfers(config, row, dims, stage, batch, trained)
    unlearnt = row.frozen + row.scored
    passes = (3 if recompute else 2) * batch.micro_batches * (1 + unlearnt / (2 * row.positions))
    positions, layers = batch.micro_rows * row.positions / dims.context, stage.last - stage.first
    stream = 2 * config.hidden_size * positions
    if dims.tensor > 1:
        yield _ring("tensor", 4 * passes * layers * stream, dims.tensor, 1)
    if dims.context > 1:
        # Where ranks outnumber kv heads, each of these goes to several.
        copies = dims.context // gcd(config.num_kv_heads // dims.tensor, dims.context)
        heads = 2 * (config.num_heads + copies * config.num_kv_heads) * config.head_dim / dims.tensor
        yield _exchange("context", 2 * passes * layers * heads * positions, dims.context, dims.tensor)
    if dims.expert > 1 and config.moe is not None:
        routed = sum(number for layer, number in stage.kinds(config).items() if config.is_moe_layer(layer))
        yield _exchange("expert", 2 * passes * routed * config.moe.num_active * stream, dims.expert, dims.tensor)
    if dims.pipeline > 1:
        stride = dims.size // dims.pipeline
        yield _ring("pipeline", 2 * batch.micro_batches * stream * 2 / dims.tensor, 2, stride)


def _weight_transfers(
    config: ModelConfig, row: RowWork, dims: ParallelDims, stage: Stage, batch: Batch, trained: Trained
) -> Iterator[Transfer]:
    """Weights that are gathered, and gradients that are summed."""
    kinds, none = stage.kinds(config).items(), LocalParameters(0)
    ends = local_ends(config, stage, dims)
    inner = sum((local_layer(config, layer, dims) * number for layer, number in kinds), start=none)
    learnt = sum((learnt_layer(config, layer, dims, trained) * number for layer, number in kinds), start=none)
    # With a pipeline, the weights stay gathered and the gradients are added up over the micro-batches.
    forwards = 1 + (row.frozen > 0) + (row.scored > 0)
    gathers, reductions = (1, 1) if dims.pipeline > 1 else ((1 + forwards) * batch.micro_batches, batch.micro_batches)
    expert_shards = dims.shards // dims.expert
    groups = (
        (ends.dense, ends.dense * trained.vocabulary, reductions, dims.shards, dims.tensor),
        (inner.dense, learnt.dense, 1, dims.shards, dims.tensor),
        (inner.experts, learnt.experts, 1, expert_shards, dims.tensor * dims.expert),
    )
    for count, own, sums, size, stride in groups:
        if size > 1:
            yield _ring("data_shard", 2 * gathers * count + 4 * reductions * own, size, stride, hidden=True)
        if dims.data_replicate > 1:
            # Of a layer once in a step: what the shards have added up.
            sent = 2 * 4 * sums * own / size
            yield _ring("data_replicate", sent, dims.data_replicate, dims.tensor * dims.shards, hidden=True)


def compute_seconds(flops: Flops, gpu: Gpu, efficiency: Efficiency) -> float:
    """Time of products on one GPU."""
    kinds = (
        (flops.matrices, efficiency.matrices),
        (flops.experts, efficiency.experts),
        (flops.attention, efficiency.attention),
    )
    return sum(flop / share for flop, share in kinds) / gpu.flops


def stage_seconds(flops: Flops, transfers: list[Transfer], weights: float, gpu: Gpu, efficiency: Efficiency) -> float:
    """Time of a step of one stage without a pipeline's idle time: FSDP's transfers hide behind products, the others do not.

    Args:
        flops, transfers: of the rank.
        weights: bytes of the float32 shards that the optimiser updates.
    """
    hidden = sum(transfer.seconds(gpu, efficiency) for transfer in transfers if transfer.hidden)
    exposed = sum(transfer.seconds(gpu, efficiency) for transfer in transfers if not transfer.hidden)
    update = _UPDATE_BYTES / 4 * weights / gpu.hbm / efficiency.hbm
    return max(compute_seconds(flops, gpu, efficiency), hidden) + exposed + update
