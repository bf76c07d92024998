"""Progress of long jobs: a bar in a terminal; elsewhere, for training runs, a line from time to time.

Owns how metric records are shown. Knows their keys and nothing of training.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from unmask.cli.console import is_live

MetricRecord = dict[str, Any]
PLAIN_INTERVAL = 10.0
_WINDOW = 20


class Pace:
    """Tokens per second over the last steps, by the clock: evaluations and checkpoints count."""

    def __init__(self, total: int, clock: Callable[[], float]) -> None:
        self._total, self._clock = total, clock
        self._seen: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def update(self, record: MetricRecord) -> tuple[float, float]:
        """Take in a training record; returns (tokens per second, seconds left)."""
        # The clock starts before the first step: what it took is in its record.
        if not self._seen:
            num_tokens = round(record["tokens_per_second"] * record["seconds"])
            self._seen.append((self._clock() - record["seconds"], record["tokens"] - num_tokens))
        self._seen.append((self._clock(), record["tokens"]))
        (start, first), (now, last) = self._seen[0], self._seen[-1]
        rate = (last - first) / max(now - start, 1e-9)
        return rate, max(0, self._total - last) / max(rate, 1e-9)


@contextmanager
def showing_progress(
    console: Console, total: int, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[MetricRecord], None]]:
    """A function to call with every metric record of a run of `total` tokens."""
    pace, live, next_line = Pace(total, clock), is_live(console), -math.inf
    with Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(), TextColumn("{task.fields[figures]}"),
        console=console, disable=not live,
    ) as progress:  # fmt: skip
        task = progress.add_task("loading model and data", total=None, figures="")

        def on_record(record: MetricRecord) -> None:
            nonlocal next_line
            if record["kind"] == "validation":
                console.print(Text(describe_validation(record), style="dim"), soft_wrap=True)
                return
            rate, left = pace.update(record)
            done, phase = record["tokens"], describe_phase(record)
            each = record["tokens_per_second_per_device"] / record["tokens_per_second"]
            share = f" ({rate * each:,.0f} per device)" if each < 1 else ""
            share += f", MFU {record['mfu']:.0%}" if "mfu" in record else ""
            figures = f"loss {record['loss']:.3f}, {rate:,.0f} tokens/s{share}, {duration(left)} left"
            progress.update(task, description=phase, total=total, completed=min(done, total), figures=figures)
            if not live and (clock() >= next_line or done >= total):
                next_line = clock() + PLAIN_INTERVAL
                console.print(f"{done:,} of {total:,} tokens: {phase}, {figures}", soft_wrap=True)

        yield on_record


@contextmanager
def counting(
    console: Console, what: str, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int, int | None], None]]:
    """A function to call with (done, total or None) of a job called `what`: a bar, or without a terminal a line at times."""
    live = is_live(console)
    started = last_line = clock()
    before: int | None = None  # a resumed job does not begin at 0
    with Progress(console=console, disable=not live) as progress:
        task = progress.add_task(what, total=None)

        def on_progress(done: int, total: int | None) -> None:
            nonlocal before, last_line
            before = done if before is None else before
            progress.update(task, completed=done, total=total)
            if not live and clock() >= last_line + PLAIN_INTERVAL:
                last_line = clock()
                left = "" if total is None else f" of {total:,}, {_left(done - before, total - done, last_line - started)} left"
                console.print(f"{what}: {done:,}{left}", soft_wrap=True)

        yield on_progress


def _left(done: int, remaining: int, seconds: float) -> str:
    return duration(seconds / max(done, 1) * max(remaining, 0))


def describe_validation(record: MetricRecord) -> str:
    """A validation record as one line."""
    return f"step {record['step']}: validation NELBO {record['nelbo']:.3f} nats per token at {describe_phase(record)}"


def describe_phase(record: MetricRecord) -> str:
    """Phase and block size in words."""
    size = record["block_size"]
    return f"{record['phase']}, {'whole sequence' if size is None else f'block {size}'}"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
