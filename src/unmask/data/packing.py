"""Documents laid end to end in rows of one length, with little padding, deterministically and resumably.

Owns the layout of a row: tokens, segments, positions, identities; and what becomes of documents that are too long. Knows
neither where samples come from nor what noise is put on them; a row never says anything about its neighbours.

Shapes: R rows, L tokens of a row.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.data.documents import Document, Sample, SampleStream, State
from unmask.errors import ConfigError, DataError

PIECE_STRIDE = 1 << 40
"""Ordinals in a row are `sample.ordinal + piece * PIECE_STRIDE`; `piece` is 0 for a document that was not split.

So ordinals of whole documents are consecutive, which is what a low-discrepancy sequence over them needs.
"""

_MAX_PIECES = 1 << 22

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
        ordinal_RL: int64; identity of the document or piece within the stream: `ordinal + piece * PIECE_STRIDE` of its
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
        """The same rows, each as one document: what is packed together sees each other, with positions and blocks of the row.

        Its noise is that of the row's first document.
        """
        real_RL = self.segment_RL > 0
        first = {name: getattr(self, name)[:, :1] * real_RL for name in ("epoch_RL", "ordinal_RL")}
        place_L = torch.arange(self.tokens_RL.shape[1], device=real_RL.device)
        return replace(self, segment_RL=real_RL.long(), position_RL=place_L * real_RL, **first)

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
        """Tokens that may be masked: what a loss is divided by."""
        return int(self.maskable_RL.sum())


@dataclass(frozen=True)
class PackingStats:
    """What became of the samples so far; nothing is lost that is not counted here.

    Attributes:
        documents: documents read from the stream.
        split_documents: those longer than a row, cut into pieces.
        truncated_documents: those longer than a row, of which the first row is kept.
        dropped_documents: documents, or pieces of split ones, left out: nothing in them (or in what is left of them) is
            maskable, or they are longer than a row and such are to be dropped, or they are half of a pair that has to go.
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
        """What is worth telling a person, in a line; what did not occur is not in it."""
        counts = {
            "read": self.documents,
            "split over rows": self.split_documents,
            "cut at the row's end": self.truncated_documents,
            "left out": self.dropped_documents,
        }
        told = [f"{count:,} {what}" for what, count in counts.items() if count]
        lost = f" ({self.dropped_tokens:,} tokens not used)" if self.dropped_tokens else ""
        return f"documents: {', '.join(told) or 'none'}{lost}"


@dataclass(frozen=True, eq=False)
class Piece:
    """A document, or one row-long part of it, waiting for a row."""

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
    def from_state_dict(state: State) -> Piece:
        tokens = np.frombuffer(base64.b64decode(state["tokens"]), dtype="<i4").astype(np.int32)
        bits = np.frombuffer(base64.b64decode(state["maskable"]), dtype=np.uint8)
        maskable = np.unpackbits(bits, count=len(tokens)).astype(np.bool_)
        return Piece(epoch=state["epoch"], ordinal=state["ordinal"], tokens=tokens, maskable=maskable)


