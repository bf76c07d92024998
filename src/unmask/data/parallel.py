"""Tokenising in parallel processes: a source whose records are encoded ahead by workers, in the order of the source.

Owns the processes and what they are sent. The documents, their order and a saved position are those of the source itself,
whatever the number of processes.
"""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path

from unmask.data.documents import Document, State
from unmask.data.encoding import DocumentEncoder, RecordSource
from unmask.data.records import Record
from unmask.errors import ConfigError, DataError

_CHUNK = 64
"""Records that are sent to a worker at once."""
_CHUNKS_AHEAD = 3
"""Chunks per process that are on their way."""


class EncoderPool:
    """Worker processes that encode records."""

    def __init__(self, executor: ProcessPoolExecutor, num_processes: int, folder: Path) -> None:
        self._executor, self.num_processes, self._folder = executor, num_processes, folder
        self._count = 0

    def share(self, encoder: DocumentEncoder) -> Path:
        """Hand an encoder to the workers; returns its name there."""
        self._count += 1
        path = self._folder / f"encoder-{self._count}"
        path.write_bytes(pickle.dumps(encoder))
        return path

    def encode(self, encoder: Path, records: list[tuple[Record, str]]) -> Future[list[Document | DataError]]:
        """Documents of records, each or the error that it raises."""
        return self._executor.submit(_encode, encoder, records)


@contextmanager
def encoder_pool(num_processes: int) -> Iterator[EncoderPool | None]:
    """Workers for the time of the block; None where one process is to do everything.

    Raises:
        ConfigError: `num_processes` is not positive.
    """
    if num_processes < 1:
        raise ConfigError(f"nproc is {num_processes}; it must be at least 1")
    if num_processes == 1:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="unmask-pack-") as folder:
        executor = ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=_start_worker)
        try:
            yield EncoderPool(executor, num_processes, Path(folder))
        finally:
            executor.shutdown(cancel_futures=True)


@dataclass
class _Chunk:
    """Records on their way: where each began, and the documents that come back."""

    starts: list[tuple[int, State]]
    documents: Future[list[Document | DataError]]
    cursor: int = 0


class ParallelSource:
    """A source whose records are encoded by a pool."""

    def __init__(self, source: RecordSource, pool: EncoderPool) -> None:
        self._source, self._pool = source, pool
        self._encoder = pool.share(source.encoder)
        self._chunks: deque[_Chunk] = deque()
        self._failure: DataError | None = None

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def num_documents(self) -> int | None:
        return self._source.num_documents

    @property
    def epoch(self) -> int:
        if self._chunks:
            chunk = self._chunks[0]
            return chunk.starts[chunk.cursor][0]
        return self._source.epoch

    def next_document(self) -> Document:
        """The next document; raises DataError when it cannot be read or used."""
        while self._failure is None and len(self._chunks) < _CHUNKS_AHEAD * self._pool.num_processes:
            self._send()
        if not self._chunks:
            assert self._failure is not None
            raise self._failure
        chunk = self._chunks[0]
        try:
            document = chunk.documents.result()[chunk.cursor]
        except BrokenProcessPool as error:
            raise DataError(
                f"{self.name}: a process that tokenises was killed, perhaps for want of memory; use a lower nproc and resume"
            ) from error
        chunk.cursor += 1
        if chunk.cursor == len(chunk.starts):
            self._chunks.popleft()
        if isinstance(document, DataError):
            raise document
        return document

    def state_dict(self) -> State:
        """That of the source before the next document."""
        if self._chunks:
            chunk = self._chunks[0]
            return chunk.starts[chunk.cursor][1]
        return self._source.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._chunks.clear()
        self._failure = None
        self._source.load_state_dict(state)

    def _send(self) -> None:
        """Send the next chunk; one that cannot be read fails when its turn comes."""
        starts: list[tuple[int, State]] = []
        records: list[tuple[Record, str]] = []
        try:
            while len(records) < _CHUNK:
                start = self._source.epoch, self._source.state_dict()
                records.append(self._source.next_record())
                starts.append(start)
        except DataError as error:
            self._failure = error
        if records:
            self._chunks.append(_Chunk(starts, self._pool.encode(self._encoder, records)))


def _start_worker() -> None:
    """End with the parent however that ends; Ctrl-C is the parent's matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@cache
def _shared(path: Path) -> DocumentEncoder:
    encoder = pickle.loads(path.read_bytes())
    assert isinstance(encoder, DocumentEncoder)
    return encoder


def _encode(path: Path, records: list[tuple[Record, str]]) -> list[Document | DataError]:
    encoder = _shared(path)
    documents: list[Document | DataError] = []
    for record, where in records:
        try:
            documents.append(encoder.encode(record, where))
        except DataError as error:
            documents.append(error)
    return documents
