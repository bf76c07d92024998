"""Expert parallelism (EP): routed experts divided over ranks, to which tokens travel and from which they return.

Owns where experts and tokens go. Routers and shared experts are on every rank; which rank trains on which rows is not known
here. Every routed row is computed by itself and a token's results are added in one order: its output is that of one process.

Legend: P routed rows of this rank, Q rows that this rank computes, E experts, L experts of this rank, S ranks, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor
from torch.distributed.tensor import DTensor, Shard

from unmask.errors import ConfigError
from unmask.models.arch.moe import MoE, run_experts
from unmask.models.arch.transformer import Transformer
from unmask.train.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementFnResult


def apply_expert(model: Transformer, world: World) -> None:
    """Leave each rank its share of the experts of every routed layer, in place."""
    mesh = world.expert_mesh["expert"]
    for moe in routed_layers(model):
        for name in ("gate_up", "down"):
            whole = getattr(moe, name)
            # A copy: a view would keep the experts of the other ranks in memory.
            own = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            shard = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            setattr(moe, name, nn.Parameter(shard, requires_grad=whole.requires_grad))
        moe.run_experts = ExpertExchange(mesh.get_group())


def routed_layers(model: Transformer) -> list[MoE]:
    """The mixtures of experts of a model."""
    return [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]


def expert_placement(model: Transformer, world: World) -> Callable[[nn.Parameter], ShardPlacementFnResult]:
    """Where FSDP shards each parameter: experts over the ranks that hold the same ones, all else as FSDP is told.

    Where these ranks cannot have equally many experts, each has a part of every expert. Without expert parallelism they are the
    ranks of every parameter, and a part may be no whole number of channels: then some ranks have fewer experts.

    Raises:
        ConfigError: PyTorch is too old for expert parallelism.
    """
    experts = {parameter for moe in routed_layers(model) for parameter in (moe.gate_up, moe.down)}
    ranks = world.dims.shards // world.dims.expert
    if world.dims.expert == 1:
        return lambda parameter: Shard(1) if parameter in experts and _needs_parts(parameter, ranks) else None
    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError as error:
        raise ConfigError(
            f"parallel.expert is {world.dims.expert}, which takes PyTorch 2.12 or later; install it, or use 1"
        ) from error
    mesh = world.expert_mesh["expert_shard"]
    info = FSDPMeshInfo(mesh, shard_mesh_dim=0)
    if world.dims.data_replicate > 1:
        mesh = world.expert_mesh["data_replicate", "expert_shard"]
        info = HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)

    def placement(parameter: nn.Parameter) -> ShardPlacementFnResult:
        if parameter not in experts:
            return None
        return ShardPlacementResult(Shard(1 if len(_local(parameter)) % ranks else 0), info)

    return placement


def _needs_parts(experts: Tensor, ranks: int) -> bool:
    """Whether ranks that cannot have equally many experts can have equal parts of each (FSDP pads the first dimension only)."""
    number, channels, _ = experts.shape
    return number % ranks > 0 and channels % ranks == 0


class ExpertExchange:
    """The experts of a layer, of which this rank holds some: rows go to their expert's rank, and their results come back.

    Ranks may send and receive any number of rows, none among them; all take part in every exchange.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self._size = group, group.size()

    def __call__(self, x_PD: Tensor, ends_E: Tensor, gate_up_EFD: Tensor, down_EDF: Tensor) -> Tensor:
        counts_SL = ends_E.diff(prepend=ends_E.new_zeros(1)).view(self._size, -1)
        arriving_SL = wait_tensor(all_to_all_single(counts_SL, None, None, self._group))
        to_S, from_S = self.split_sizes(counts_SL, arriving_SL)
        rows_QD = self._exchange(x_PD, from_S, to_S)
        # They come sorted by rank and, for each rank, by expert; experts take theirs together.
        expert_SL = torch.arange(arriving_SL.shape[1], device=x_PD.device).expand_as(arriving_SL)
        expert_Q = expert_SL.flatten().repeat_interleave(arriving_SL.flatten(), output_size=len(rows_QD))
        order_Q = expert_Q.argsort(stable=True)
        ends_L = arriving_SL.sum(0).cumsum(0).to(torch.int32)
        out_QD = run_experts(rows_QD[order_Q], ends_L, _local(gate_up_EFD), _local(down_EDF))
        return self._exchange(out_QD[order_Q.argsort()], to_S, from_S)

    def split_sizes(self, leaving_SL: Tensor, arriving_SL: Tensor) -> tuple[list[int], list[int]]:
        """Rows that go to each rank and come from each: all that is read from data here."""
        to_S, from_S = torch.stack((leaving_SL, arriving_SL)).sum(2).tolist()
        return to_S, from_S

    def _exchange(self, rows: Tensor, from_S: list[int], to_S: list[int]) -> Tensor:
        moved: Tensor = wait_tensor(all_to_all_single(rows, from_S, to_S, self._group))
        return moved


def _local(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    own: Tensor = weight.to_local()
    return own
