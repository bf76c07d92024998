"""Pipeline parallelism (PP): layers divided over ranks, micro-batches passed from stage to stage.

Owns which layers a rank holds, and runs the schedules of `torch.distributed.pipelining`. Only hidden states travel: every rank
makes streams, masks and noise of the rows itself.

The model stays one `Transformer` on every rank. Parameters that a rank does not hold are on the meta device and frozen there,
under their names; `Stage` is a view of the layers that run together.

Legend: B rows, T stream positions, L positions of this rank, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from unmask.models.arch.attention import Attend
from unmask.models.arch.layers import rope_cos_sin
from unmask.models.arch.transformer import Transformer, embed_tokens, run_blocks
from unmask.train.parallel.tensor import local_length
from unmask.train.parallel.world import World
from unmask.train.passes import Pass

T = TypeVar("T")

_SCHEDULES = {"interleaved_1f1b": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}


class Stage(nn.Module):
    """Consecutive layers of a model; the first stage embeds, the last one normalises and finishes each pass."""

    def __init__(self, model: Transformer, index: int, layers: range, world: World) -> None:
        """Take layers of a model, whose modules stay its own.

        Args:
            model: with all its layers.
            index: number of the stage.
            layers: which it runs.
            world: of whose tensor ranks this one is.
        """
        super().__init__()
        config = model.config
        self.index, self.is_first, self.is_last = index, layers.start == 0, layers.stop == config.num_layers
        self.config, self.checkpointing = config, model.activation_checkpointing
        self.rope_factor, self._world = model.rope_factor, world
        self.register_buffer("inv_freq", model.inv_freq, persistent=False)
        self.blocks = nn.ModuleList(model.blocks[layer] for layer in layers)
        self.embed = model.embed if self.is_first or (self.is_last and config.tied_head) else None
        self.mask_vector = model.mask_vector if self.is_first else None
        self.norm = model.norm if self.is_last else None
        self.lm_head = model.lm_head if self.is_last else None
        self.passes: Sequence[Pass[Any]] = ()
        self.shape_BL, self._number = (0, 0), 0

    def begin(self, passes: Sequence[Pass[Any]]) -> None:
        """Take the passes that are to be run; every schedule runs a stage's in their order."""
        self.passes, self._number = passes, 0
        self.shape_BL = (max(one.rows for one in passes), max(sum(self.lengths(one)) for one in passes))

    def forward(self, received_BLD: Tensor | None = None) -> Any:
        """Run the stage's part of the next pass: hidden states [B, L, D], padded to `shape_BL`, or what the pass ends with."""
        one = self.passes[self._number]
        self._number += 1
        received = None if received_BLD is None else received_BLD[: one.rows].split_with_sizes(self._split(one), dim=1)
        parts = one.run(self._layers, received)
        if self.is_last:
            return one.finish(parts[0])
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        padding = (self.shape_BL[1] - out.shape[1], self.shape_BL[0] - out.shape[0])
        return F.pad(out, (0, 0, 0, padding[0], 0, padding[1])) if any(padding) else out

    def relink(self, model: Transformer) -> None:
        """Let the model have the parameter that FSDP put in the place of the one that was its own, not of a module of it."""
        if self.mask_vector is not None:
            model.mask_vector = self.mask_vector

    def lengths(self, one: Pass[Any]) -> list[int]:
        """Positions of each part of a pass between stages, where tensor ranks divide them."""
        return [local_length(length, self._world) for length in one.lengths]

    def _split(self, one: Pass[Any]) -> list[int]:
        lengths = self.lengths(one)
        return [*lengths, self.shape_BL[1] - sum(lengths)]

    def _layers(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attend: Attend,
        *,
        input_noise: Tensor | None = None,
        noisy_BT: Tensor | None = None,
        received_BTD: Tensor | None = None,
    ) -> Tensor:
        if received_BTD is None:
            assert self.embed is not None
            received_BTD = embed_tokens(self.embed, self.mask_vector, self.config, tokens_BT, input_noise)
        if self.config.gated_lora_rank is None:
            noisy_BT = None
        assert isinstance(self.inv_freq, Tensor)
        rope = rope_cos_sin(positions_BT, self.inv_freq, self.rope_factor, received_BTD.dtype)
        x_BTD = run_blocks(self.blocks, received_BTD, rope, attend, noisy_BT, checkpointing=self.checkpointing)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return x_BTD