class Packer(ABC):
    """Fills rows from a stream; what a trainer reads."""

    rows_together = 1
    """Rows that only come together: a number of rows asked for is a multiple of it."""

    def __init__(self, stream: SampleStream, row_length: int, *, pad_id: int, overlong: Overlong) -> None:
        """Pack a stream; raises ConfigError for a length or an id that cannot be."""
        if row_length < 1:
            raise ConfigError(f"row length {row_length} is not positive; use a multiple of the block size, such as 1024")
        if pad_id < 0:
            raise ConfigError(f"pad id {pad_id} is negative; use the tokenizer's padding or end-of-text id")
        self._stream = stream
        self._row_length = row_length
        self._pad_id = pad_id
        self._overlong = overlong
        self._waiting: list[Piece] = []
        self._ended = False
        self.stats = PackingStats()

    def next_rows(self, num_rows: int) -> PackedRows:
        """The next rows.

        Args:
            num_rows: how many, a multiple of `rows_together`.

        Returns:
            `num_rows` rows; fewer, down to none, only when the stream has ended.

        Raises:
            ConfigError: `num_rows` is not positive, or no such multiple.
            DataError: the stream could not be read, or holds nothing maskable.
        """
        if num_rows < 1:
            raise ConfigError(f"{num_rows} rows asked for; ask for 1 or more")
        if num_rows % self.rows_together:
            together = self.rows_together
            raise ConfigError(f"{num_rows} rows asked for, which come {together} at a time; ask for a multiple of {together}")
        rows: list[list[Piece]] = []
        while len(rows) < num_rows and (group := self._next_group()):
            rows += group
        return self._lay_out(rows)

    def state_dict(self) -> State:
        """The stream's place, the waiting documents and the counts, JSON-able."""
        return {
            "row_length": self._row_length,
            "stream": self._stream.state_dict(),
            "waiting": [piece.state_dict() for piece in self._waiting],
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
        self._waiting = [Piece.from_state_dict(piece) for piece in state["waiting"]]
        self._ended = bool(state["ended"])
        self.stats = PackingStats(**state["stats"])

    @abstractmethod
    def _next_group(self) -> list[list[Piece]]:
        """The next `rows_together` rows; none at the end."""

    @abstractmethod
    def _pieces(self, sample: Sample) -> list[Piece]:
        """What of a sample goes into rows; the rest is counted."""

    def _read(self) -> bool:
        """Put the pieces of the next sample that has any into the waiting list; False at the stream's end."""
        for _ in range(_MAX_DROPPED_IN_A_ROW):
            try:
                sample = None if self._ended else next(self._stream)
            except StopIteration:
                sample = None
            if sample is None:
                self._ended = True
                return False
            pieces = self._pieces(sample)
            self._waiting += pieces
            if pieces:
                return True
        raise DataError(
            f"{_MAX_DROPPED_IN_A_ROW} documents one after another have no token to learn in a row of {self._row_length}; "
            "use longer rows, or check the field names and the supervise option"
        )

    def _fitted(self, sample: Sample, document: Document) -> Piece | None:
        """What of a document fits into one row; None if it is too long and such are dropped, or has nothing maskable then."""
        if len(document) > self._row_length and self._overlong == "drop":
            return None
        part = slice(0, self._row_length)
        piece = Piece(sample.epoch, sample.ordinal, document.tokens[part], document.maskable[part])
        return piece if piece.maskable.any() else None

    def _counted(self, documents: list[Document], fitted: list[Piece | None]) -> list[Piece]:
        """The pieces of documents that stay or go together: all of them, or none if one is None; counted."""
        pieces = [piece for piece in fitted if piece is not None]
        if len(pieces) < len(documents):
            pieces = []
        self._count(
            documents=len(documents),
            truncated_documents=sum(len(document) > self._row_length for document in documents) if pieces else 0,
            dropped_documents=0 if pieces else len(documents),
            dropped_tokens=sum(map(len, documents)) - sum(map(len, pieces)),
        )
        return pieces

    def _count(self, **counts: int) -> None:
        before: dict[str, Any] = asdict(self.stats)
        self.stats = replace(self.stats, **{name: before[name] + count for name, count in counts.items()})

    def _lay_out(self, rows: list[list[Piece]]) -> PackedRows:
        shape = (len(rows), self._row_length)
        tokens = np.full(shape, self._pad_id, dtype=np.int64)
        segment, position, epoch, ordinal = (np.zeros(shape, dtype=np.int64) for _ in range(4))
        maskable = np.zeros(shape, dtype=np.bool_)
        for number, row in enumerate(rows):
            start = 0
            for place, piece in enumerate(row):
                at = (number, slice(start, start + len(piece)))
                tokens[at], maskable[at] = piece.tokens, piece.maskable
                segment[at], position[at] = place + 1, np.arange(len(piece))
                epoch[at], ordinal[at] = piece.epoch, piece.ordinal
                start += len(piece)
            self._count(rows=1, packed_tokens=start, padded_tokens=self._row_length - start)
        return PackedRows(
            tokens_RL=torch.from_numpy(tokens),
            segment_RL=torch.from_numpy(segment),
            position_RL=torch.from_numpy(position),
            maskable_RL=torch.from_numpy(maskable),
            epoch_RL=torch.from_numpy(epoch),
            ordinal_RL=torch.from_numpy(ordinal),
        )


class RowPacker(Packer):
    """Fills each row from a buffer of waiting documents.

    A row starts with the document that has waited longest, so none waits for ever; then the longest one that still
    fits follows (the one that has waited longest among equals), until none fits.
    """

    def __init__(
        self, stream: SampleStream, row_length: int, *, pad_id: int, lookahead: int = 64, overlong: Overlong = "split"
    ) -> None:
        """Pack a stream.

        Args:
            stream: where samples come from; the packer moves it.
            row_length: tokens of a row, a multiple of the block size.
            pad_id: token id to fill rows with.
            lookahead: how many documents wait at most; more pack tighter and make a larger saved state.
            overlong: what becomes of a document longer than a row. "split": it is cut into pieces of a row's length, each from
                then on a document of its own: positions restart and attention does not cross. "truncate": what does not fit
                is cut off, at the edge of a block since a row ends at one; a document whose prompt fills the row is then left
                out. "drop": it is left out.

        Raises:
            ConfigError: a length or an id that breaks these rules.
        """
        if lookahead < 1:
            raise ConfigError(f"lookahead {lookahead} is not positive; use 1 for documents in order, 64 for tight rows")
        super().__init__(stream, row_length, pad_id=pad_id, overlong=overlong)
        self._lookahead = lookahead

    def _next_group(self) -> list[list[Piece]]:
        row: list[Piece] = []
        free = self._row_length
        while free > 0:
            while len(self._waiting) < self._lookahead and self._read():
                pass
            place = self._best_fit(free) if row else (0 if self._waiting else None)
            if place is None:
                break
            row.append(self._waiting.pop(place))
            free -= len(row[-1])
        return [row] if row else []

    def _best_fit(self, free: int) -> int | None:
        fitting = [place for place, piece in enumerate(self._waiting) if len(piece) <= free]
        return max(fitting, key=lambda place: (len(self._waiting[place]), -place), default=None)

    def _pieces(self, sample: Sample) -> list[Piece]:
        document = sample.document
        if self._overlong != "split":
            return self._counted([document], [self._fitted(sample, document)])
        num_pieces = max(1, -(-len(document) // self._row_length))
        if num_pieces > _MAX_PIECES:
            raise DataError(
                f"document {sample.ordinal} makes {num_pieces} rows of {self._row_length} tokens, more than "
                f"{_MAX_PIECES}; split it or use longer rows"
            )
        self._count(documents=1, split_documents=int(num_pieces > 1))
        pieces = []
        for number in range(num_pieces):
            part = slice(number * self._row_length, (number + 1) * self._row_length)
            ordinal = sample.ordinal + number * PIECE_STRIDE
            piece = Piece(sample.epoch, ordinal, document.tokens[part], document.maskable[part])
            if piece.maskable.any():
                pieces.append(piece)
            else:
                self._count(dropped_documents=1, dropped_tokens=len(piece))
        return pieces
