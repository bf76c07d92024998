"""Sequence packing: documents concatenated into rows of one length, with little padding, deterministic and resumable.

Owns the layout of a row (tokens, segments, positions, identities) and the treatment of documents that are too long. Knows
neither where samples come from nor what noise is applied; a row is independent of its neighbours.

Shapes: R rows, L tokens of a row.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.data.documents import Document, Resumable, Sample, SampleStream, State
from unmask.errors import ConfigError, DataError

SEGMENT_STRIDE = 1 << 40
"""Ordinals in a row are `sample.ordinal + segment * SEGMENT_STRIDE`; `segment` is 0 for a document that was not split.

So ordinals of whole documents are consecutive, which is what a low-discrepancy sequence over them needs.
"""

_MAX_SEGMENTS = 1 << 22

_MAX_DROPPED_IN_A_ROW = 10_000

Overlong = Literal["split", "truncate", "drop"]


@dataclass(frozen=True, eq=False)
class PackedRows:
    """R rows of L tokens.

    Attributes:
        tokens_RL: int64; the pad id on padding, which is always at the end of a row.
        segment_RL: int64; 1, 2, ... for the first, second, ... document of the row; 0 on padding.
        position_RL: int64; counted from the start of the document; 0 on padding.
        maskable_RL: bool; False where a token is never masked and never predicted, and on padding.
        epoch_RL: int64; epoch of the document; 0 on padding.
        ordinal_RL: int64; identity of the document or segment within the stream: `ordinal + segment * SEGMENT_STRIDE` of its
            sample; 0 on padding.
    """

    tokens_RL: Tensor
    segment_RL: Tensor
    position_RL: Tensor
    maskable_RL: Tensor
    epoch_RL: Tensor
    ordinal_RL: Tensor

    def rows(self, start: int, stop: int) -> PackedRows:
        """Rows `start .. stop - 1`, as views of the same memory."""
        return self._each(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> PackedRows:
        """The same rows on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def joined(self) -> PackedRows:
        """The same rows without the document mask: each is one document, with positions and blocks of the row.

        Its noise is that of the row's first document.
        """
        real_RL = self.segment_RL > 0
        first = {name: getattr(self, name)[:, :1] * real_RL for name in ("epoch_RL", "ordinal_RL")}
        position_L = torch.arange(self.tokens_RL.shape[1], device=real_RL.device)
        return replace(self, segment_RL=real_RL.long(), position_RL=position_L * real_RL, **first)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedRows:
        return PackedRows(**{field.name: change(getattr(self, field.name)) for field in fields(self)})

    @property
    def num_rows(self) -> int:
        """R."""
        return int(self.tokens_RL.shape[0])

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segment_RL > 0).sum())

    @property
    def num_maskable(self) -> int:
        """Tokens that may be masked."""
        return int(self.maskable_RL.sum())


@dataclass(frozen=True)
class PackingStats:
    """Counts of the samples so far: packed, split, truncated, dropped.

    Attributes:
        documents: documents read from the stream.
        split_documents: those longer than a row, cut into segments.
        truncated_documents: those longer than a row, of which the first row is kept.
        dropped_documents: documents, or segments of split ones: nothing maskable (left), longer than a row under `drop`, or
            half of a dropped pair.
        dropped_tokens: their tokens, and those cut off truncated ones.
        rows: rows handed out.
        packed_tokens: document tokens in those rows.
        padded_tokens: padding in those rows.
    """

    documents: int = 0
    split_documents: int = 0
    truncated_documents: int = 0
    dropped_documents: int = 0
    dropped_tokens: int = 0
    rows: int = 0
    packed_tokens: int = 0
    padded_tokens: int = 0

    @property
    def summary(self) -> str:
        """The counts that are not zero, in a line."""
        counts = {
            "read": self.documents,
            "split over rows": self.split_documents,
            "cut at the row's end": self.truncated_documents,
            "left out": self.dropped_documents,
        }
        nonzero = [f"{count:,} {what}" for what, count in counts.items() if count]
        lost = f" ({self.dropped_tokens:,} tokens not used)" if self.dropped_tokens else ""
        return f"documents: {', '.join(nonzero) or 'none'}{lost}"


@dataclass(frozen=True, eq=False)
class Segment:
    """A document, or a part of a split one, as it goes into a row."""

    epoch: int
    ordinal: int
    tokens: NDArray[np.int32]
    maskable: NDArray[np.bool_]

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def state_dict(self) -> State:
        return {
            "epoch": self.epoch,
            "ordinal": self.ordinal,
            "tokens": base64.b64encode(self.tokens.astype("<i4").tobytes()).decode(),
            "maskable": base64.b64encode(np.packbits(self.maskable).tobytes()).decode(),
        }

    @staticmethod
    def from_state_dict(state: State) -> Segment:
        tokens = np.frombuffer(base64.b64decode(state["tokens"]), dtype="<i4").astype(np.int32)
        bits = np.frombuffer(base64.b64decode(state["maskable"]), dtype=np.uint8)
        maskable = np.unpackbits(bits, count=len(tokens)).astype(np.bool_)
        return Segment(epoch=state["epoch"], ordinal=state["ordinal"], tokens=tokens, maskable=maskable)


