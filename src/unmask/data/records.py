"""Records in files: text, JSON lines and Parquet, read by number.

Owns finding and reading files, and the location of errors. Knows neither tokenizer nor order.
"""

from __future__ import annotations

import glob
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from unmask.errors import DataError, located

Record = Mapping[str, Any]


class Records(Protocol):
    """Records that can be read in any order."""

    def __len__(self) -> int:
        """Number of records."""

    def read(self, number: int) -> Record:
        """Record `number`, from 0."""

    def where(self, number: int) -> str:
        """Its location, for messages."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that hold them, in the order of the records."""


def find_files(path: str, suffix: str) -> list[Path]:
    """The files of a path, sorted: the file itself, all with a suffix below a folder, or all that match a pattern.

    Raises:
        DataError: no such file.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        matches = list(root.rglob(f"*{suffix}"))
        error = f"folder {path} holds no {suffix} file; name the files or another folder"
    else:
        matches = [Path(match) for match in glob.iglob(str(root), recursive=True)]
        error = f"{path} is no file, folder or pattern that matches a file; check the path"
    files = sorted(file for file in matches if file.is_file())
    if not files:
        raise DataError(error)
    return files


class TextRecords:
    """Text files, one record each; empty ones are skipped."""

    def __init__(self, path: str, text_field: str) -> None:
        """Find the files; raises DataError when there is none with text in it."""
        self.files = [file for file in find_files(path, ".txt") if file.stat().st_size > 0]
        self._text_field = text_field
        _require_some(len(self.files), path)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> Record:
        """The text of one file; raises DataError when it is not UTF-8."""
        file = self.files[number]
        try:
            return {self._text_field: file.read_bytes().decode("utf-8-sig")}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: cannot be read as UTF-8 text ({error}); convert or remove it") from error

    def where(self, number: int) -> str:
        """The file."""
        return str(self.files[number])


class JsonLinesRecords:
    """Files with one JSON object a line; blank lines are skipped.

    Every line is checked when the files are opened, so that a bad one stops a run before it starts; only the offsets of the
    lines stay in memory.
    """

    def __init__(self, path: str, check: Callable[[Record], None]) -> None:
        """Index the files.

        Args:
            path: a file, folder or pattern.
            check: raises DataError, without a location, for a record that cannot be used.

        Raises:
            DataError: no record, or a line that is not a JSON object or does not pass `check`.
        """
        self.files = find_files(path, ".jsonl")
        self._file_of, self._line_of, self._offset_of = array("q"), array("q"), array("q")
        for file_number, file in enumerate(self.files):
            self._index(file_number, file, check)
        _require_some(len(self), path)

    def __len__(self) -> int:
        return len(self._offset_of)

    def read(self, number: int) -> Record:
        """One line; raises DataError when the file has changed and it can no longer be read."""
        with located(self.where(number)):
            try:
                with self.files[self._file_of[number]].open("rb") as stream:
                    stream.seek(self._offset_of[number])
                    return _json_object(stream.readline())
            except OSError as error:
                raise DataError(f"cannot be read ({error}); put the file back") from error

    def where(self, number: int) -> str:
        """The file and the line, from 1."""
        return f"{self.files[self._file_of[number]]} line {self._line_of[number]}"

    def _index(self, file_number: int, file: Path, check: Callable[[Record], None]) -> None:
        offset = 0
        try:
            with file.open("rb") as stream:
                for line_number, line in enumerate(stream, start=1):
                    if line.strip():
                        with located(f"{file} line {line_number}"):
                            check(_json_object(line))
                        self._file_of.append(file_number)
                        self._line_of.append(line_number)
                        self._offset_of.append(offset)
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error}); check its permissions") from error


class ParquetRecords:
    """Parquet files, whose selected columns are held in memory as Arrow tables.

    Files that do not fit into memory can be read with the streaming `huggingface` source.
    """

    def __init__(self, path: str, columns: Sequence[str], check: Callable[[Record], None]) -> None:
        """Load the columns.

        Args:
            path: a file, folder or pattern.
            columns: names of the columns to read, of which a file needs at least one.
            check: raises DataError, without a location, for a record with the wrong fields; called once per file.

        Raises:
            DataError: no record, no Parquet, or none of the columns.
        """
        self._tables: list[tuple[int, Path, Any]] = []  # number of the first record, file, Arrow table
        self._length = 0
        for file in find_files(path, ".parquet"):
            table = _read_table(file, columns)
            if table.num_rows == 0:
                continue
            self._tables.append((self._length, file, table))
            self._length += table.num_rows
            with located(str(file)):
                check(self.read(self._tables[-1][0]))
        _require_some(self._length, path)

    @property
    def files(self) -> list[Path]:
        """The files."""
        return [file for _, file, _ in self._tables]

    def __len__(self) -> int:
        return self._length

    def read(self, number: int) -> Record:
        """One row."""
        _, table, row = self._locate(number)
        record: Record = table.slice(row, 1).to_pylist()[0]
        return record

    def where(self, number: int) -> str:
        """The file and the row, from 1."""
        file, _, row = self._locate(number)
        return f"{file} row {row + 1}"

    def _locate(self, number: int) -> tuple[Path, Any, int]:
        start, file, table = next(entry for entry in reversed(self._tables) if entry[0] <= number)
        return file, table, number - start


def _read_table(file: Path, columns: Sequence[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(file).names
        selected = [name for name in columns if name in names]
        if not selected:
            raise DataError(f"{file}: no column {', '.join(columns)}; the columns there are: {', '.join(names)}")
        return pq.read_table(file, columns=selected)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: cannot be read as Parquet ({reason}); check the file") from error


def _json_object(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON value ({error}); write one JSON object a line") from error
    if not isinstance(record, dict):
        raise DataError(f"{type(record).__name__} instead of a JSON object; write one object a line")
    return record


def _require_some(count: int, path: str) -> None:
    if count == 0:
        raise DataError(f"{path} holds 0 records; give data with at least one")
