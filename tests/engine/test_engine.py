"""The engine's public calls: what it refuses, and what an end, an abort or a stream left early leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import refused
from tiny import MASK, VOCAB, request_of, tiny_model
from unmask.engine.engine import Engine, Update
from unmask.engine.reference import generate_reference
from unmask.engine.request import Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.engine.sequences.block_diffusion import BlockDiffusionSequence
from unmask.errors import RequestError

MODEL = tiny_model("llama", 1, torch.float64)
SMALL = ResolvedParams(block_size=4)


@pytest.mark.parametrize("oracle", [False, True], ids=["engine", "oracle"])
@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (Request((1, 2), SMALL.replace(max_new_tokens=0)), ("max_new_tokens", 0)),
        (Request((1, VOCAB), SMALL.replace(max_new_tokens=4)), ("prompt token", VOCAB)),
        (Request((1,) * 125, SMALL.replace(max_new_tokens=4)), ("context", 128)),
    ],
)
def test_requests_are_checked_before_any_forward(request_: Request, names: tuple[object, ...], oracle: bool) -> None:
    engine = Engine(MODEL, mask_id=MASK)
    with refused(RequestError, *names):
        generate_reference(MODEL, request_, MASK) if oracle else engine.add(request_)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("options", "request_", "names"),
    [
        (
            {"max_num_batched_tokens": 7},
            Request((1,), ResolvedParams(block_size=8, max_new_tokens=4)),
            ("block_size", 8, 7),
        ),
        (
            {"max_num_batched_tokens": 7},
            Request((1,), ResolvedParams(block_size=4, edit_threshold=0.5, window=2, max_new_tokens=4)),
            ("block_size", "window", 4, 7),
        ),
        (
            {"num_tokens": 16},
            Request((1,) * 9, SMALL.replace(max_new_tokens=8)),
            ("KV cache", 20, 16),
        ),
        ({}, Request((1,), SMALL.replace(max_new_tokens=8, stop=("x",))), ("stop", "tokenizer", "stop_token_ids")),
    ],
)
def test_what_an_engine_cannot_serve_is_refused(options: dict[str, Any], request_: Request, names: tuple[object, ...]) -> None:
    engine = Engine(MODEL, mask_id=MASK, **{"cache_block_size": 4, **options})
    with refused(RequestError, *names):
        engine.add(request_)
    assert not engine.has_work


@pytest.mark.parametrize("name", ["cache_block_size", "num_tokens", "max_num_seqs", "max_num_batched_tokens"])
def test_engine_options_out_of_range_are_refused(name: str) -> None:
    with refused(RequestError, name, 0):
        Engine(MODEL, mask_id=MASK, **{name: 0})
    with refused(RequestError, "mask token", VOCAB):
        Engine(MODEL, mask_id=VOCAB)


def test_an_abort_frees_cache_blocks_at_once() -> None:
    engine = Engine(MODEL, mask_id=MASK, cache_block_size=4, num_tokens=20)
    first, second, third = (engine.add(request_of(9, 9, start=n)) for n in range(3))
    engine.step()
    assert engine.pool.num_used > 0
    engine.abort(first)
    assert engine.pool.num_used == 0
    engine.pool.check()
    engine.abort(third)  # while it waits
    engine.abort(first)  # twice
    engine.abort(99)  # one that never was
    updates: list[Update] = []
    while engine.has_work:
        updates += engine.step()
    assert {update.number for update in updates} == {second}
    completion = updates[-1].completion
    assert completion is not None
    assert completion.ids == generate_reference(MODEL, request_of(9, 9, start=1), MASK).ids
    engine.abort(second)  # after its end
    assert engine.pool.num_used == 0


def test_a_stream_left_early_aborts() -> None:
    engine = Engine(MODEL, mask_id=MASK, cache_block_size=4, num_tokens=64)
    stream = engine.stream(request_of(5, 20))
    next(stream)
    assert engine.has_work
    stream.close()
    assert not engine.has_work
    assert engine.pool.num_used == 0


def test_other_requests_advance_beside_a_stream_and_lose_nothing() -> None:
    engine = Engine(MODEL, mask_id=MASK, cache_block_size=4, num_tokens=256)
    other = engine.add(request_of(3, 2))
    for update in engine.stream(request_of(5, 12, start=1)):
        assert update.number != other
    updates = []
    while engine.has_work:
        updates += engine.step()
    assert {update.number for update in updates} == {other}
    ids = sum((update.new_ids for update in updates), ())
    assert ids == generate_reference(MODEL, request_of(3, 2), MASK).ids
    assert updates[-1].completion is not None


def test_streams_side_by_side_lose_nothing() -> None:
    """The shorter one ends in a step of the longer one."""
    engine = Engine(MODEL, mask_id=MASK, cache_block_size=4, num_tokens=256)
    requests = request_of(5, 20, start=1), request_of(3, 6)
    long, short = (engine.stream(request) for request in requests)
    updates = [[next(long)], [next(short)]]
    for found, stream in zip(updates, (long, short), strict=True):
        found += stream
    for found, request in zip(updates, requests, strict=True):
        assert found[-1].completion is not None
        assert sum((update.new_ids for update in found), ()) == generate_reference(MODEL, request, MASK).ids
    assert not engine.has_work


def test_an_aborted_stream_ends() -> None:
    engine = Engine(MODEL, mask_id=MASK, cache_block_size=4, num_tokens=64)
    stream = engine.stream(request_of(5, 20))
    engine.abort(next(stream).number)
    assert list(stream) == []


def test_nothing_is_reported_of_a_stream_left_while_another_goes_on() -> None:
    engine = Engine(MODEL, mask_id=MASK, cache_block_size=4, num_tokens=256)
    left, other = (engine.stream(request) for request in (request_of(5, 20, start=1), request_of(3, 20)))
    next(left)
    next(other)
    next(other)
    left.close()
    assert list(other)[-1].completion is not None
    assert not engine.has_work


def test_run_aborts_all_when_one_is_impossible() -> None:
    engine = Engine(MODEL, mask_id=MASK, cache_block_size=4, num_tokens=64)
    with refused(RequestError, "max_new_tokens", 0):
        engine.run([request_of(3, 4), request_of(3, 0)])
    assert not engine.has_work
    assert engine.pool.num_used == 0
    assert engine.step() == []


def test_the_cache_is_no_larger_than_all_that_runs_can_fill() -> None:
    """Or a tiny model would get millions of cache blocks, and every allocation would look through them."""
    engine = Engine(MODEL, mask_id=MASK, cache_block_size=4, max_num_seqs=3)
    assert engine.pool.num_cache_blocks * 4 == 3 * MODEL.config.max_positions
    assert (
        Engine(MODEL, mask_id=MASK, cache_block_size=4, max_num_seqs=1).pool.num_cache_blocks * 4 > MODEL.config.max_positions
    )


def test_a_step_does_nothing_for_requests_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of thousands, only those in the forward are looked at and reported."""
    engine = Engine(MODEL, mask_id=MASK, max_num_seqs=2)
    touched: list[int] = []
    reach = BlockDiffusionSequence.reach.fget
    assert reach is not None

    def counted(sequence: BlockDiffusionSequence) -> int:
        touched.append(sequence.number)
        return int(reach(sequence))

    monkeypatch.setattr(BlockDiffusionSequence, "reach", property(counted))
    for number in range(40):
        engine.add(Request((1, 2 + number), SMALL.replace(max_new_tokens=8)))
    assert {update.number for update in engine.step()} == {0, 1}
    assert max(touched) <= 2