class RowStream(Resumable, Protocol):
    """An endless, deterministic series of rows: documents packed as they are read, or rows packed beforehand."""

    stats: PackingStats
    batch_tokens: int
    """Document tokens in all rows of the last batch, those outside of its `part` as well."""

    def next_rows(self, num_rows: int, part: slice = ...) -> PackedRows:
        """Rows `part` of the next batch of `num_rows`."""


class Packer(ABC):
    """Base class of packers, which fill rows from a stream of samples."""

    group_size = 1
    """Rows that belong together: rows are given in multiples of it."""

    def __init__(self, stream: SampleStream, row_length: int, *, pad_id: int, overlong: Overlong) -> None:
        """Pack a stream; raises ConfigError for a length or an id that cannot be."""
        if row_length < 1:
            raise ConfigError(f"row length {row_length} is not positive; use a multiple of the block size, such as 1024")
        if pad_id < 0:
            raise ConfigError(f"pad id {pad_id} is negative; use the tokenizer's padding or end-of-text id")
        self._stream, self._overlong = stream, overlong
        self._row_length, self._pad_id = row_length, pad_id
        self._waiting: list[Segment] = []
        self._ended = False
        self.stats, self.batch_tokens = PackingStats(), 0

    def next_rows(self, num_rows: int, part: slice = slice(None)) -> PackedRows:
        """Rows of the next batch.

        Args:
            num_rows: rows of the batch, a multiple of `group_size`.
            part: which of them are laid out; the others are packed and counted.

        Returns:
            All of `part`; when the stream has ended, those that there are, down to none.

        Raises:
            ConfigError: `num_rows` is not positive, or no such multiple.
            DataError: the stream could not be read, or holds nothing maskable.
        """
        return lay_out(self.next_segments(num_rows)[part], self._row_length, pad_id=self._pad_id)

    def next_segments(self, num_rows: int) -> list[list[Segment]]:
        """The documents of the next rows, as by `next_rows`."""
        if num_rows < 1 or num_rows % self.group_size:
            raise ConfigError(f"num_rows is {num_rows}; it must be a positive multiple of {self.group_size}")
        rows: list[list[Segment]] = []
        while len(rows) < num_rows and (group := self._next_group()):
            rows += group
        self.batch_tokens = sum(len(segment) for row in rows for segment in row)
        padding = len(rows) * self._row_length - self.batch_tokens
        self._count(rows=len(rows), packed_tokens=self.batch_tokens, padded_tokens=padding)
        return rows

    def state_dict(self) -> State:
        """The position in the stream, the waiting segments and the counts, JSON-able."""
        return {
            "row_length": self._row_length,
            "stream": self._stream.state_dict(),
            "waiting": [segment.state_dict() for segment in self._waiting],
            "ended": self._ended,
            "stats": asdict(self.stats),
        }

    def load_state_dict(self, state: State) -> None:
        """Continue with exactly the row that would have come after `state` was taken.

        Raises:
            DataError: the state is of rows of another length, or of another stream.
        """
        if state["row_length"] != self._row_length:
            raise DataError(
                f"saved data position is of rows of {state['row_length']} tokens, this job has {self._row_length}; "
                "use the same row length"
            )
        self._stream.load_state_dict(state["stream"])
        self._waiting = [Segment.from_state_dict(segment) for segment in state["waiting"]]
        self._ended = bool(state["ended"])
        self.stats = PackingStats(**state["stats"])

    @abstractmethod
    def _next_group(self) -> list[list[Segment]]:
        """The next `group_size` rows; none at the end."""

    @abstractmethod
    def _segments(self, sample: Sample) -> list[Segment]:
        """The segments of a sample that go into rows; what is dropped is counted."""

    def _read(self) -> bool:
        """Append the segments of the next sample that has any to the waiting ones; False at the end of the stream."""
        for _ in range(_MAX_DROPPED_IN_A_ROW):
            try:
                sample = None if self._ended else next(self._stream)
            except StopIteration:
                sample = None
            if sample is None:
                self._ended = True
                return False
            segments = self._segments(sample)
            self._waiting += segments
            if segments:
                return True
        raise DataError(
            f"{_MAX_DROPPED_IN_A_ROW} documents one after another have no token to learn in a row of {self._row_length}; "
            "use longer rows, or check the field names and the supervise option"
        )

    def _fitted(self, sample: Sample, document: Document) -> Segment | None:
        """The part of a document that fits into a row; None if it is dropped, as too long or with nothing maskable left."""
        if len(document) > self._row_length and self._overlong == "drop":
            return None
        part = slice(0, self._row_length)
        segment = Segment(sample.epoch, sample.ordinal, document.tokens[part], document.maskable[part])
        return segment if segment.maskable.any() else None

    def _counted(self, documents: list[Document], fitted: list[Segment | None]) -> list[Segment]:
        """The segments of documents that are kept or dropped together: all, or none if one is None; counted."""
        segments = [segment for segment in fitted if segment is not None]
        if len(segments) < len(documents):
            segments = []
        self._count(
            documents=len(documents),
            truncated_documents=sum(len(document) > self._row_length for document in documents) if segments else 0,
            dropped_documents=0 if segments else len(documents),
            dropped_tokens=sum(map(len, documents)) - sum(map(len, segments)),
        )
        return segments

    def _count(self, **counts: int) -> None:
        before: dict[str, Any] = asdict(self.stats)
        self.stats = replace(self.stats, **{name: before[name] + count for name, count in counts.items()})


