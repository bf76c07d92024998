"""Files of batches in OpenAI's format: the requests, and the answers.

Owns their formats, the checks, and what a killed job left behind. Knows neither the model nor HTTP.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import DataError
from unmask.files import cut_torn_line, disk_errors, sync_folder
from unmask.serve.batch_usage import BatchUsage

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/infill")
"""Paths that a line may ask."""
ID_PREFIX = "batch_req_"
_BEGINNING = f'{{"id": "{ID_PREFIX}'.encode()
"""Of every line of answers."""


class AnswersBusyError(DataError):
    """Another job is writing the file of answers."""


class BatchLineError(DataError):
    """A line of a batch file is no request.

    Args:
        where: name of the file.
        line: its number, from 1.
        reason: what is wrong with it.
    """

    def __init__(self, where: str, line: int, reason: str) -> None:
        super().__init__(f"{where}, line {line}: {reason}")
        self.line = line


@dataclass(frozen=True)
class BatchLine:
    """A request of a batch file.

    Attributes:
        custom_id: the client's, by which its answer is found.
        url: one of `ENDPOINTS`.
        body: of the request.
    """

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class BatchFile:
    """A batch file that has been checked as a whole.

    Attributes:
        path: of the file.
        ids: every `custom_id`.
        models: the names that bodies give their model.
    """

    path: Path
    ids: frozenset[str]
    models: frozenset[str]

    @classmethod
    def read(cls, path: Path, *, name: str = "", url: str | None = None, max_lines: int | None = None) -> BatchFile:
        """Check a file.

        Args:
            path: of the file.
            name: of the file in errors, if not its path.
            url: that every line asks; None: each one of `ENDPOINTS`.
            max_lines: most requests; None: any number.

        Raises:
            DataError: an unreadable or empty file, or a line that is not a request with a `custom_id` of its own.
        """
        ids: set[str] = set()
        models: set[str] = set()
        where = name or str(path)
        for number, line in _read_lines(path, where):
            if line.custom_id in ids:
                raise BatchLineError(where, number, f"custom_id {line.custom_id!r:.80} is there twice; ids are unique")
            if url is not None and line.url != url:
                raise BatchLineError(where, number, f"url is {line.url}, and the batch's endpoint {url}; one batch has one")
            ids.add(line.custom_id)
            if max_lines is not None and len(ids) > max_lines:
                raise BatchLineError(where, number, f"more than {max_lines} requests; divide the file")
            if isinstance(model := line.body.get("model"), str):
                models.add(model)
        if not ids:
            raise DataError(f"{where} holds no request; a batch file has one a line")
        return cls(path, frozenset(ids), frozenset(models))

    def lines(self) -> Iterator[BatchLine]:
        """The requests, one at a time; raises DataError as `read`."""
        return (line for _, line in _read_lines(self.path, str(self.path)))

    def missing(self, answers: BatchAnswers) -> Iterator[BatchLine]:
        """The requests that have no answer when their turn comes; raises DataError as `read`."""
        return (line for line in self.lines() if line.custom_id not in answers.failed)


def _read_lines(path: Path, where: str) -> Iterator[tuple[int, BatchLine]]:
    """The requests of a file with the numbers of their lines, from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield number, _batch_line(text, where, number)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"cannot read {where}: {reason}") from error


def _batch_line(text: str, where: str, number: int) -> BatchLine:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON ({str(error)[:80]}); a batch file has one request a line"
        raise BatchLineError(where, number, reason) from error
    if not isinstance(values, dict):
        raise BatchLineError(where, number, f"{values!r:.40} is not an object with custom_id, method, url and body")
    custom_id, method, url, body = (values.get(key) for key in ("custom_id", "method", "url", "body"))
    if not isinstance(custom_id, str) or not custom_id:
        raise BatchLineError(where, number, f"custom_id is {custom_id!r:.40}; it must be a text, by which the answer is found")
    if method not in (None, "POST"):
        raise BatchLineError(where, number, f"method is {method!r:.40}; it must be POST")
    if url not in ENDPOINTS:
        raise BatchLineError(where, number, f"url is {url!r:.80}; it must be one of {', '.join(ENDPOINTS)}")
    if not isinstance(body, dict):
        raise BatchLineError(where, number, f"body is {body!r:.40}; it must be an object, the body of a request")
    return BatchLine(custom_id, url, body)


class BatchAnswers:
    """The file of answers: what is there already, and where the next one goes."""

    def __init__(self, path: Path) -> None:
        """Open the file, for this job alone. A torn last line, of a killed run, is cut off, and so are answers whose status is
        a failure of the server (5xx): their requests are asked again.

        Raises:
            DataError: a file that holds something else, or that another job is writing.
            CheckpointError: it cannot be written.
        """
        self._path = path
        self.failed: dict[str, bool] = {}
        """Of every answer by its custom_id, whether it is an error."""
        self.usage = BatchUsage()
        """Of the answers that are none."""
        with disk_errors(path), ExitStack() as stack:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = stack.enter_context(path.open("ab"))
            self._lock()
            lines = cut_torn_line(path, self._check_torn)
            kept = [text for number, text in enumerate(lines, 1) if self._read(text, number)]
            if len(kept) < len(lines):
                self._rewrite(kept)
            stack.pop_all()

    def _lock(self) -> None:
        """For this job alone, of the file that the path names now."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            raise AnswersBusyError(f"another job is writing {self._path}; wait for it, or choose another file") from error

    def _check_torn(self, torn: bytes, number: int) -> None:
        if not (torn.startswith(_BEGINNING) or _BEGINNING.startswith(torn)):
            raise self._foreign(number)

    def _read(self, text: bytes, number: int) -> bool:
        """Whether the answer stands: the server has not failed at it."""
        try:
            record = json.loads(text)
            if stands := bool(record["response"]["status_code"] < 500):
                self._count(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._foreign(number) from error
        return stands

    def _count(self, record: dict[str, Any]) -> None:
        response = record["response"]
        self.failed[record["custom_id"]] = is_error = response["status_code"] != 200
        if not is_error:
            self.usage.add(response["body"])

    def _rewrite(self, lines: list[bytes]) -> None:
        """Replace the file by one of these lines; the lock passes to it before it has the name."""
        temporary = self._path.with_name(f".{self._path.name}.rewritten")
        file = temporary.open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            file.close()
            raise
        sync_folder(self._path.parent)
        self._file.close()
        self._file = file

    def _foreign(self, number: int) -> DataError:
        return DataError(f"{self._path}, line {number}: not an answer of a batch; choose another file")

    def write(self, record: dict[str, Any]) -> None:
        """Append an answer; raises CheckpointError on a full disk."""
        # Half of a surrogate pair, which a request may hold, is written as JSON's escape.
        text = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")
        with disk_errors(self._path):
            self._file.write(text + b"\n")
            self._file.flush()
        self._count(record)

    def close(self) -> None:
        """Write everything to the disk; without any answer, there is no file."""
        with disk_errors(self._path), self._file:
            os.fsync(self._file.fileno())
            if not os.fstat(self._file.fileno()).st_size:
                self._path.unlink(missing_ok=True)


@dataclass(frozen=True)
class BatchCounts:
    """How far a batch is: lines in all, answered, and among these refused or failed."""

    total: int
    done: int
    failed: int

    @classmethod
    def of(cls, requests: BatchFile, answers: BatchAnswers) -> BatchCounts:
        """The counts of a file and its answers."""
        return cls(len(requests.ids), len(answers.failed), sum(answers.failed.values()))
