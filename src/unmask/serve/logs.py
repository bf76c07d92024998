"""Log formats of the server: one JSON object per line, or text.

Owns the two formats. What a record contains is decided where it is logged; prompts only with `ServerConfig.log_prompts`.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["json", "text"]


class JsonLines(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **record.__dict__.get("details", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextLines(logging.Formatter):
    """A record as time, level, message and its details as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        details = record.__dict__.get("details", {})
        pairs = " ".join(f"{name}={json.dumps(value, ensure_ascii=False, default=str)}" for name, value in details.items())
        line = f"{time} {record.levelname.lower():<7} {record.getMessage()} {pairs}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure_logging(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Log the server's records and uvicorn's warnings to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    for name, threshold in (("unmask.serve", level), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(threshold)
