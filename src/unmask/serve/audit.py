"""`AuditLog`: who asked what and when, a JSON line for every request, without any text of prompts or answers.

Owns the file and its fields. A file that is renamed, as logrotate does, is followed by a new one.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from starlette.types import Scope

from unmask.errors import ConfigError

_DETAILS = ("model", "prompt_tokens", "completion_tokens")


class AuditLog:
    """The audit log of one server.

    Args:
        path: appended to; readable by its owner only where it is new.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            self._handler = WatchedFileHandler(path, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write audit_log {path}: {error.strerror or error}; choose another file") from error

    def write(self, scope: Scope, route: str, status: int, seconds: float) -> None:
        """The line of a request that has ended."""
        address = scope.get("client")
        details: dict[str, Any] = scope["unmask.details"]
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": scope["unmask.id"],
            "key": scope["unmask.client"].name or None,
            "address": address[0] if address else None,
            "method": scope["method"],
            "route": route,
            "background": scope["unmask.background"],
            **{name: details.get(name) for name in _DETAILS},
            "status": status,
            "seconds": round(seconds, 4),
        }
        line = json.dumps(entry)
        self._handler.handle(logging.LogRecord("unmask.audit", logging.INFO, "", 0, line, None, None))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()
