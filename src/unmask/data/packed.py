"""Packed rows on disk: Arrow IPC files that are memory-mapped, with a manifest; a row costs nothing until it is read.

Owns the layout of the folder, and reading rows of it in any order. Who packs, and with which settings, is not known here.

A folder holds `rows-00000.arrow`, ... and, where documents are held out, `validation.arrow`; `manifest.json` appears last. A
record of a file is a row: `tokens` and `maskable` of its whole length, and `lengths`, `epochs` and `ordinals` of the documents
in it, which make up segments, positions and the keys of the noise.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.data.documents import State
from unmask.data.hashing import seeded_permutation
from unmask.data.indexed import REMEDY
from unmask.data.packing import PackedRows, PackingStats, Segment, lay_out
from unmask.errors import CheckpointError, DataError
from unmask.files import read_json

MANIFEST, VALIDATION = "manifest.json", "validation.arrow"
KIND, VERSION = "unmask packed rows", 1
BATCH_ROWS = 256
"""Rows of a record batch: all batches of a file but the last have as many, so a row's place is known."""


@dataclass(frozen=True)
class PackedFile:
    """One file of rows: its name, what it holds, and the digest of its bytes."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`.

    Attributes:
        settings: what decided the rows, by name: tokenizer (its identity), row_length, pad_id, sources, ...
        files: of training rows, in their order.
        validation: the file of held-out rows; None: there are none.
        group_size: rows that belong together (2: a chosen and a rejected answer).
        epochs, ordinals: bounds of these numbers in the rows: a second pass over the rows counts on from there.
        stats: of the packer.
    """

    settings: Mapping[str, Any]
    files: tuple[PackedFile, ...]
    validation: PackedFile | None
    group_size: int
    epochs: int
    ordinals: int
    stats: PackingStats

    def as_json(self) -> dict[str, Any]:
        """The content of the file."""
        return {"kind": KIND, "version": VERSION, **asdict(self)}

    @property
    def num_rows(self) -> int:
        """Training rows."""
        return sum(file.rows for file in self.files)

    @cached_property
    def identity(self) -> str:
        """A digest of settings and rows."""
        content = [dict(self.settings), *(file.sha256 for file in self.files)]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_packed(folder: Path) -> bool:
    """Whether a folder holds packed rows, complete or not."""
    return (folder / MANIFEST).is_file() or (folder / "rows-00000.arrow").is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder of packed rows, whose files are there in full.

    Raises:
        DataError: it is not complete, of another version, or a file has changed its size.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} holds no {MANIFEST}: it was never packed to the end; go on with unmask pack --resume")
    try:
        values = read_json(folder / MANIFEST)
        if (values.pop("kind", None), version := values.pop("version", None)) != (KIND, VERSION):
            raise DataError(f"{folder / MANIFEST} has version {version}; this one reads {VERSION}: pack the data again")
        values["files"] = tuple(PackedFile(**file) for file in values["files"])
        values["validation"] = None if values["validation"] is None else PackedFile(**values["validation"])
        manifest = Manifest(**{**values, "stats": PackingStats(**values["stats"])})
    except (CheckpointError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} cannot be read ({error}); pack the data again") from error
    for file in (*manifest.files, *([] if manifest.validation is None else [manifest.validation])):
        path = folder / file.name
        size = path.stat().st_size if path.is_file() else 0
        if size != file.bytes:
            raise DataError(f"{path} has {size:,} bytes, {file.bytes:,} when it was packed; copy it again or pack again")
    return manifest


def arrow_schema(row_length: int) -> Any:
    """The columns of a file."""
    import pyarrow as pa

    return pa.schema(
        {
            "tokens": pa.list_(pa.int32(), row_length),
            "maskable": pa.list_(pa.bool_(), row_length),
            "lengths": pa.list_(pa.int32()),
            "epochs": pa.list_(pa.int32()),
            "ordinals": pa.list_(pa.int64()),
        }
    )


def record_batch(rows: Sequence[Sequence[Segment]], row_length: int, *, pad_id: int) -> Any:
    """Rows as Arrow columns."""
    import pyarrow as pa

    tokens: NDArray[np.int32] = np.full((len(rows), row_length), pad_id, dtype=np.int32)
    maskable: NDArray[np.bool_] = np.zeros((len(rows), row_length), dtype=np.bool_)
    for number, row in enumerate(rows):
        end = sum(map(len, row))
        tokens[number, :end] = np.concatenate([segment.tokens for segment in row])
        maskable[number, :end] = np.concatenate([segment.maskable for segment in row])
    schema = arrow_schema(row_length)
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), row_length),
        pa.FixedSizeListArray.from_arrays(pa.array(maskable.reshape(-1)), row_length),
        pa.array([[len(segment) for segment in row] for row in rows], schema.field("lengths").type),
        pa.array([[segment.epoch for segment in row] for row in rows], schema.field("epochs").type),
        pa.array([[segment.ordinal for segment in row] for row in rows], schema.field("ordinals").type),
    ]
    return pa.record_batch(columns, schema=schema)


