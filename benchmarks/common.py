"""Command-line options, figures with their targets, and result files that all benchmarks share.

`--smoke` is the smallest run that goes through a script; its figures mean nothing. The tests run every script that way.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Container, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import httpx2

RESULTS = Path(__file__).parent / "results"


class Figure(TypedDict):
    """A measured value, what it should be at least or at most, and whether it is; without a target, both are None."""

    value: float
    target: float | None
    met: bool | None


def figure(value: float, target: float | None = None, *, higher_is_better: bool = True) -> Figure:
    """A measured value beside its target: the least that is wanted where higher is better, else the most."""
    met = None if target is None else value >= target if higher_is_better else value <= target
    return {"value": value, "target": target, "met": met}


def print_json(figures: Mapping[str, Figure]) -> None:
    """Print what `--json` prints: one object, a figure by name."""
    print(json.dumps(figures))


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


def answers_at(url: str, statuses: Container[int] = (200,)) -> bool:
    """Whether a server answers at an address, with one of these statuses."""
    try:
        return httpx2.get(url).status_code in statuses
    except httpx2.HTTPError:
        return False


def write_results(path: Path, content: Any) -> None:
    """Write figures as JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")
