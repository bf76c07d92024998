"""Held-out split: documents of a source that are never trained on.

Owns the split. The hash of its tokens decides a document's side: the same text is always on the same side, whatever its source
and epoch.
"""

from __future__ import annotations

import hashlib

from unmask.data.documents import Document, Source, State
from unmask.errors import ConfigError, DataError


class Split:
    """The documents of a source that are on one side of the split."""

    def __init__(self, source: Source, share: float, *, held_out: bool, epochs: int | None = None) -> None:
        """Split a source.

        Args:
            source: read by this object only.
            share: share of the documents that is held out, in [0, 1).
            held_out: which side to read.
            epochs: end after so many passes over the training side; None: never. The held-out side is read once.

        Raises:
            ConfigError: `share` outside its range, or 0 for the held-out side.
        """
        if not 0 <= share < 1 or (held_out and share == 0):
            raise ConfigError(f"held-out share {share} must lie in {'(0, 1)' if held_out else '[0, 1)'}")
        self._source, self._share, self._held_out = source, share, held_out
        self._epochs = 1 if held_out else epochs

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def epoch(self) -> int:
        return self._source.epoch

    @property
    def num_documents(self) -> int | None:
        total = self._source.num_documents
        share = self._share if self._held_out else 1 - self._share
        return None if total is None else round(total * share)

    def next_document(self) -> Document:
        """The next document on this side.

        Raises:
            StopIteration: the last pass is over; what is left of it may all be on the other side.
            DataError: training side, and a whole pass has no document for it.
        """
        started = self.epoch
        while True:
            if self._epochs is not None and self.epoch >= self._epochs:
                raise StopIteration
            if self.epoch > started + 1:
                raise DataError(f"{self.name}: every document is held out; lower data.validation_share ({self._share})")
            document = self._source.next_document()
            if is_held_out(document, self._share) == self._held_out:
                return document

    def state_dict(self) -> State:
        return self._source.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._source.load_state_dict(state)


def is_held_out(document: Document, share: float) -> bool:
    """Whether the hash of the tokens falls into the held-out share."""
    digest = hashlib.blake2b(document.tokens.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64
