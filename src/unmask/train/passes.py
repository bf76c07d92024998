"""Passes through the stages of a pipeline, as objectives ask for them.

Owns the interface between objectives and pipelines. Knows neither torch.distributed nor what is computed.

Legend: B rows, T stream positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from unmask.models.arch.attention import Attend

T = TypeVar("T")


class StageLayers(Protocol):
    """The layers of a stage, as `Transformer.forward`; `received_BTD` comes from the stage before, None to the first one."""

    def __call__(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attend: Attend,
        *,
        input_noise: Tensor | None = None,
        noisy_BT: Tensor | None = None,
        received_BTD: Tensor | None = None,
    ) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Pass(Generic[T]):
    """The way of a micro-batch through all stages; every rank makes its own of the same rows.

    Attributes:
        rows: B.
        lengths: positions of each part of the stream that is run by itself; they sum to T.
        run: a stage's hidden states [B, T, D], of its layers and those of the stage before.
        finish: what the last stage makes of its hidden states.
    """

    rows: int
    lengths: tuple[int, ...]
    run: Callable[[StageLayers, tuple[Tensor, ...] | None], tuple[Tensor, ...]]
    finish: Callable[[Tensor], T]


class Pipeline(Protocol):
    """A model whose layers are on several ranks."""

    @property
    def duplicates(self) -> frozenset[str]:
        """Parameters of this rank that an earlier stage has as well: their gradients are equal, and count once."""
        ...

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace the parameters that this rank holds, and all buffers, by what `change` makes of them."""
        ...

    def train(self, passes: Sequence[Pass[Tensor]]) -> None:
        """Run micro-batches forward and, from the losses that `finish` gives, backward."""
        ...

    def score(self, one: Pass[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run a micro-batch without gradient; every rank gets the result."""
        ...

    def from_first(self, value: T) -> T:
        """The value that the first stage's rank has."""
        ...

    def from_last(self, value: T) -> T:
        """The value that the last stage's rank has."""
        ...
