"""Predicted memory and FLOP against the real modules, divided by the real `parallelize`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest

from processes import Pool
from tiny import tiny_config
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Checkpointing
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.check import Checked, check_layout, track_rank
from unmask.train.plan.step import Batch
from unmask.train.plan.work import RowWork, Trained

ROW = RowWork(share=1.0, length=512, positions=1024, predictions=256, pairs=0)
BATCH = Batch(micro_rows=2, micro_batches=2)


def sized(family: str, num_layers: int) -> ModelConfig:
    """Large enough that what counts for a real model counts here."""
    sizes = {"vocab_size": 4096, "hidden_size": 256, "head_dim": 64, "ffn_size": 1024, "num_layers": num_layers}
    return tiny_config(family, **sizes)


def assert_as_predicted(checked: Checked) -> None:
    memory = checked.memory
    shards = memory.weights, memory.optimizer / 2, memory.optimizer
    assert (checked.weights, checked.gradients, checked.optimizer) == pytest.approx(shards, rel=0.02)
    assert memory.total == pytest.approx(checked.peak, rel=0.10)
    assert checked.predicted_flops == pytest.approx(checked.flops, rel=0.05)


QUICK: list[tuple[str, int, ParallelDims, Checkpointing]] = [
    ("llama", 4, ParallelDims(), False),
    ("llama", 4, ParallelDims(data_shard=4), True),
    ("llada2", 4, ParallelDims(data_shard=4, expert=4), False),
]
MORE: list[tuple[str, int, ParallelDims, Checkpointing]] = [
    (family, layers, dims, recompute)
    for family, layers in (("qwen3", 6), ("llada2", 6))
    for dims in (ParallelDims(data_shard=8), ParallelDims(data_shard=4, tensor=2), ParallelDims(data_shard=4, context=2))
    for recompute in (False, True)
]
MORE += [
    *((family, 6, ParallelDims(data_shard=8), "selective") for family in ("qwen3", "llada2")),
    ("llada2", 6, ParallelDims(data_shard=4, expert=4), "selective"),
    ("llada2", 6, ParallelDims(data_shard=16), True),  # more shards than experts
    ("llada2", 6, ParallelDims(), True),
    ("llada2", 6, ParallelDims(), False),
    ("qwen3", 6, ParallelDims(), True),
]


@pytest.mark.parametrize(
    ("family", "layers", "dims", "recompute"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
def test_a_layout_is_as_predicted(family: str, layers: int, dims: ParallelDims, recompute: Checkpointing) -> None:
    assert_as_predicted(check_layout(sized(family, layers), ROW, dims, BATCH, recompute=recompute))


GATED = RowWork(share=1.0, length=512, positions=512, predictions=512, pairs=0, frozen=512)
SCORED = replace(ROW, scored=1024, scored_predictions=256)
SHARD, PIPELINE = ParallelDims(data_shard=4), ParallelDims(data_shard=2, pipeline=2)
GATED_LORA, LORA, WITH_REFERENCE = Trained(vocabulary=False), Trained(16), Trained(reference=True)
FROZEN_VOCABULARY = Trained(16, vocabulary=False)


@pytest.mark.parametrize(
    ("family", "row", "dims", "recompute", "trained"),
    [
        ("qwen3", GATED, SHARD, True, GATED_LORA),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("qwen3", GATED, ParallelDims(), False, GATED_LORA),
                ("qwen3", GATED, PIPELINE, False, GATED_LORA),
                ("qwen3", ROW, ParallelDims(), False, LORA),
                ("qwen3", ROW, SHARD, True, LORA),
                ("qwen3", ROW, SHARD, False, FROZEN_VOCABULARY),
                ("llada2", ROW, ParallelDims(data_shard=4, expert=4), "selective", LORA),
                ("qwen3", SCORED, ParallelDims(), False, WITH_REFERENCE),
                ("qwen3", SCORED, SHARD, True, WITH_REFERENCE),
                ("qwen3", SCORED, ParallelDims(data_replicate=4), True, WITH_REFERENCE),
                ("qwen3", SCORED, PIPELINE, False, WITH_REFERENCE),
                ("qwen3", SCORED, SHARD, False, FROZEN_VOCABULARY),
            )
        ),
    ],
)
def test_what_trains_is_as_predicted(
    family: str, row: RowWork, dims: ParallelDims, recompute: Checkpointing, trained: Trained
) -> None:
    config = sized(family, 6)
    if row.frozen:
        config = replace(config, gated_lora_rank=16, mask_id=1, start_id=2)
    assert_as_predicted(check_layout(config, row, dims, BATCH, recompute=recompute, trained=trained))


def track_here() -> Checked:
    """In a rank of the pool: the same on real tensors, with collectives that take place."""
    from unmask.train.parallel.ranks import Ranks

    world = Ranks(ParallelDims(data_shard=2), "cpu")
    return track_rank(sized("llada2", 4), ROW, world, BATCH, nullcontext(), recompute=True)


@pytest.mark.slow
def test_fake_tensors_hold_what_real_ones_do() -> None:
    config, dims = sized("llada2", 4), ParallelDims(data_shard=2)
    pool = Pool()
    try:
        real = pool.run(2, track_here, timeout=60)[0]
    finally:
        pool.close()
    assert_as_predicted(real)
    fake = check_layout(config, ROW, dims, BATCH, recompute=True)
    assert fake.peak == pytest.approx(real.peak, rel=0.02)
    assert fake.flops == real.flops


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("recompute", "dims"),
    [
        (False, ParallelDims(data_shard=4, pipeline=2)),
        (True, ParallelDims(data_shard=4, pipeline=2)),
        (False, ParallelDims(data_shard=4, pipeline=2, pipeline_schedule="zero_bubble")),
    ],
)
def test_a_stage_is_as_predicted(place: int, recompute: bool, dims: ParallelDims) -> None:
    batch = Batch(micro_rows=2, micro_batches=3)
    assert_as_predicted(check_layout(sized("llada2", 8), ROW, dims, batch, recompute=recompute, place=place))
