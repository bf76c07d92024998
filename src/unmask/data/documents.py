"""Documents, and the endless, resumable order in which they are trained on.

Owns `Document`, `Sample`, the `Source` protocol and the mixture `DocumentStream`. Knows neither files nor tokenizers nor
rows: a source hands it finished documents, and the packer takes its samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unmask.errors import ConfigError, DataError

State = dict[str, Any]
"""Something `json.dumps` takes and `json.loads` gives back equal."""


@dataclass(frozen=True, eq=False)
class Document:
    """One text as token ids.

    Attributes:
        tokens: int32 `[length]`.
        maskable: bool `[length]`; False where a token is never masked and never predicted (a prompt).
        rejected: of a preference, the same prompt with the rejected answer; this document is the chosen one.
    """

    tokens: NDArray[np.int32]
    maskable: NDArray[np.bool_]
    rejected: Document | None = None

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 1
        assert self.tokens.shape == self.maskable.shape

    def __len__(self) -> int:
        return int(self.tokens.shape[0])


@dataclass(frozen=True, eq=False)
class Sample:
    """A document and its identity in the stream, which keys its noise.

    Attributes:
        epoch: complete passes over its source before it.
        ordinal: number of the sample in the stream, from 0, over all epochs and all sources of a mixture: no pair
            `(epoch, ordinal)` repeats, and a document gets fresh noise in each epoch.
        document: the document.
    """

    epoch: int
    ordinal: int
    document: Document


class Resumable(Protocol):
    """Something with a position that can be saved."""

    def state_dict(self) -> State:
        """The position, JSON-able."""

    def load_state_dict(self, state: State) -> None:
        """Continue where `state` was taken; raises DataError when it belongs to other data."""


class Source(Resumable, Protocol):
    """An endless, deterministic series of documents: pass after pass over a file, or generated ones."""

    @property
    def name(self) -> str:
        """Name of the source in messages."""

    @property
    def epoch(self) -> int:
        """Epoch of the next document, from 0."""

    @property
    def num_documents(self) -> int | None:
        """Documents of one epoch, about; None: not known beforehand."""

    def next_document(self) -> Document:
        """The next document; raises StopIteration after the last of a source that ends, DataError for unreadable data."""


class SampleStream(Resumable, Protocol):
    """Input of a packer: samples until `StopIteration`."""

    def __next__(self) -> Sample:
        """The next sample."""


class DocumentStream:
    """Weighted mixture of sources, in an order that is a function of the sources' seeds alone.

    The n-th sample comes from the source that is furthest behind its share: the one with the smallest
    `(count + 1/2) / weight`, the first of equals. So any section of the stream holds the sources in the proportion of their
    weights, to within a document or two. Weights are shares of documents, not of tokens.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None, *, epochs: int | None = None) -> None:
        """Mix sources.

        Args:
            sources: at least one; the stream moves them, so they must not be shared with another stream.
            weights: one positive number for each source, in any unit; None: equal shares.
            epochs: stop taking from a source after so many passes over it, and end when all are through (a validation
                set is read with 1); None: never end.

        Raises:
            ConfigError: no source, or a weight or number of epochs that breaks these rules.
        """
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not sources:
            raise ConfigError("0 data sources given; a stream needs at least one, add a source to the data section")
        if len(weights) != len(sources):
            raise ConfigError(f"{len(weights)} weights for {len(sources)} sources; give one weight for each source")
        for source, weight in zip(sources, weights, strict=True):
            if not 0 < weight < float("inf"):
                raise ConfigError(f"weight {weight} of source {source.name} is not positive; remove the source instead")
        if epochs is not None and epochs < 1:
            raise ConfigError(f"{epochs} epochs is not positive; use 1 or more, or none for an endless stream")
        self._sources, self._weights, self._epochs = list(sources), weights, epochs
        self._counts = [0] * len(self._sources)
        self._ended: set[int] = set()

    @property
    def num_samples(self) -> int:
        """How many samples have been handed out; the ordinal of the next one."""
        return sum(self._counts)

    @property
    def num_documents(self) -> int | None:
        """Documents of one pass over every source, about; None: not known beforehand."""
        counts = [source.num_documents for source in self._sources]
        return None if None in counts else sum(count for count in counts if count is not None)

    def __iter__(self) -> DocumentStream:
        return self

    def __next__(self) -> Sample:
        """The next sample; raises StopIteration when `epochs` passes are through, DataError for unreadable data."""
        while remaining := [index for index in range(len(self._sources)) if self._has_more(index)]:
            index = min(remaining, key=lambda i: ((self._counts[i] + 0.5) / self._weights[i], i))
            source = self._sources[index]
            epoch, ordinal = source.epoch, self.num_samples
            try:
                document = source.next_document()
            except StopIteration:
                self._ended.add(index)
                continue
            self._counts[index] += 1
            return Sample(epoch=epoch, ordinal=ordinal, document=document)
        raise StopIteration

    def _has_more(self, index: int) -> bool:
        return index not in self._ended and (self._epochs is None or self._sources[index].epoch < self._epochs)

    def state_dict(self) -> State:
        """Position in every source, JSON-able."""
        return {
            "names": [source.name for source in self._sources],
            "counts": list(self._counts),
            "sources": [source.state_dict() for source in self._sources],
        }

    def load_state_dict(self, state: State) -> None:
        """Continue with exactly the sample that would have come after `state` was taken.

        Raises:
            DataError: the state was taken from another mixture.
        """
        names = [source.name for source in self._sources]
        if state["names"] != names:
            raise DataError(f"saved data position is of sources {state['names']}, this job reads {names}; use the same")
        for source, source_state in zip(self._sources, state["sources"], strict=True):
            source.load_state_dict(source_state)
        self._counts = list(state["counts"])
