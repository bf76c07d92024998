"""Tables: whatever the width, every number is there, whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from unmask.cli.tables import print_table

HEAD = ("task", "metric", "score", "items", "tokens per forward", "tokens/s")
ROWS = [
    (
        f"suite/task-{number}",
        "exact match",
        f"{number}1.5 ± 10.25",
        f"1{number} of 1319",
        f"{number}.125",
        f"{number}23 (99-157)",
    )
    for number in range(1, 6)
]
NUMBERS = [cell for row in ROWS for cell in row[2:]]


def printed(width: int | None, **options: str) -> str:
    """The table in a terminal of this width; None: in a pipe."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, color_system=None)
    print_table(console, HEAD, ROWS, **options)
    return file.getvalue()


@pytest.mark.parametrize("width", [None, 200, 80, 60, 40, 24])
def test_no_number_is_cut_or_folded(width: int | None) -> None:
    text = printed(width)
    assert [number for number in NUMBERS if number not in text] == []
    assert "…" not in text
    if width is not None and width >= 40:
        assert max(map(len, text.splitlines())) <= width


def test_columns_that_do_not_fit_stand_below_with_the_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [printed(width).count("suite/task-3") for width in (120, 60)] == [1, 2]
    monkeypatch.setenv("COLUMNS", "40")
    in_a_pipe = printed(None, title="A title as long as it needs to be, beyond the forty columns that a pipe does not have")
    assert in_a_pipe.count("suite/task-3") == 1
    assert in_a_pipe.startswith("A title as long as it needs to be, beyond the forty columns that a pipe does not have\n")


@pytest.mark.parametrize("width", [None, 70, 30])
def test_only_a_wide_column_wraps(width: int | None) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, color_system=None)
    about = "a reason that takes some more words than there is room for in one line of a terminal"
    print_table(console, ("benchmark", "score", "why"), [("MMLU", "12.345", about)], wide="why")
    assert "12.345" in file.getvalue()
    assert (about in file.getvalue()) == (width is None)
    assert set(about.split()) <= set(file.getvalue().replace("│", " ").split())
