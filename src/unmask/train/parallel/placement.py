"""Placement of parameters: which boxes of `Transformer`'s parameters this rank's tensors are.

Owns the way from DTensors and tensor parallelism's reordered rows to boxes. What is done with boxes is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from unmask.models.arch.transformer import Transformer
from unmask.models.weights.boxes import Box, BoxedTensor, intersection
from unmask.train.parallel.layouts import tensor_layouts
from unmask.train.parallel.world import World


@dataclass(frozen=True)
class Reordering:
    """A parameter whose rows (or columns) a parallel model has in another order than `Transformer`.

    Attributes:
        dim: the dimension that is reordered.
        size: of that dimension in `Transformer`; padding is left out.
        runs: (start in the parallel model's tensor, start in `Transformer`'s, length) of each run of rows.
    """

    dim: int
    size: int
    runs: tuple[tuple[int, int, int], ...]


def boxed(tensor: Tensor, reordering: Reordering | None = None) -> BoxedTensor:
    """What this rank holds of a parameter (or of a tensor laid out like one), as boxes of `Transformer`'s.

    Args:
        tensor: a DTensor; or a plain one, which is whole.
        reordering: how it differs from `Transformer`'s.
    """
    if isinstance(tensor, DTensor):
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
        box = Box(tuple(offsets), local)
        own = BoxedTensor(tuple(tensor.shape), (box,) if local.numel() else ())
    else:
        own = BoxedTensor.whole(tensor)
    return own if reordering is None else _in_order(own, reordering)


def reorderings(model: Transformer, world: World) -> dict[str, Reordering]:
    """The parameters that tensor parallelism has reordered or padded, by name."""
    ranks = world.dims.tensor
    if ranks == 1:
        return {}
    return {
        name: Reordering(layout.dim, sum(layout.sections), tuple(layout.runs(ranks)))
        for name, layout in tensor_layouts(model).items()
        if layout.dim is not None
    }


def _in_order(own: BoxedTensor, reordering: Reordering) -> BoxedTensor:
    dim, boxes = reordering.dim, []
    for offsets, tensor in own.boxes:
        for own_start, start, length in reordering.runs:
            ranges = [(0, size) for size in own.shape]
            ranges[dim] = (own_start, own_start + length)
            found = intersection(offsets, tensor, ranges)
            if found is not None:
                moved = list(found.offsets)
                moved[dim] += start - own_start
                boxes.append(Box(tuple(moved), found.tensor))
    shape = list(own.shape)
    shape[dim] = reordering.size
    return replace(own, shape=tuple(shape), boxes=tuple(boxes))
