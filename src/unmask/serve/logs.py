"""One line per event: JSON for machines, or words for people.

Owns the two layouts. What is in a record is decided where it is logged; prompts are not, unless the settings say so.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Literal

LogFormat = Literal["json", "text"]


class JsonLines(logging.Formatter):
    """Every record as one JSON object."""

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


class Words(logging.Formatter):
    """Time, level, message, and the details as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        details = record.__dict__.get("details", {})
        told = " ".join(f"{name}={json.dumps(value, ensure_ascii=False, default=str)}" for name, value in details.items())
        line = f"{when} {record.levelname.lower():<7} {record.getMessage()} {told}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(layout: LogFormat, level: int = logging.INFO) -> None:
    """Send our records and uvicorn's warnings to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if layout == "json" else Words())
    for name, least in (("unmask.serve", level), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
