"""Documents laid end to end in rows of one length, with little padding, deterministically and resumably.

Owns the layout of a row: tokens, segments, positions, identities. Knows neither where samples come from nor what noise
is put on them; a row never says anything about its neighbours.

Shapes: R rows, L tokens of a row.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.data.documents import SampleStream, State
from unmask.errors import ConfigError, DataError

PIECE_STRIDE = 1 << 40
"""Ordinals in a row are `sample.ordinal + piece * PIECE_STRIDE`; `piece` is 0 for a document that was not split.

So ordinals of whole documents are consecutive, which is what a low-discrepancy sequence over them needs.
"""

_MAX_PIECES = 1 << 22

_MAX_DROPPED_IN_A_ROW = 10_000


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
        return PackedRows(
            tokens_RL=self.tokens_RL[start:stop],
            segment_RL=self.segment_RL[start:stop],
            position_RL=self.position_RL[start:stop],
            maskable_RL=self.maskable_RL[start:stop],
            epoch_RL=self.epoch_RL[start:stop],
            ordinal_RL=self.ordinal_RL[start:stop],
        )

    def to(self, device: torch.device) -> PackedRows:
        """The same rows on another device."""
        return PackedRows(
            tokens_RL=self.tokens_RL.to(device),
            segment_RL=self.segment_RL.to(device),
            position_RL=self.position_RL.to(device),
            maskable_RL=self.maskable_RL.to(device),
            epoch_RL=self.epoch_RL.to(device),
            ordinal_RL=self.ordinal_RL.to(device),
        )

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
        documents: samples read from the stream.
        split_documents: those longer than a row, cut into pieces.
        dropped_documents: documents, or pieces of split ones, left out because nothing in them is maskable.
        dropped_tokens: their tokens.
        rows: rows handed out.
        packed_tokens: document tokens in those rows.
        padded_tokens: padding in those rows.
    """

    documents: int = 0
    split_documents: int = 0
    dropped_documents: int = 0
    dropped_tokens: int = 0
    rows: int = 0
    packed_tokens: int = 0
    padded_tokens: int = 0


@dataclass(frozen=True, eq=False)
class _Piece:
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
    def from_state_dict(state: State) -> _Piece:
        tokens = np.frombuffer(base64.b64decode(state["tokens"]), dtype="<i4").astype(np.int32)
        bits = np.frombuffer(base64.b64decode(state["maskable"]), dtype=np.uint8)
        maskable = np.unpackbits(bits, count=len(tokens)).astype(np.bool_)
        return _Piece(epoch=state["epoch"], ordinal=state["ordinal"], tokens=tokens, maskable=maskable)


class RowPacker:
    """Fills rows from a stream, each from a buffer of waiting documents.

    A row starts with the document that has waited longest, so none waits for ever; then the longest one that still
    fits follows (the one that has waited longest among equals), until none fits.
    """

    def __init__(self, stream: SampleStream, row_length: int, *, pad_id: int, lookahead: int = 64) -> None:
        """Pack a stream.

        Args:
            stream: where samples come from; the packer moves it.
            row_length: tokens of a row. Documents longer than this are cut into pieces of this length, each from then
                on a document of its own: positions restart and attention does not cross.
            pad_id: token id to fill rows with.
            lookahead: how many documents wait at most; more pack tighter and make a larger saved state.

        Raises:
            ConfigError: a length or an id that breaks these rules.
        """
        if row_length < 1:
            raise ConfigError(f"row length {row_length} is not positive; use a multiple of the block size, such as 1024")
        if lookahead < 1:
            raise ConfigError(f"lookahead {lookahead} is not positive; use 1 for documents in order, 64 for tight rows")
        if pad_id < 0:
            raise ConfigError(f"pad id {pad_id} is negative; use the tokenizer's padding or end-of-text id")
        self._stream = stream
        self._row_length = row_length
        self._pad_id = pad_id
        self._lookahead = lookahead
        self._waiting: list[_Piece] = []
        self._ended = False
        self._stats = PackingStats()

    @property
    def stats(self) -> PackingStats:
        """What became of the samples read so far."""
        return self._stats

    @property
    def row_length(self) -> int:
        """L."""
        return self._row_length

    def next_rows(self, num_rows: int) -> PackedRows:
        """The next rows.

        Args:
            num_rows: how many.

        Returns:
            `num_rows` rows; fewer, down to none, only when the stream has ended.

        Raises:
            ConfigError: `num_rows` is not positive.
            DataError: the stream could not be read, or holds nothing maskable.
        """
        if num_rows < 1:
            raise ConfigError(f"{num_rows} rows asked for; ask for 1 or more")
        rows: list[list[_Piece]] = []
        while len(rows) < num_rows and (row := self._next_row()):
            rows.append(row)
        return self._lay_out(rows)

    def state_dict(self) -> State:
        """The stream's place, the waiting documents and the counts, JSON-able."""
        return {
            "row_length": self._row_length,
            "stream": self._stream.state_dict(),
            "waiting": [piece.state_dict() for piece in self._waiting],
            "ended": self._ended,
            "stats": asdict(self._stats),
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
        self._waiting = [_Piece.from_state_dict(piece) for piece in state["waiting"]]
        self._ended = bool(state["ended"])
        self._stats = PackingStats(**state["stats"])

    def _count(self, **counts: int) -> None:
        before: dict[str, Any] = asdict(self._stats)
        self._stats = replace(self._stats, **{name: before[name] + count for name, count in counts.items()})

    def _next_row(self) -> list[_Piece]:
        row: list[_Piece] = []
        free = self._row_length
        while free > 0:
            self._fill_waiting()
            place = self._best_fit(free) if row else (0 if self._waiting else None)
            if place is None:
                break
            row.append(self._waiting.pop(place))
            free -= len(row[-1])
        return row

    def _best_fit(self, free: int) -> int | None:
        fitting = [place for place, piece in enumerate(self._waiting) if len(piece) <= free]
        return max(fitting, key=lambda place: (len(self._waiting[place]), -place), default=None)

    def _fill_waiting(self) -> None:
        dropped_in_a_row = 0
        while len(self._waiting) < self._lookahead and not self._ended:
            if self._read_document() > 0:
                dropped_in_a_row = 0
                continue
            dropped_in_a_row += 1
            if dropped_in_a_row >= _MAX_DROPPED_IN_A_ROW:
                raise DataError(
                    f"{dropped_in_a_row} documents one after another have no token to learn; a document needs a response or "
                    "a text, check the field names and the supervise option"
                )

    def _read_document(self) -> int:
        """Take one sample, put its pieces into the waiting list and say how many those were."""
        try:
            sample = next(self._stream)
        except StopIteration:
            self._ended = True
            return 0
        document = sample.document
        num_pieces = max(1, -(-len(document) // self._row_length))
        if num_pieces > _MAX_PIECES:
            raise DataError(
                f"document {sample.ordinal} makes {num_pieces} rows of {self._row_length} tokens, more than "
                f"{_MAX_PIECES}; split it or use longer rows"
            )
        self._count(documents=1, split_documents=int(num_pieces > 1))
        num_kept = 0
        for number in range(num_pieces):
            part = slice(number * self._row_length, (number + 1) * self._row_length)
            ordinal = sample.ordinal + number * PIECE_STRIDE
            piece = _Piece(sample.epoch, ordinal, document.tokens[part], document.maskable[part])
            if piece.maskable.any():
                self._waiting.append(piece)
                num_kept += 1
            else:
                self._count(dropped_documents=1, dropped_tokens=len(piece))
        return num_kept

    def _lay_out(self, rows: list[list[_Piece]]) -> PackedRows:
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
