"""Boxes: which part of a whole parameter this process holds, whatever the layout over processes.

Owns the arithmetic of boxes, in which reading weights, checkpoints and exports are written. Which mesh a box is a shard of is
known to `train.parallel` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """A box of a whole tensor: where it begins, and its content, a view of what this process holds."""

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class BoxedTensor:
    """A whole tensor of which this process holds some boxes.

    Attributes:
        shape: of the whole.
        boxes: disjoint; none of them empty.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @staticmethod
    def whole(tensor: Tensor) -> BoxedTensor:
        """A tensor that this process holds all of."""
        return BoxedTensor(tuple(tensor.shape), (Box((0,) * tensor.ndim, tensor),))

    def size(self) -> torch.Size:
        """The shape of the whole, as a tensor gives it."""
        return torch.Size(self.shape)

    def part(self, index: Sequence[int | slice]) -> BoxedTensor:
        """What is held of `whole[index]`; slices are of step 1, with both ends."""
        ranges = [_range(item, size) for item, size in zip(index, self.shape, strict=False)]
        ranges += [(0, size) for size in self.shape[len(ranges) :]]
        kept = [number for number in range(len(ranges)) if number >= len(index) or isinstance(index[number], slice)]
        boxes = []
        for offsets, tensor in self.boxes:
            found = intersection(offsets, tensor, ranges)
            if found is not None:
                inner = found.tensor[tuple(slice(None) if number in kept else 0 for number in range(len(ranges)))]
                boxes.append(Box(tuple(found.offsets[number] - ranges[number][0] for number in kept), inner))
        return BoxedTensor(tuple(ranges[number][1] - ranges[number][0] for number in kept), tuple(boxes))

    def staged(self) -> BoxedTensor:
        """A copy on the CPU, which later steps do not change."""
        boxes = tuple(Box(box.offsets, box.tensor.detach().to("cpu", copy=True)) for box in self.boxes)
        return BoxedTensor(self.shape, boxes)


def intersection(offsets: Sequence[int], tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> Box | None:
    """The part of a box that lies in a range of every dimension; None: nothing does."""
    starts = [max(offset, start) for offset, (start, _) in zip(offsets, ranges, strict=True)]
    stops = [min(offset + size, stop) for offset, size, (_, stop) in zip(offsets, tensor.shape, ranges, strict=True)]
    if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
        return None
    inner = tuple(slice(start - offset, stop - offset) for start, stop, offset in zip(starts, stops, offsets, strict=True))
    return Box(tuple(starts), tensor[inner])


def _range(item: int | slice, size: int) -> tuple[int, int]:
    if isinstance(item, int):
        return item, item + 1
    return item.start or 0, size if item.stop is None else item.stop
