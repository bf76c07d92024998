"""Source over a fixed number of records: epoch after epoch, each in an order of its own.

Owns order, position and cache. Knows neither the files behind the records nor their contents.
"""

from __future__ import annotations

from unmask.data.documents import Document, State
from unmask.data.encoding import DocumentEncoder
from unmask.data.hashing import seeded_permutation
from unmask.data.records import Records
from unmask.errors import DataError

_CACHED_TOKENS = 1 << 26
"""Capacity of the cache of encoded documents in tokens, about 5 bytes each: small datasets are tokenized once."""


class IndexedSource:
    """Source over records that can be read in any order; the order of an epoch is a function of (seed, epoch)."""

    def __init__(self, name: str, records: Records, encoder: DocumentEncoder, *, seed: int, shuffle: bool = True) -> None:
        """Open records.

        Args:
            name: for messages.
            records: at least one.
            encoder: encodes records as documents.
            seed: seed of the orders.
            shuffle: a new order in each epoch; False: the order of the records.
        """
        self.name = name
        self._records = records
        self._encoder = encoder
        self._seed = seed
        self._shuffle = shuffle
        self.epoch = 0
        self._cursor = 0
        self._order = self._order_of(0)
        self._cache: dict[int, Document] = {}
        self._room = _CACHED_TOKENS

    def __len__(self) -> int:
        """Documents in one epoch."""
        return len(self._records)

    def next_document(self) -> Document:
        """The next document; raises DataError when it cannot be read or used."""
        number = self._order[self._cursor]
        document = self._document(int(number))
        self._cursor += 1
        if self._cursor == len(self._records):
            self.epoch, self._cursor = self.epoch + 1, 0
            self._order = self._order_of(self.epoch)
        return document

    def state_dict(self) -> State:
        """Epoch and position in it."""
        return {"records": len(self._records), "epoch": self.epoch, "cursor": self._cursor}

    def load_state_dict(self, state: State) -> None:
        """Continue where `state` was taken; raises DataError when the number of records differs."""
        if state["records"] != len(self._records):
            raise DataError(
                f"{self.name} holds {len(self._records)} records, {state['records']} when the job was saved; "
                "put the same data back or start anew"
            )
        self.epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        self._order = self._order_of(self.epoch)

    def _order_of(self, epoch: int) -> list[int] | range:
        length = len(self._records)
        return seeded_permutation(length, self._seed, epoch).tolist() if self._shuffle else range(length)

    def _document(self, number: int) -> Document:
        if number in self._cache:
            return self._cache[number]
        document = self._encoder.encode(self._records.read(number), self._records.where(number))
        size = len(document) + (0 if document.rejected is None else len(document.rejected))
        if size <= self._room:
            self._cache[number] = document
            self._room -= size
        return document