def lay_out(rows: Sequence[Sequence[Segment]], row_length: int, *, pad_id: int) -> PackedRows:
    """Rows of the documents in each."""
    shape = (len(rows), row_length)
    arrays: dict[str, NDArray[Any]] = {field.name: np.zeros(shape, dtype=np.int64) for field in fields(PackedRows)}
    arrays |= {"tokens_RL": np.full(shape, pad_id, dtype=np.int64), "maskable_RL": np.zeros(shape, dtype=np.bool_)}
    for number, row in enumerate(rows):
        start = 0
        for segment_id, segment in enumerate(row, start=1):
            identity = {"segment_RL": segment_id, "epoch_RL": segment.epoch, "ordinal_RL": segment.ordinal}
            content = {"tokens_RL": segment.tokens, "maskable_RL": segment.maskable, "position_RL": np.arange(len(segment))}
            for name, value in (*identity.items(), *content.items()):
                arrays[name][number, start : start + len(segment)] = value
            start += len(segment)
    return PackedRows(**{name: torch.from_numpy(array) for name, array in arrays.items()})


class RowPacker(Packer):
    """Best-fit packer with a buffer of waiting documents.

    A row starts with the document that has waited longest, so none waits for ever; then follows the longest one that still
    fits (of equals the one that has waited longest), until none fits.
    """

    def __init__(
        self, stream: SampleStream, row_length: int, *, pad_id: int, lookahead: int = 64, overlong: Overlong = "split"
    ) -> None:
        """Pack a stream.

        Args:
            stream: where samples come from; the packer moves it.
            row_length: tokens of a row, a multiple of the block size.
            pad_id: token id to fill rows with.
            lookahead: size of the buffer in documents; more pack tighter and make a larger saved state.
            overlong: treatment of a document longer than a row. "split": into segments of a row's length, each a document of
                its own: positions restart and attention does not cross. "truncate": what does not fit is cut off, at the
                edge of a block since a row ends at one; a document whose prompt fills the row is dropped. "drop": dropped.

        Raises:
            ConfigError: a length or an id that breaks these rules.
        """
        if lookahead < 1:
            raise ConfigError(f"lookahead is {lookahead}, not positive; use 1 for documents in order, 64 for tight rows")
        super().__init__(stream, row_length, pad_id=pad_id, overlong=overlong)
        self._lookahead = lookahead

    def _next_group(self) -> list[list[Segment]]:
        row: list[Segment] = []
        free = self._row_length
        while free > 0:
            while len(self._waiting) < self._lookahead and self._read():
                pass
            fitting = [index for index, segment in enumerate(self._waiting) if len(segment) <= free]
            longest = max(fitting, key=lambda index: (len(self._waiting[index]), -index), default=None)
            index = longest if row or longest is None else 0
            if index is None:
                break
            row.append(self._waiting.pop(index))
            free -= len(row[-1])
        return [row] if row else []

    def _segments(self, sample: Sample) -> list[Segment]:
        document = sample.document
        if self._overlong != "split":
            return self._counted([document], [self._fitted(sample, document)])
        num_segments = max(1, -(-len(document) // self._row_length))
        if num_segments > _MAX_SEGMENTS:
            raise DataError(
                f"document {sample.ordinal} makes {num_segments} rows of {self._row_length} tokens, more than "
                f"{_MAX_SEGMENTS}; split it or use longer rows"
            )
        self._count(documents=1, split_documents=int(num_segments > 1))
        segments = []
        for number in range(num_segments):
            part = slice(number * self._row_length, (number + 1) * self._row_length)
            ordinal = sample.ordinal + number * SEGMENT_STRIDE
            segment = Segment(sample.epoch, ordinal, document.tokens[part], document.maskable[part])
            if segment.maskable.any():
                segments.append(segment)
            else:
                self._count(dropped_documents=1, dropped_tokens=len(segment))
        return segments
