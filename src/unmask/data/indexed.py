"""Sources with a fixed number of documents an epoch, among them files whose records can be read in any order.

Owns order, position and cache. Knows neither the files behind the records nor their contents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

from unmask.data.documents import Document, State
from unmask.data.encoding import DocumentEncoder
from unmask.data.hashing import file_digest, seeded_permutation
from unmask.data.records import Record, Records
from unmask.errors import DataError

REMEDY = "put the same data back, or start a run in another folder"
"""What to do about data that have changed since a run was saved."""
_CACHED_TOKENS = 1 << 26
"""Capacity of the cache of encoded documents in tokens, about 5 bytes each: small datasets are tokenized once."""


class EpochSource(ABC):
    """Base class of sources with a fixed number of documents an epoch, which are a function of the epoch's number."""

    def __init__(self, name: str, encoder: DocumentEncoder, num_documents: int) -> None:
        self.name, self.encoder, self.epoch = name, encoder, 0
        self._num_documents, self._cursor = num_documents, 0
        self._open_epoch()

    @property
    def num_documents(self) -> int:
        """Documents in one epoch."""
        return self._num_documents

    @cached_property
    @abstractmethod
    def identity(self) -> str:
        """A digest of the data: equal where every epoch has the same documents."""

    @abstractmethod
    def _open_epoch(self) -> None:
        """Prepare the documents of `self.epoch`."""

    @abstractmethod
    def _record(self, index: int) -> tuple[Record, str]:
        """Record `index` of the epoch, and its location."""

    def _document(self, index: int) -> Document:
        """Document `index` of the epoch."""
        return self.encoder.encode(*self._record(index))

    def next_record(self) -> tuple[Record, str]:
        """The next record and its location, to be encoded elsewhere; raises DataError when it cannot be read."""
        record = self._record(self._cursor)
        self._move_on()
        return record

    def next_document(self) -> Document:
        """The next document; raises DataError when it cannot be read or used."""
        document = self._document(self._cursor)
        self._move_on()
        return document

    def _move_on(self) -> None:
        self._cursor += 1
        if self._cursor == self._num_documents:
            self.epoch, self._cursor = self.epoch + 1, 0
            self._open_epoch()

    def state_dict(self) -> State:
        """Epoch and position in it, and what the data were."""
        return {
            "num_documents": self._num_documents,
            "identity": self.identity,
            "epoch": self.epoch,
            "cursor": self._cursor,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue where `state` was taken; raises DataError when the data are not the same."""
        if state["num_documents"] != self._num_documents:
            raise DataError(
                f"{self.name} has {self._num_documents} documents an epoch, {state['num_documents']} when the run was saved; "
                f"{REMEDY}"
            )
        if state["identity"] != self.identity:
            raise DataError(f"the content of {self.name} has changed since the run was saved; {REMEDY}")
        self.epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        self._open_epoch()


class IndexedSource(EpochSource):
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
        self._records = records
        self._seed, self._shuffle = seed, shuffle
        self._cache: dict[int, Document] = {}
        self._room = _CACHED_TOKENS
        super().__init__(name, encoder, len(records))

    @cached_property
    def identity(self) -> str:
        return file_digest(self._records.files)

    def _open_epoch(self) -> None:
        length = len(self._records)
        self._order = seeded_permutation(length, self._seed, self.epoch).tolist() if self._shuffle else range(length)

    def _record(self, index: int) -> tuple[Record, str]:
        number = int(self._order[index])
        return self._records.read(number), self._records.where(number)

    def _document(self, index: int) -> Document:
        number = int(self._order[index])
        if number in self._cache:
            return self._cache[number]
        document = super()._document(index)
        size = len(document) + (0 if document.rejected is None else len(document.rejected))
        if size <= self._room:
            self._cache[number] = document
            self._room -= size
        return document
