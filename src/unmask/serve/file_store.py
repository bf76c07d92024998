"""`FileStore`: uploaded files and batches of one folder, and who owns them.

Owns the folder: `content/` has the files, `answers/` what batches have answered so far, `state.sqlite3` the rest. Several
processes may use it. Every question names the owner, so that nobody sees another's. Knows no HTTP.
"""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from unmask.errors import ConfigError
from unmask.serve.batch_usage import BatchUsage

MAX_OPEN_BATCHES = 64
"""Of one owner, not ended."""
OPEN_STATUSES = ("validating", "in_progress", "finalizing", "cancelling")
_ABANDONED_SECONDS = 24 * 3600.0
_UPLOADING = ".uploading-"
_BATCH = {
    **{"id": "", "object": "batch", "endpoint": "", "model": None, "errors": None, "input_file_id": ""},
    **{"completion_window": "24h", "status": "validating", "output_file_id": None, "error_file_id": None, "created_at": 0},
    **dict.fromkeys(("in_progress_at", "expires_at", "finalizing_at", "completed_at", "failed_at", "expired_at")),
    **{"cancelling_at": None, "cancelled_at": None, "request_counts": {"total": 0, "completed": 0, "failed": 0}},
    **{"usage": BatchUsage().to_json(), "metadata": None},
}
"""OpenAI's object, with what a field has until it is set."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, purpose TEXT NOT NULL,
  bytes INTEGER NOT NULL, expires_at INTEGER, object TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batches (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, owner TEXT NOT NULL, status TEXT NOT NULL,
  object TEXT NOT NULL, private TEXT NOT NULL);
"""


class StoredPage(NamedTuple):
    """Part of a list, newest first unless asked otherwise, and whether there is more."""

    objects: list[dict[str, Any]]
    has_more: bool


class OpenBatch(NamedTuple):
    """A batch that has not ended: OpenAI's object, its owner, and what only the server knows."""

    object: dict[str, Any]
    owner: str
    private: dict[str, Any]


