"""The short version of `benchmarks/soak.py`: random requests, aborts, priorities and grammars on too little memory."""

from __future__ import annotations

import pytest
from soak import soak


@pytest.mark.parametrize(
    ("count", "seed"), [(60, 1), pytest.param(150, 1, marks=pytest.mark.slow), pytest.param(150, 2, marks=pytest.mark.slow)]
)
def test_random_requests(count: int, seed: int) -> None:
    figures = soak(count, seed)
    assert figures["completed"] + figures["aborted"] == count
    assert figures["preemptions"] > 0, "memory was not scarce: the test has lost its point"
    assert figures["aborted"] > 0
    assert figures["cached_tokens"] > 0
