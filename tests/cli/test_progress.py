"""Progress of a conversion, by a clock that the test moves."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from helpers import TtyStream, assert_names
from unmask.cli.progress import PLAIN_INTERVAL, Pace, counting, describe_validation, duration, showing_progress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def record(tokens: int, **changes: Any) -> dict[str, Any]:
    """A training record of a step of 100 tokens in two seconds."""
    return {
        "kind": "train", "step": tokens // 100, "tokens": tokens, "phase": "warmup", "block_size": 4, "loss": 3.25,
        "tokens_per_second": 50.0, "tokens_per_second_per_device": 50.0, "seconds": 2.0, **changes,
    }  # fmt: skip


VALIDATION = {"kind": "validation", "step": 7, "tokens": 700, "phase": "stable", "block_size": None, "nelbo": 1.5}


def test_pace_counts_what_happens_between_steps() -> None:
    clock = Clock()
    pace = Pace(1000, clock)
    assert pace.update(record(100)) == (pytest.approx(50), pytest.approx(18))
    clock.now += 8
    assert pace.update(record(200)) == (pytest.approx(20), pytest.approx(40))


def test_pace_of_a_resumed_run_starts_where_it_was() -> None:
    assert Pace(10_000, Clock()).update(record(9_000)) == (pytest.approx(50), pytest.approx(20))


def test_pace_forgets_the_distant_past() -> None:
    clock = Clock()
    pace = Pace(100_000, clock)
    for step in range(1, 200):
        clock.now += 2 if step < 100 else 1
        rate, _ = pace.update(record(100 * step))
    assert rate == pytest.approx(100)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (7325, "2:02:05")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_validation_line() -> None:
    assert_names(describe_validation(VALIDATION), "step 7", "NELBO 1.500", "stable", "whole sequence")


def _follow(file: io.StringIO, clock: Clock, act: Callable[[Callable[[dict[str, Any]], None]], None], **options: Any) -> str:
    with showing_progress(Console(file=file, width=100, **options), 1000, clock=clock) as on_record:
        act(on_record)
    return file.getvalue()


def test_plain_lines_are_far_between() -> None:
    clock = Clock()

    def act(on_record: Callable[[dict[str, Any]], None]) -> None:
        for tokens in range(100, 1001, 100):
            clock.now += PLAIN_INTERVAL / 4
            on_record(record(tokens))
            if tokens == 200:
                on_record(VALIDATION)

    lines = _follow(io.StringIO(), clock, act).splitlines()
    counted = [line.split()[0] for line in lines if "of 1,000 tokens" in line]
    assert counted == ["100", "500", "900", "1,000"], "the first, one every interval, the last"
    assert_names(lines[0], "100 of 1,000 tokens", "warmup", "block 4", "loss 3.250", "50 tokens/s", "0:18")
    assert lines[1] == describe_validation(VALIDATION)


def test_utilisation_is_shown_where_it_is_known() -> None:
    written = _follow(io.StringIO(), Clock(), lambda on_record: on_record(record(100, mfu=0.447)))
    assert_names(written, "50 tokens/s, MFU 45%")


def test_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")

    def act(on_record: Callable[[dict[str, Any]], None]) -> None:
        on_record(record(500))
        on_record(VALIDATION)

    written = _follow(TtyStream(), Clock(), act, force_terminal=True)
    assert "50%" in written
    assert "warmup, block 4" in written
    assert "loss 3.250, 50 tokens/s, 0:10 left" in written
    assert "validation NELBO 1.500" in written


def test_counting_outside_of_a_terminal_says_from_time_to_time_how_long_it_takes() -> None:
    clock, stream = Clock(), io.StringIO()
    with counting(Console(file=stream, width=200), "packing", clock=clock) as on_progress:
        on_progress(500, 1500)  # a resumed job
        clock.now += 1
        on_progress(520, 1500)
        assert stream.getvalue() == ""
        clock.now += PLAIN_INTERVAL
        on_progress(1000, 1500)
        assert_names(stream.getvalue(), "packing", "1,000", "1,500", duration(11))
        on_progress(1100, None)
    assert len(stream.getvalue().splitlines()) == 1
