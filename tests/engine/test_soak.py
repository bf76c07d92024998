"""The short version of `benchmarks/soak.py`: random requests, aborts, priorities and grammars on too little memory."""

from __future__ import annotations

import pytest
from soak import soak


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_few_hundred_random_requests(seed: int) -> None:
    figures = soak(150, seed)
    assert figures["completed"] + figures["aborted"] == 150
    assert figures["preemptions"] > 0, "memory was not scarce: the test has lost its point"
    assert figures["aborted"] > 0
    assert figures["cached_tokens"] > 0