class FileStore:
    """The files and batches of a folder.

    Args:
        folder: made if it is not there.
        max_bytes: of all files together.

    Raises:
        ConfigError: the folder cannot be written, or holds something else.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes, self._arriving = folder, max_bytes, 0
        try:
            for each in (self._folder / "content", self._folder / "answers"):
                each.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._database = sqlite3.connect(
                folder / "state.sqlite3", isolation_level=None, timeout=10.0, check_same_thread=False
            )
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_SCHEMA)
            self._remove_abandoned()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"files {folder} cannot be used: {error}; choose another folder") from error

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _remove_abandoned(self) -> None:
        """Uploads that a killed process has begun."""
        for path in (self._folder / "content").glob(f"{_UPLOADING}*"):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)

    # Files

    @property
    def room(self) -> int:
        """Bytes that further files may have, those that arrive now left out."""
        self._forget_expired()
        stored = int(self._one("SELECT coalesce(sum(bytes), 0) FROM files")[0])
        return self._max_bytes - stored - self._arriving

    @contextmanager
    def arriving(self, num_bytes: int) -> Iterator[Path]:
        """Where a file of at most so many bytes is written before it is added; removed at the end, unless it was."""
        path = self._folder / "content" / f"{_UPLOADING}{secrets.token_hex(12)}"
        self._arriving += num_bytes
        try:
            yield path
        finally:
            self._arriving -= num_bytes
            path.unlink(missing_ok=True)

    def add_file(
        self, owner: str, path: Path, filename: str, purpose: str, *, seconds: int | None = None, id_: str = ""
    ) -> dict[str, Any]:
        """Take a file into the folder.

        Args:
            owner: whose it is.
            path: of the folder; moved.
            filename: the client's.
            purpose: OpenAI's.
            seconds: after which it is forgotten; None: never.
            id_: if it has one; a file that has it is replaced.
        """
        id_, size, now = id_ or f"file-{secrets.token_hex(12)}", path.stat().st_size, int(time.time())
        expires_at = None if seconds is None else now + seconds
        about = {"id": id_, "object": "file", "bytes": size, "created_at": now, "expires_at": expires_at, "filename": filename}
        stored = {**about, "purpose": purpose, "status": "processed", "status_details": None}
        os.replace(path, self.content(id_))
        self._database.execute(
            "INSERT OR REPLACE INTO files (id, owner, purpose, bytes, expires_at, object) VALUES (?, ?, ?, ?, ?, ?)",
            (id_, owner, purpose, size, expires_at, json.dumps(stored)),
        )
        return stored

    def file(self, owner: str, id_: str) -> dict[str, Any] | None:
        """The file of this id; None: unknown, or another's."""
        self._forget_expired()
        row = self._one("SELECT object FROM files WHERE id = ? AND owner = ?", id_, owner)
        return None if row is None else json.loads(row[0])

    def content(self, id_: str) -> Path:
        """Where the content of a file is, whose id is known to be one."""
        return self._folder / "content" / id_

    def delete_file(self, id_: str) -> None:
        """Forget a file."""
        self._database.execute("DELETE FROM files WHERE id = ?", (id_,))
        self.content(id_).unlink(missing_ok=True)

    def files(self, owner: str, *, purpose: str | None, after: str | None, limit: int, ascending: bool) -> StoredPage | None:
        """A part of an owner's files; None: `after` is not one of them."""
        self._forget_expired()
        condition, values = ("", ()) if purpose is None else ("AND purpose = ?", (purpose,))
        return self._page("files", owner, after, limit, ascending=ascending, condition=condition, values=values)

    def _forget_expired(self) -> None:
        used = "SELECT json_extract(object, '$.input_file_id') FROM batches WHERE status IN ('validating', 'in_progress')"
        for (id_,) in self._all(f"SELECT id FROM files WHERE expires_at < ? AND id NOT IN ({used})", time.time()):
            self.delete_file(id_)

    # Batches

    def add_batch(self, owner: str, fields: Mapping[str, Any], private: Mapping[str, Any]) -> dict[str, Any]:
        """A new batch, to be validated; raises nothing."""
        batch = {**_BATCH, **fields, "id": f"batch_{secrets.token_hex(12)}", "created_at": int(time.time())}
        self._database.execute(
            "INSERT INTO batches (id, owner, status, object, private) VALUES (?, ?, ?, ?, ?)",
            (batch["id"], owner, batch["status"], json.dumps(batch), json.dumps(private)),
        )
        return batch

    def batch(self, owner: str, id_: str) -> dict[str, Any] | None:
        """The batch of this id; None: unknown, or another's."""
        row = self._one("SELECT object FROM batches WHERE id = ? AND owner = ?", id_, owner)
        return None if row is None else json.loads(row[0])

    def batches(self, owner: str, *, after: str | None, limit: int) -> StoredPage | None:
        """A part of an owner's batches; None: `after` is not one of them."""
        return self._page("batches", owner, after, limit)

    def num_open(self, owner: str) -> int:
        """Batches of an owner that have not ended."""
        return int(self._one(f"SELECT count(*) FROM batches WHERE owner = ? AND {_OPEN}", owner)[0])

    def open_batches(self) -> list[OpenBatch]:
        """All that have not ended, the oldest first."""
        rows = self._all(f"SELECT object, owner, private FROM batches WHERE {_OPEN} ORDER BY number")
        return [OpenBatch(json.loads(batch), owner, json.loads(private)) for batch, owner, private in rows]

    def using(self, file_id: str) -> str | None:
        """A batch that has not ended and asks the requests of this file."""
        row = self._one(
            f"SELECT id FROM batches WHERE json_extract(object, '$.input_file_id') = ? AND {_OPEN} LIMIT 1", file_id
        )
        return None if row is None else str(row[0])

    def status(self, id_: str) -> str:
        """Of a batch that is there."""
        return str(self._one("SELECT status FROM batches WHERE id = ?", id_)[0])

    def change_batch(self, id_: str, fields: Mapping[str, Any], *, statuses: Sequence[str] = OPEN_STATUSES) -> bool:
        """Set fields of a batch, if its status is one of these; whether it was."""
        # In one statement: another process may change other fields.
        found = self._database.execute(
            "UPDATE batches SET object = json_patch(object, ?), status = coalesce(?, status) "
            f"WHERE id = ? AND status IN ({', '.join('?' * len(statuses))})",
            (json.dumps(fields), fields.get("status"), id_, *statuses),
        )
        return found.rowcount > 0

    def answers(self, id_: str) -> Path:
        """The file of a batch's answers so far."""
        return self._folder / "answers" / f"{id_}.jsonl"

    def _page(
        self,
        table: str,
        owner: str,
        after: str | None,
        limit: int,
        *,
        ascending: bool = False,
        condition: str = "",
        values: Sequence[Any] = (),
    ) -> StoredPage | None:
        start = ""
        if after is not None:
            row = self._one(f"SELECT number FROM {table} WHERE id = ? AND owner = ?", after, owner)
            if row is None:
                return None
            start = f"AND number {'>' if ascending else '<'} {int(row[0])}"
        rows = self._all(
            f"SELECT object FROM {table} WHERE owner = ? {start} {condition} "
            f"ORDER BY number {'ASC' if ascending else 'DESC'} LIMIT ?",
            *(owner, *values, limit + 1),
        )
        return StoredPage([json.loads(text) for (text,) in rows[:limit]], len(rows) > limit)

    def _all(self, query: str, *values: Any) -> list[Any]:
        with closing(self._database.execute(query, values)) as cursor:
            return cursor.fetchall()

    def _one(self, query: str, *values: Any) -> Any:
        with closing(self._database.execute(query, values)) as cursor:
            return cursor.fetchone()


_OPEN = f"status IN ({', '.join(repr(status) for status in OPEN_STATUSES)})"
