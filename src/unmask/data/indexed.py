"""A source that goes through a fixed number of records, pass after pass, each pass in an order of its own.

Owns order, place and cache. Knows neither the files behind the records nor what is in them.
"""

from __future__ import annotations

from unmask.data.documents import Document, State
from unmask.data.encoding import DocumentEncoder
from unmask.data.hashing import seeded_permutation
from unmask.data.records import Records
from unmask.errors import DataError

_CACHED_TOKENS = 1 << 26
"""Tokens kept encoded, about 5 bytes each: small sets are tokenized once, large ones as they are read."""


class IndexedSource:
    """Documents of finite records; the order of a pass is a function of (seed, epoch)."""

    def __init__(self, name: str, records: Records, encoder: DocumentEncoder, *, seed: int, shuffle: bool = True) -> None:
        """Go through records.

        Args:
            name: for messages.
            records: at least one.
            encoder: makes documents of them.
            seed: of the orders.
            shuffle: a new order each pass; False: the records' own, always.
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
        """Documents in one pass."""
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
        """The pass and the place in it."""
        return {"records": len(self._records), "epoch": self.epoch, "cursor": self._cursor}

    def load_state_dict(self, state: State) -> None:
        """Continue where `state` was taken; raises DataError when there were more or fewer records then."""
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
