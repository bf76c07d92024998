"""The request's limits and where a completion ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from helpers import refused
from tiny import MASK, VOCAB, tiny_config
from unmask.engine.request import Completion, Request, distinct_samples, finish
from unmask.engine.sampling_params import ResolvedParams
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
    request = Request((9, 8), ResolvedParams(max_new_tokens=budget), frozenset(eos))
    assert finish(generated, request, 7) == Completion(ids, reason, 7)  # type: ignore[arg-type]


def test_holes_count_towards_the_budget() -> None:
    request = Request((9, None, None, 8), ResolvedParams(max_new_tokens=1), frozenset([7]))
    assert request.num_wanted == 3
    assert finish([1, 2, 3, 4], request, 5) == Completion((1, 2, 3), "length", 5)
    assert finish([1, 2, 7, 4], request, 5) == Completion((1, 2, 7), "stop", 5)


def test_equal_requests_are_numbered_on() -> None:
    first, other, seeded = (
        Request((1, None)),
        Request((2, None)),
        Request((1, None), ResolvedParams(seed=3)),
    )
    numbered = distinct_samples([first, other, first, seeded, replace(first, trace=True)])
    assert [each.sample for each in numbered] == [0, 0, 1, 0, 2]
    assert numbered[4].trace


def test_seed_and_prompt_key_the_noise() -> None:
    requests = [Request(ids, ResolvedParams(seed=seed)) for ids in ((), (1,), (11,), (1, 1), (1, None)) for seed in (0, 1, -1)]
    assert len({request.noise_seed for request in requests}) == len(requests)
    assert requests[3].noise_seed == Request((1,), ResolvedParams(temperature=1.0)).noise_seed
    assert all(-(2**63) <= request.noise_seed < 2**63 for request in requests)


@pytest.mark.parametrize(("length", "budget", "size", "canvas"), [(0, 1, 4, 4), (4, 4, 4, 8), (5, 4, 4, 12), (3, 5, 1, 8)])
def test_the_canvas_is_whole_blocks_from_position_0(length: int, budget: int, size: int, canvas: int) -> None:
    assert Request((1,) * length, ResolvedParams(block_size=size, max_new_tokens=budget)).canvas_length == canvas


def test_a_request_that_just_fits_is_served() -> None:
    for request in (
        Request((0, VOCAB - 1) * 6, ResolvedParams(max_new_tokens=4, min_new_tokens=4)),
        Request((), ResolvedParams(max_new_tokens=16, logit_bias={0: 1.0, MASK: 2.0}, logprobs=20), frozenset([3])),
        Request((1, None), ResolvedParams(max_new_tokens=0, logprobs=0)),
    ):
        assert request.check(CONFIG) is None


@pytest.mark.parametrize(
    ("ids", "budget", "options", "names"),
    [
        ((1,), 0, {}, ("max_new_tokens", 0, 1)),
        ((1, VOCAB, 99), 1, {}, ("prompt token", VOCAB, VOCAB - 1)),
        ((-1, None), 1, {}, ("prompt token", -1, VOCAB - 1)),
        (
            (1,) * 12,
            5,
            {},
            (12, 5, "context", 16, "max_new_tokens"),
        ),
        ((1,), 3, {"logit_bias": {VOCAB: 1.0}}, ("logit_bias token", VOCAB, VOCAB - 1)),
    ],
)
def test_a_request_that_cannot_be_served_says_why(
    ids: tuple[int | None, ...], budget: int, options: dict[str, Any], names: tuple[object, ...]
) -> None:
    with refused(RequestError, *names):
        Request(ids, ResolvedParams(max_new_tokens=budget, **options)).check(CONFIG)