class RowFile:
    """The rows of one file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is not a complete Arrow file ({error}); copy it again or pack again") from error

    def num_tokens(self, number: int) -> int:
        """Document tokens of a row; the tokens themselves are not read."""
        return int(self._row(number).column("lengths").flatten().to_numpy().sum())

    def row(self, number: int) -> list[Segment]:
        """The documents of a row, in its order."""
        record = self._row(number)
        tokens = record.column("tokens").flatten().to_numpy()
        maskable = record.column("maskable").flatten().to_numpy(zero_copy_only=False)
        spans = zip(*(record.column(name).flatten().to_pylist() for name in ("lengths", "epochs", "ordinals")), strict=True)
        segments, start = [], 0
        for length, epoch, ordinal in spans:
            part = slice(start, start + length)
            segments.append(Segment(epoch, ordinal, tokens[part], maskable[part]))
            start += length
        return segments

    def _row(self, number: int) -> Any:
        batch, row = divmod(number, BATCH_ROWS)
        return self._reader.get_batch(batch).slice(row, 1)


class PackedFolder:
    """Rows of a packed folder in the order of training, pass after pass; only the rows that are asked for are read.

    The first pass has the order in which the rows were packed, so that a run sees what it would have seen without packing;
    later ones are shuffled by (seed, pass), and their documents have other epochs and ordinals, so fresh noise.
    """

    def __init__(self, folder: Path, *, seed: int, shuffle: bool = True) -> None:
        """Open a folder.

        Args:
            folder: of packed rows, complete.
            seed: of the orders of later passes.
            shuffle: False: every pass has the order of the first.

        Raises:
            DataError: as of `read_manifest`.
        """
        self.folder, self.manifest = folder, read_manifest(folder)
        self._seed, self._shuffle = seed, shuffle
        self._row_length, self._pad_id = int(self.manifest.settings["row_length"]), int(self.manifest.settings["pad_id"])
        self._ends = list(accumulate(file.rows for file in self.manifest.files))
        self._files: dict[str, RowFile] = {}
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._cursor = 0
        self.stats, self.batch_tokens = PackingStats(), 0

    @property
    def group_size(self) -> int:
        """Rows that belong together."""
        return self.manifest.group_size

    def next_rows(self, num_rows: int, part: slice = slice(None)) -> PackedRows:
        """Rows `part` of the next batch of `num_rows`; of the others only the lengths of their documents are read."""
        places = [self._place(self._cursor + number) for number in range(num_rows)]
        self._cursor += num_rows
        lengths = [self._file(file).num_tokens(row) for _, file, row in places]
        self.batch_tokens = sum(lengths)
        rows = [self._read(*place) for place in places[part]]
        before = self.stats
        self.stats = replace(
            before,
            rows=before.rows + num_rows,
            packed_tokens=before.packed_tokens + self.batch_tokens,
            padded_tokens=before.padded_tokens + num_rows * self._row_length - self.batch_tokens,
        )
        return lay_out(rows, self._row_length, pad_id=self._pad_id)

    def validation_rows(self, num_rows: int) -> PackedRows | None:
        """The first held-out rows, all there are at most; None: there are none."""
        file = self.manifest.validation
        if file is None:
            return None
        rows = [self._file(file.name).row(number) for number in range(min(num_rows, file.rows))]
        return lay_out(rows, self._row_length, pad_id=self._pad_id)

    def state_dict(self) -> State:
        """Rows read so far, and what the rows are."""
        return {"identity": self.manifest.identity, "cursor": self._cursor, "stats": asdict(self.stats)}

    def load_state_dict(self, state: State) -> None:
        """Continue where `state` was taken; raises DataError when it belongs to other rows."""
        if state.get("identity") != self.manifest.identity:
            raise DataError(f"the rows in {self.folder} are not those of the saved run; {REMEDY}")
        self._cursor, self.stats = int(state["cursor"]), PackingStats(**state["stats"])

    def _place(self, number: int) -> tuple[int, str, int]:
        """The pass that row `number` of all passes belongs to, its file, and its number there."""
        turn, at = divmod(number, self.manifest.num_rows)
        if turn and self._shuffle:
            group, member = divmod(at, self.group_size)
            at = int(self._order(turn)[group]) * self.group_size + member
        index = bisect_right(self._ends, at)
        file = self.manifest.files[index]
        return turn, file.name, at - self._ends[index] + file.rows

    def _order(self, turn: int) -> NDArray[np.int64]:
        if turn not in self._orders:
            self._orders = {turn: seeded_permutation(self.manifest.num_rows // self.group_size, self._seed, turn)}
        return self._orders[turn]

    def _read(self, turn: int, file: str, row: int) -> list[Segment]:
        segments = self._file(file).row(row)
        if turn == 0:
            return segments
        return [
            replace(
                segment,
                epoch=segment.epoch + turn * self.manifest.epochs,
                ordinal=segment.ordinal + turn * self.manifest.ordinals,
            )
            for segment in segments
        ]

    def _file(self, name: str) -> RowFile:
        if name not in self._files:
            self._files[name] = RowFile(self.folder / name)
        return self._files[name]
