"""The roll call: which ranks are gone or have failed, from the point of view of one that lives."""

from __future__ import annotations

from threading import Thread, Timer

import torch.distributed as dist

from unmask.errors import DataError, LostRanksError
from unmask.train.parallel.faults import RollCall

GLOO = RuntimeError("[/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234")


def roll_calls(size: int) -> list[RollCall]:
    store = dist.HashStore()
    return [RollCall(store, rank, size, 1.0) for rank in range(size)]


def test_a_rank_that_says_nothing_is_named() -> None:
    first, _, third = roll_calls(3)
    found: list[LostRanksError | None] = []
    waiting = Thread(target=lambda: found.append(third.explain(GLOO)))
    waiting.start()
    found.append(first.explain(GLOO))
    waiting.join()
    for error in found:
        assert "rank 1" in str(error)
        assert "process" in str(error)
        assert "rank 0" not in str(error)
        assert "rank 2" not in str(error)


def test_ranks_that_report_one_after_the_other_are_not_named() -> None:
    store = dist.HashStore()
    calls = [RollCall(store, rank, 4, 3.0) for rank in range(4)]
    late = [Timer(0.4 * rank, calls[rank].explain, (GLOO,)) for rank in (1, 2)]
    for timer in late:
        timer.start()
    error = str(calls[0].explain(GLOO))
    for timer in late:
        timer.join()
    assert "rank 3" in error
    assert "rank 1" not in error
    assert "rank 2" not in error


def test_a_rank_that_failed_is_named_with_its_error() -> None:
    first, second = roll_calls(2)
    assert second.explain(DataError("data.jsonl, line 3: no text")) is None
    error = first.explain(GLOO)
    assert error is not None
    assert "rank 1" in str(error)
    assert "data.jsonl, line 3" in str(error)


def test_an_error_of_this_rank_stays_as_it_is() -> None:
    (only,) = roll_calls(1)
    assert only.explain(RuntimeError("shapes cannot be multiplied")) is None
