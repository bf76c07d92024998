"""Sharded starts of a model that no rank could hold: LLaDA2.0-mini's 30 GiB in files whose data are holes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from processes import Pool
from sparse import sparse_checkpoint
from unmask.models.families.registry import published_config
from unmask.models.weights.checkpoint import open_parts
from unmask.train.parallel.apply import parallelize
from unmask.train.parallel.dims import ParallelDims
from unmask.train.plan.gpus import GIB


@dataclass(frozen=True)
class Started:
    """A rank's memory: the most it had while it read its shards, and the bytes of these."""

    peak_bytes: int
    shard_bytes: int


def start(folder: Path, dims: ParallelDims) -> Started:
    """Read this rank's shards; they themselves stay on the meta device, for this machine could not hold them."""
    from unmask.train.parallel.ranks import Ranks
    from unmask.train.parallel.weights import load_shards

    world = Ranks(dims, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    model = open_parts(folder, dtype=torch.float32).model
    config = model.config
    pipeline = parallelize(model, world, compute_dtype=torch.bfloat16)
    load_shards(model, folder, config, world, "meta", pipeline)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    shards = sum(world.local(parameter).nbytes for parameter in model.parameters())
    return Started(int(line.split()[1]) * 1024, shards)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [ParallelDims(data_shard=2), ParallelDims(data_shard=2, expert=2)], ids=["fsdp", "expert"])
def test_a_folder_that_no_rank_could_hold(pool: Pool, tmp_path: Path, dims: ParallelDims) -> None:
    folder = sparse_checkpoint(tmp_path / "model", published_config("llada2-mini"))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size > 30 * GIB
    ranks = pool.run(2, start, folder, dims, timeout=200)
    assert max(rank.shard_bytes for rank in ranks) < 1.01 * size  # half of them, in float32
    assert max(rank.peak_bytes for rank in ranks) < 1.5 * GIB
