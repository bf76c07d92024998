"""The request's limits and where a completion ends."""

from __future__ import annotations

import pytest

from tiny import VOCAB, tiny_config
from unmask.engine.completion import Completion, Prompt, finish
from unmask.errors import RequestError

CONFIG = tiny_config("llama", max_positions=16)


@pytest.mark.parametrize(
    ("generated", "budget", "eos", "ids", "reason"),
    [
        ([1, 2, 3], 3, (), (1, 2, 3), "length"),
        ([1, 2, 3, 4], 2, (), (1, 2), "length"),
        ([1, 9, 3, 9], 4, (9,), (1, 9), "stop"),
        ([1, 8, 9], 3, (9, 8), (1, 8), "stop"),
        ([1, 2, 9], 3, (9,), (1, 2, 9), "stop"),
        ([1, 2, 9], 2, (9,), (1, 2), "length"),
        ([9], 5, (9,), (9,), "stop"),
    ],
)
def test_a_completion_ends_at_the_first_end_within_the_budget(
    generated: list[int], budget: int, eos: tuple[int, ...], ids: tuple[int, ...], reason: str
) -> None:
    prompt = Prompt((9, 8), budget, frozenset(eos))
    assert finish(generated, prompt, 7) == Completion(ids, reason, 7)  # type: ignore[arg-type]


def test_a_request_that_just_fits_is_served() -> None:
    assert Prompt((0, VOCAB - 1) * 6, 4, frozenset()).check(CONFIG) is None
    assert Prompt((), 16, frozenset([3])).check(CONFIG) is None


@pytest.mark.parametrize(
    ("ids", "budget", "message"),
    [
        ((1,), 0, "max_new_tokens is 0; it must be at least 1"),
        ((1,), -3, "max_new_tokens is -3; it must be at least 1"),
        ((1, VOCAB, 99), 1, f"prompt token {VOCAB} is outside the vocabulary (0..{VOCAB - 1})"),
        ((-1,), 1, f"prompt token -1 is outside the vocabulary (0..{VOCAB - 1})"),
        (
            (1,) * 12,
            5,
            "prompt of 12 tokens plus 5 new ones exceeds the context of 16; shorten the prompt or lower --max-new-tokens",
        ),
    ],
)
def test_a_request_that_cannot_be_served_says_why(ids: tuple[int, ...], budget: int, message: str) -> None:
    with pytest.raises(RequestError) as error:
        Prompt(ids, budget, frozenset()).check(CONFIG)
    assert str(error.value) == message
