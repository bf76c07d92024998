"""Check of a plan: the real modules, divided by the real `parallelize`, run on one rank of a world that is not there.

Owns the run under fake tensors on a fake process group. Shapes, shards, memory and FLOP come from the code that would train.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from unmask.diffusion.objectives import token_nll
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer
from unmask.train.optim import MasterAdamW
from unmask.train.parallel.apply import parallelize
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.ranks import Ranks
from unmask.train.plan.footprint import flex_shapes
from unmask.train.plan.tracker import Tracker
from unmask.train.plan.work import RowWork


@dataclass(frozen=True)
class Checked:
    """What rank 0 held and computed: bytes, and FLOP without those of attention.

    `peak` includes weights, gradients and the optimiser's state.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int
    flops: int


@contextmanager
def fake_world(dims: ParallelDims) -> Iterator[Ranks]:
    """Rank 0 of a world of `dims.size` processes that are not there: collectives return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=dims.size, store=FakeStore())
    try:
        yield Ranks(dims, "cpu")
    finally:
        dist.destroy_process_group()


def check_layout(
    config: ModelConfig, row: RowWork, dims: ParallelDims, *, micro_rows: int, accumulates: bool, recompute: bool
) -> Checked:
    """Run one micro-batch, forward and backward, as rank 0 of the layout.

    Args:
        config: the model.
        row: what a row is.
        dims: the layout.
        micro_rows: rows of the micro-batch.
        accumulates: the step has other micro-batches before this one, whose gradients are there.
        recompute: with activation checkpointing.
    """
    with fake_world(dims) as world:
        with torch.device("meta"):
            model = Transformer(config)
        model.activation_checkpointing = recompute
        parallelize(model, world, compute_dtype=torch.bfloat16)
        with FakeTensorMode(allow_non_fake_inputs=True), Tracker() as tracker:
            model.to_empty(device="cpu")
            optimizer = MasterAdamW(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.0, world=world)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.clip(1.0)
            optimizer.step(1e-4)
            if accumulates:
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            weights = _bytes(model.parameters())
            tracker.reset()
            _micro_batch(model, config, row, micro_rows)
            gradients = _bytes(parameter.grad for parameter in model.parameters())
    return Checked(weights, gradients, 2 * weights, tracker.peak, tracker.flops)


def _micro_batch(model: Transformer, config: ModelConfig, row: RowWork, micro_rows: int) -> None:
    tokens_BT = torch.zeros(micro_rows, row.positions, dtype=torch.int64)
    index_N = torch.zeros(micro_rows * row.predictions, dtype=torch.int64)
    hidden_BTD = model(tokens_BT, tokens_BT, flex_shapes)
    nll_N = token_nll(model.head, hidden_BTD[index_N, index_N], index_N, config.mask_id)
    del hidden_BTD
    nll_N.sum().backward()


def _bytes(tensors: Any) -> int:
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors if tensor is not None]
    return sum(tensor.nbytes for tensor in local)
