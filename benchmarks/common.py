"""Command-line options and result files that all benchmarks share.

`--smoke` is the smallest run that goes through a script; its figures mean nothing. The tests run every script that way.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--smoke` and `--results`; `doc` is the script's docstring, shown by `--help`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the smallest run there is; its figures mean nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return parser


def results_path(folder: Path, name: str, suffix: str = ".json") -> Path:
    """`folder`/NAME_DATE.json, the folder being made."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}_{datetime.now(UTC):%Y-%m-%d}{suffix}"


def write_results(path: Path, content: Any) -> None:
    """Write figures as JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")
