"""Context parallelism (Ulysses): each rank runs the model at its share of a stream's positions.

Owns dealing positions to ranks, and the exchange around attention: positions of all heads become all positions of some heads,
and back. So attention sees whole streams, and any mask is exact.

Positions are dealt like cards, back and forth: noisy and clean copies, and with them masked positions, are spread evenly. Where
ranks outnumber kv heads, each kv head goes to several ranks.

Source: DeepSpeed-Ulysses (2309.14509); zig-zag dealing as in LLaDA2.0's context parallelism.

Legend: B rows, T stream positions, L positions of a rank, N predictions, H query heads, G kv heads, S head dim, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_reduce, all_to_all_single, wait_tensor

from unmask.diffusion.corrupt import Stream
from unmask.diffusion.masks import StreamIndex
from unmask.models.arch.attention import Attend
from unmask.models.arch.transformer import Layers


@dataclass(frozen=True, eq=False)
class ContextShard:
    """A rank's share of the positions of streams: number `rank` of `size` in `group`."""

    group: ProcessGroup
    rank: int
    size: int

    def positions(self, length: int, rank: int | None = None) -> Tensor:
        """The positions [L] that a rank (by default this one) has of a stream; those from `length` on are padding."""
        rank = self.rank if rank is None else rank
        rounds = torch.arange(-(-length // self.size))
        return rounds * self.size + torch.where(rounds % 2 == 0, rank, self.size - 1 - rank)

    def take(self, x_BT: Tensor) -> Tensor:
        """The rank's positions of `x_BT` [B, T, ...]: [B, L, ...], zero where there is padding."""
        length = x_BT.shape[1]
        positions_L = self.positions(length).to(x_BT.device)
        taken = x_BT.index_select(1, positions_L.clamp(max=length - 1))
        padding = (positions_L >= length).view(-1, *(1,) * (x_BT.ndim - 2))
        return taken.masked_fill(padding, 0)

    def local(self, stream: Stream) -> Stream:
        """The stream as this rank runs it: its positions (padding is document 0) and, as `share`, its predictions."""
        index, share = stream.index, self.share(stream)
        row_N, column_N = share.predict
        return replace(
            share,
            tokens_BT=self.take(stream.tokens_BT),
            position_BT=self.take(stream.position_BT),
            index=StreamIndex(self.take(index.document_BT), self.take(index.block_BT), self.take(index.copy_BT)),
            epoch_BT=self.take(stream.epoch_BT),
            ordinal_BT=self.take(stream.ordinal_BT),
            predict=(row_N, column_N // self.size),
        )

    def share(self, stream: Stream) -> Stream:
        """The stream with the predictions of this rank only. What is counted once for all of them, the first rank counts."""
        own_N = self._owner(stream.predict[1]) == self.rank
        row_N, column_N = stream.predict
        return replace(
            stream,
            predict=(row_N[own_N], column_N[own_N]),
            target_N=stream.target_N[own_N],
            weight_N=stream.weight_N[own_N],
            t_N=stream.t_N[own_N],
            num_maskable=stream.num_maskable if self.rank == 0 else 0,
        )

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, of which each has a part; its gradient too is summed."""
        total: Tensor = wait_tensor(all_reduce(x, "sum", self.group))
        return total

    def divide(self, layers: Layers) -> Layers:
        """Layers that take a whole stream, run at this rank's positions of it and return those."""

        def divided(
            tokens_BT: Tensor,
            positions_BT: Tensor,
            attend: Attend,
            *,
            input_noise: Tensor | None = None,
            noisy_BT: Tensor | None = None,
        ) -> Tensor:
            return layers(
                self.take(tokens_BT),
                self.take(positions_BT),
                self.attend(attend, tokens_BT.shape[1], tokens_BT.device),
                input_noise=None if input_noise is None else self.take(input_noise),
                noisy_BT=None if noisy_BT is None else self.take(noisy_BT),
            )

        return divided

    def attend(self, attend: Attend, length: int, device: torch.device | None = None) -> Attend:
        """Attention of the rank's positions (on `device`), where `attend` is that of a whole stream of `length` positions."""
        place_T, source_P = (order.to(device) for order in self._order(length))

        def exchanged(layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
            copies = self.size // gcd(k_BGTS.shape[1], self.size)
            if copies > 1:
                k_BGTS, v_BGTS = (x.repeat_interleave(copies, dim=1) for x in (k_BGTS, v_BGTS))
            heads = [x.unflatten(1, (self.size, -1)) for x in (q_BHTS, k_BGTS, v_BGTS)]
            received_RBhLS = self._exchange(torch.cat(heads, dim=2).transpose(0, 1))
            whole_BhTS = received_RBhLS.permute(1, 2, 0, 3, 4).flatten(2, 3).index_select(2, place_T)
            q, k, v = whole_BhTS.split([x.shape[2] for x in heads], dim=1)
            out_BhTS = attend(layer, q, k, v)
            padded = F.pad(out_BhTS, (0, 0, 0, len(source_P) - length)).index_select(2, source_P)
            back_RBhLS = self._exchange(padded.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4))
            return back_RBhLS.transpose(0, 1).flatten(1, 2)

        return exchanged

    def _owner(self, column_N: Tensor) -> Tensor:
        """The rank that has each position."""
        card_N = column_N % self.size
        return torch.where(column_N // self.size % 2 == 0, card_N, self.size - 1 - card_N)

    def _order(self, length: int) -> tuple[Tensor, Tensor]:
        """All ranks' positions one behind the other: where among them each of `length` positions is, and what is where."""
        source_P = torch.cat([self.positions(length, rank) for rank in range(self.size)])
        return source_P.argsort()[:length], source_P

    def _exchange(self, x_R: Tensor) -> Tensor:
        """Part `r` of `x_R` [R, ...] to rank `r`; part `r` of the result is from rank `r`."""
        received: Tensor = wait_tensor(all_to_all_single(x_R.flatten(0, 1).contiguous(), None, None, self.group))
        return received.view(x_R.shape)
