"""What one forward of the engine is made of: rows of several sequences, and where their keys and values live.

Owns the description that every inference backend reads. Knows neither pages nor requests: a slot is a place in a store.

Legend: T rows of the forward, K keys of one sequence, L layers, G kv heads, P slots, S head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.diffusion.masks import block_causal_mask
from unmask.models.arch.attention import sdpa


@dataclass(frozen=True)
class Segment:
    """Rows `start..stop` of a forward: consecutive positions of one sequence, from position `past` on.

    A row at position p sees the keys of positions below `(p // block_size + 1) * block_size` (block-causal; causal when
    `block_size` is 1), of which there are `past + stop - start` with this forward's own.

    `slots_K` (int64, one entry a key) tells where the keys and values of each position live. `consecutive` says that they
    are neighbours in the store, so that a view of it serves. The rows of an `open` segment denoise: they pass the gated
    updates of a model that has them.
    """

    start: int
    stop: int
    past: int
    block_size: int
    slots_K: Tensor
    consecutive: bool
    open: bool = True

    @property
    def num_keys(self) -> int:
        """Keys of this sequence when the forward's own are written."""
        return self.past + self.stop - self.start


@dataclass(frozen=True)
class Rows:
    """One forward over `T` rows: int64 tokens and positions, and the segments that cover them in order."""

    tokens_T: Tensor
    positions_T: Tensor
    segments: tuple[Segment, ...]

    @classmethod
    def join(cls, tokens: Sequence[Sequence[int]], segments: Sequence[Segment], device: torch.device | str) -> Rows:
        """Rows of several segments, `tokens` listing each one's own."""
        flat = [token for part in tokens for token in part]
        positions = [p for s in segments for p in range(s.past, s.num_keys)]
        return cls(torch.tensor(flat, device=device), torch.tensor(positions, device=device), tuple(segments))

    @property
    def noisy_T(self) -> Tensor:
        """Bool: the rows of open segments."""
        open_ = [s.open for s in self.segments for _ in range(s.start, s.stop)]
        return torch.tensor(open_, device=self.tokens_T.device)


class PagedAttend:
    """`Attend` over a store [L, 2, G, P, S]: writes this forward's keys and values to their slots, then attends segment-wise.

    Every segment attends by itself, so that its result does not depend on its neighbours.
    """

    def __init__(self, store: Tensor, rows: Rows) -> None:
        self.store, self.rows = store, rows
        self._own_T = torch.cat([s.slots_K[s.past :] for s in rows.segments])
        self._masks = [self._mask(s) for s in rows.segments]

    def _mask(self, segment: Segment) -> Tensor | None:
        last = (segment.past // segment.block_size + 1) * segment.block_size
        if segment.num_keys <= last:
            return None  # one block: all of its rows see all there is
        count = segment.stop - segment.start
        mask = block_causal_mask(count, segment.num_keys, segment.block_size, start=segment.past)
        return mask.to(self.store.device)

    def __call__(self, layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        """Attention output [1, H, T, S]."""
        keys_GPS, values_GPS = self.store[layer]
        keys_GPS.index_copy_(1, self._own_T, k_BGTS[0])
        values_GPS.index_copy_(1, self._own_T, v_BGTS[0])
        parts = []
        for segment, mask in zip(self.rows.segments, self._masks, strict=True):
            k, v = (_read(x, segment) for x in (keys_GPS, values_GPS))
            parts.append(sdpa(q_BHTS[:, :, segment.start : segment.stop], k, v, mask))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _read(x_GPS: Tensor, segment: Segment) -> Tensor:
    if segment.consecutive:
        first = int(segment.slots_K[0])
        return x_GPS[None, :, first : first + segment.num_keys]
    return x_GPS.index_select(1, segment.slots_K)[None]
