"""The line about packing: silent at first and off a terminal, cleared at the end."""

from __future__ import annotations

import io

from helpers import TtyStream
from unmask.cli.packing_line import PackingLine


def shown(stream: io.StringIO, seconds: float) -> list[str]:
    """What is written after each of four parts that take so long."""
    times = iter(seconds * number for number in range(5))
    line, texts = PackingLine(stream, lambda: next(times)), []
    for done in range(1, 5):
        before = len(stream.getvalue())
        line(done, 4)
        texts.append(stream.getvalue()[before:].removeprefix("\r\x1b[K"))
    return texts


def test_a_terminal_sees_parts_and_time_left() -> None:
    texts = shown(TtyStream(), 2.0)
    assert all(f"{done} of 4" in text for done, text in enumerate(texts[:3], start=1))
    assert "4 s left" in texts[1]
    assert texts[3] == ""


def test_nothing_is_written_where_it_takes_no_time_or_nobody_looks() -> None:
    assert shown(TtyStream(), 0.1) == ["", "", "", ""]
    stream = io.StringIO()
    shown(stream, 2.0)
    assert stream.getvalue() == ""
