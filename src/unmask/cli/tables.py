"""Tables on the console in which no number is ever cut.

Owns their layout. Rich takes 80 columns for what is no terminal, and shortens what does not fit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_BORDER = 3
"""Columns that a cell takes besides its text: a space on either side, and a line."""
_LEAST_WIDE, _LEAST_NAME = 24, 8


def print_table(
    console: Console, head: Sequence[str], rows: Sequence[Sequence[str | Text]], *, wide: str | None = None, title: str = ""
) -> None:
    """Print a table; columns that do not fit beside the others go into another one below it.

    Args:
        console: one that is no terminal gets lines as long as they need to be.
        head: names of the columns; their words may stand below one another.
        rows: cells. The first one names its row in every table, and may wrap.
        wide: a column, not the first, that may wrap too.
        title: stands before the table.
    """
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    room = console.width if console.is_terminal else sys.maxsize
    widest = [max((cell.cell_len for cell in column), default=0) for column in zip(*cells, strict=True)]
    widths = [max(width, len(name)) for name, width in zip(head, widest, strict=True)]
    if _total(widths) > room:
        widths = [max(width, *map(len, name.split())) for name, width in zip(head, widest, strict=True)]
    widths[0] = min(widths[0], max(room // 2 - _BORDER, _LEAST_NAME))
    if wide is not None:
        index = head.index(wide)
        others = sum(widths) - widths[index] + _BORDER * len(head) + 1
        widths[index] = min(widths[index], max(room - others, min(_LEAST_WIDE, room - widths[0] - 2 * _BORDER - 1)))
    if title:
        console.print(title, soft_wrap=True)
    for columns in _split(widths, room):
        shown = [Column(head[index], width=widths[index], overflow="fold") for index in columns]
        table = Table(*shown, width=_total(widths[index] for index in columns))
        for row in cells:
            table.add_row(*(row[index] for index in columns))
        console.print(table, crop=False)


def _split(widths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of the columns of each table: the first one, and those that fit beside it, at least one."""
    tables = [[0]]
    for index in range(1, len(widths)):
        if len(tables[-1]) > 1 and _total(widths[each] for each in (*tables[-1], index)) > room:
            tables.append([0])
        tables[-1].append(index)
    return tables


def _total(widths: Iterable[int]) -> int:
    return sum(width + _BORDER for width in widths) + 1