def split_stages(model: Transformer, world: World) -> list[Stage]:
    """The stages of this rank; what belongs to other ranks' leaves the model's memory, in place."""
    dims, rank = world.dims, world.index("pipeline")
    layers = dims.stage_layers(model.config.num_layers)
    stages = [Stage(model, index, layers[index], world) for index in range(rank, dims.num_stages, dims.pipeline)]
    own = {parameter for stage in stages for parameter in stage.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in own:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                setattr(module, name, nn.Parameter(empty, requires_grad=False))
    return stages


class TorchPipeline:
    """The stages of a model, run by the schedules of `torch.distributed.pipelining`.

    Micro-batches may differ in shape: hidden states are padded to the largest on their way.
    """

    def __init__(self, model: Transformer, stages: list[Stage], world: World, dtype: torch.dtype) -> None:
        """Connect the stages.

        Args:
            model: whose layers they are, FSDP applied.
            stages: those of this rank.
            world: the ranks.
            dtype: of hidden states.
        """
        self._model, self._stages, self._world, self._dtype = model, stages, world, dtype
        self._group, self._rank, self._size = world.group("pipeline"), world.index("pipeline"), world.dims.pipeline
        self._schedule_of: tuple[Any, PipelineScheduleSingle | PipelineScheduleMulti] | None = None

    @property
    def duplicates(self) -> frozenset[str]:
        """The tied head: the last stage has the first one's embedding."""
        return frozenset({"embed.weight"} if self._model.config.tied_head and self._rank == self._size - 1 else ())

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the parameters that this rank holds, and all buffers, by what `change` makes of them."""
        own = {module for stage in self._stages for module in stage.modules()}
        for module in self._model.modules():
            if module not in own:
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = change(buffer)
        for stage in self._stages:
            stage._apply(change)  # type: ignore[no-untyped-call]
            stage.relink(self._model)

    def train(self, passes: Sequence[Pass[Tensor]]) -> None:
        """Run micro-batches forward and, from the losses that `finish` gives, backward."""
        self._prepare(passes)
        self._schedule(len(passes)).step(target=torch.arange(len(passes)), return_outputs=False)
        for stage in self._stages:
            stage.passes = ()
        self._sum_tied()

    @torch.no_grad()
    def score(self, one: Pass[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run a micro-batch without gradient; every rank gets the result."""
        self._prepare([one])
        result: tuple[Tensor, ...] = ()
        for stage in self._stages:
            received = None
            if not stage.is_first:
                received = self._empty(stage, self._device)
                dist.recv(received, group=self._group, group_src=(self._rank - 1) % self._size)
            out = stage(received)
            if stage.is_last:
                result = tuple(tensor.cpu() for tensor in out)
            else:
                dist.send(out.contiguous(), group=self._group, group_dst=(self._rank + 1) % self._size)
            stage.passes = ()
        return tuple(tensor.to(self._device) for tensor in self.from_last(result))

    def from_first(self, value: T) -> T:
        """The value that the first stage's rank has."""
        return self._from(0, value)

    def from_last(self, value: T) -> T:
        """The value that the last stage's rank has."""
        return self._from(self._size - 1, value)

    def _from(self, rank: int, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, group=self._group, group_src=rank)
        return values[0]

    def _prepare(self, passes: Sequence[Pass[Any]]) -> None:
        for stage in self._stages:
            stage.begin(passes)

    @property
    def _device(self) -> torch.device:
        return self._model.inv_freq.device

    def _empty(self, stage: Stage, device: torch.device) -> Tensor:
        """Hidden states between stages, not computed yet."""
        return torch.empty(*stage.shape_BL, self._model.config.hidden_size, dtype=self._dtype, device=device)

    def _schedule(self, num_batches: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        """The schedule for so many micro-batches of the present shape, made anew when these change."""
        key = (num_batches, self._stages[0].shape_BL)
        if self._schedule_of is None or self._schedule_of[0] != key:
            self._schedule_of = key, self._new_schedule(num_batches)
        return self._schedule_of[1]

    def _new_schedule(self, num_batches: int) -> PipelineScheduleSingle | PipelineScheduleMulti:
        stages, num_stages = [], self._world.dims.num_stages
        for stage in self._stages:
            # Shapes and types, so that the stages need not ask each other.
            hidden = self._empty(stage, torch.device("meta")).requires_grad_()
            loss = torch.empty((), device="meta", requires_grad=True)
            inputs, outputs = () if stage.is_first else (hidden,), (loss if stage.is_last else hidden,)
            stages.append(PipelineStage(stage, stage.index, num_stages, self._device, inputs, outputs, group=self._group))
        name = self._world.dims.pipeline_schedule
        options: dict[str, Any] = {"loss_fn": lambda loss, number: loss, "scale_grads": False}
        if name == "1f1b":
            return Schedule1F1B(stages[0], num_batches, **options)
        return _SCHEDULES[name](list(stages), num_batches, **options)

    def _sum_tied(self) -> None:
        """Sum the gradients of a tied head over the first and the last stage."""
        weight = self._model.embed.weight
        if not self._model.config.tied_head or self._rank not in (0, self._size - 1) or not weight.requires_grad:
            return
        assert weight.grad is not None
        own = self._world.local(weight.grad)
        other = torch.empty_like(own)
        peer = self._size - 1 - self._rank
        exchange = [(dist.isend, own), (dist.irecv, other)]
        for work in dist.batch_isend_irecv([dist.P2POp(op, x, group=self._group, group_peer=peer) for op, x in exchange]):
            work.wait()
        own += other
