"""When refused clients are told to come back."""

from __future__ import annotations

from unmask.serve.drain_rate import MAX_RETRY_SECONDS, DrainRate


def draining(interval: float, *, start: float = 0.0) -> DrainRate:
    rate = DrainRate()
    rate.begin(start)
    for index in range(200):
        rate.end(start + (index + 1) * interval)
    return rate


def test_refused_requests_come_back_at_the_measured_rate() -> None:
    rate = draining(0.1)
    waits = [rate.retry_seconds(1, 20.0) for _ in range(100)]
    assert waits[0] == 1
    assert waits == sorted(waits)
    assert waits[-1] in (10, 11)


def test_several_requests_need_more_room() -> None:
    assert draining(2.0).retry_seconds(4, 400.0) == 8
    assert draining(2.0).retry_seconds(1000, 400.0) == MAX_RETRY_SECONDS


def test_promises_are_kept_in_time() -> None:
    rate = draining(1.0)
    assert [rate.retry_seconds(5, 200.0), rate.retry_seconds(1, 203.0), rate.retry_seconds(1, 300.0)] == [5, 3, 1]


def test_idle_time_does_not_count() -> None:
    rate = draining(0.5)
    rate.begin(10_000.0)
    rate.end(10_000.5)
    assert rate.retry_seconds(10, 10_000.5) in (5, 6)
