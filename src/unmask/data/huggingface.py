"""Streamed Hugging Face datasets: nothing is downloaded whole, and a run resumes at the next record.

Owns the order of shards and records and the position in them. Knows no tokens; the contents of a record are the encoder's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from unmask.data.documents import Document, State
from unmask.data.encoding import DocumentEncoder
from unmask.data.hashing import file_digest, seeded_permutation
from unmask.data.indexed import REMEDY
from unmask.data.records import Record
from unmask.errors import DataError


class HuggingFaceSource:
    """Source that reads a streamed dataset, epoch after epoch.

    The shards of an epoch come in an order that is a function of (seed, epoch). A shard is read in windows of a fixed
    number of records, and each window is shuffled by itself: unlike a rolling buffer, it can be filled again from where it
    began, so a saved position is small and exact.
    """

    def __init__(
        self,
        name: str,
        encoder: DocumentEncoder,
        *,
        seed: int,
        split: str,
        subset: str | None,
        window: int,
        shuffle: bool,
    ) -> None:
        """Open a dataset.

        Args:
            name: id on the hub (`owner/name`), or a local folder of data files.
            encoder: encodes records as documents.
            seed: seed of the orders.
            split: split of the dataset.
            subset: configuration, where a dataset has several.
            window: records shuffled together and held in memory.
            shuffle: False keeps the order of the dataset.

        Raises:
            DataError: it cannot be opened.
        """
        from datasets import load_dataset_builder

        self.name, self.encoder = name, encoder
        self._seed, self._window_size, self._shuffle = seed, window, shuffle
        with _reading(f"dataset {name} cannot be opened", "check its id, subset and split"):
            builder = load_dataset_builder(name, name=subset)
            self._dataset = builder.as_streaming_dataset(split=split)
        self._files = [str(file) for file in (builder.config.data_files or {}).get(split, [])]
        self._num_shards = int(self._dataset.num_shards)
        self.epoch = 0
        self._shard_index = 0
        self._window_index = 0
        self._window_start: State | None = None
        self._cursor = 0
        self._num_in_epoch = 0
        self._shard: Any = None
        self._records: Iterator[Record] = iter(())
        self._window: list[Record] = []
        self._order: list[int] = []
        self._open_shard(None)
        self._skip_empty()

    @property
    def num_documents(self) -> int | None:
        """Not known before the stream ends."""
        return None

    def next_document(self) -> Document:
        """The next document; raises DataError when it cannot be read or used."""
        document = self.encoder.encode(*self._record())
        self._move_on()
        return document

    def next_record(self) -> tuple[Record, str]:
        """The next record and its location, to be encoded elsewhere; raises DataError when it cannot be read."""
        record = self._record()
        self._move_on()
        return record

    def _record(self) -> tuple[Record, str]:
        number = self._order[self._cursor]
        return self._window[number], f"{self.name} shard {self._shard_number()} window {self._window_index} record {number}"

    def _move_on(self) -> None:
        self._cursor += 1
        self._num_in_epoch += 1
        if self._cursor == len(self._window):
            self._window_index += 1
            self._window_start = self._shard.state_dict()
            self._read_window()
            self._skip_empty()

    def state_dict(self) -> State:
        """Epoch, shard, start of the window, and position in it."""
        return {
            "num_shards": self._num_shards,
            "identity": self.identity,
            "window_size": self._window_size,
            "epoch": self.epoch,
            "shard_index": self._shard_index,
            "window_index": self._window_index,
            "window_start": self._window_start,
            "cursor": self._cursor,
            "num_in_epoch": self._num_in_epoch,
        }

    def load_state_dict(self, state: State) -> None:
        """Continue where `state` was taken; raises DataError when the dataset or the window differs."""
        for key, now in (("num_shards", self._num_shards), ("window_size", self._window_size)):
            if state[key] != now:
                raise DataError(f"{self.name} has {key} {now}, {state[key]} when the run was saved; {REMEDY}")
        if state["identity"] != self.identity:
            raise DataError(f"the content of {self.name} has changed since the run was saved; {REMEDY}")
        self.epoch, self._shard_index = int(state["epoch"]), int(state["shard_index"])
        self._window_index, self._num_in_epoch = int(state["window_index"]), int(state["num_in_epoch"])
        self._open_shard(state["window_start"])
        self._cursor = int(state["cursor"])
        if self._cursor >= len(self._window):
            raise DataError(f"{self.name} is shorter than when the run was saved; {REMEDY}")

    @cached_property
    def identity(self) -> str:
        """A digest of the local files and of the addresses of others, which name a commit of the hub."""
        local = [path for path in map(Path, self._files) if path.is_file()]
        with _reading(f"{self.name} cannot be read", "check the data"):
            content = file_digest(local)
        remote = [file for file in self._files if not Path(file).is_file()]
        return hashlib.blake2b("\n".join([content, *remote]).encode(), digest_size=16).hexdigest()

    def _shard_number(self) -> int:
        if not self._shuffle:
            return self._shard_index
        return int(seeded_permutation(self._num_shards, self._seed, self.epoch)[self._shard_index])

    def _open_shard(self, start: State | None) -> None:
        self._shard = self._dataset.shard(num_shards=self._num_shards, index=self._shard_number())
        if start is not None:
            self._shard.load_state_dict(start)
        self._records = iter(self._shard)
        self._window_start = start
        self._read_window()

    def _skip_empty(self) -> None:
        """Go on to the next shard that is not at its end, and to the next epoch after the last shard."""
        while not self._window:
            self._shard_index += 1
            if self._shard_index == self._num_shards:
                if self._num_in_epoch == 0:
                    raise DataError(f"{self.name} holds 0 records; give data with at least one")
                self.epoch, self._shard_index, self._num_in_epoch = self.epoch + 1, 0, 0
            self._window_index = 0
            self._open_shard(None)

    def _read_window(self) -> None:
        with _reading(f"{self.name} cannot be read", "check the data and the connection"):
            self._window = list(islice(self._records, self._window_size))
        self._cursor = 0
        keys = (self._seed, self.epoch, self._shard_index, self._window_index)
        length = len(self._window)
        self._order = seeded_permutation(length, *keys).tolist() if self._shuffle else list(range(length))


@contextmanager
def _reading(failure: str, remedy: str) -> Iterator[None]:
    """Turn the errors of the library into a DataError."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{failure} ({' '.join(str(error).split())}); {remedy}") from error
