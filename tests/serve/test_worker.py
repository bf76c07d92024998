"""The worker: its bound, its deadlines, its way down, and what it does when the engine breaks."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from unmask.engine.engine import Update
from unmask.engine.request import Completion, DecodingStep, Request, TokenLogprob
from unmask.engine.sampling_params import ResolvedParams
from unmask.errors import RequestError
from unmask.serve.errors import ApiError
from unmask.serve.metrics import Metrics
from unmask.serve.worker import AbortedError, EngineFailedError, Submission, Worker

DONE = Completion((1,), "stop", 1)
ORDINARY = Request((1, 2), ResolvedParams(max_new_tokens=8))


class Panic(BaseException):
    """What a library written in Rust raises when it panics."""


class Scripted:
    """An engine that does what the test says. It steps only when `go` is released, one step each."""

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(max_num_seqs=2)
        self.go = threading.Semaphore(0)
        self.log: list[str] = []
        self.added: dict[int, Request] = {}
        self.active: list[int] = []
        self.script: deque[tuple[Update, ...]] = deque()
        self.error: BaseException | None = None
        self.num_begun = 0

    @property
    def has_work(self) -> bool:
        return bool(self.active)

    def check(self, request: Request) -> None:
        if request.params.max_new_tokens > 100:
            raise RequestError("too many")

    def add(self, request: Request, *, watch: bool = False) -> int:
        if request.params.max_new_tokens == 77:
            raise RequestError("cannot be added")
        if request.params.max_new_tokens == 66:
            raise ValueError("a bug while adding")
        number = len(self.added)
        self.added[number] = request
        self.active.append(number)
        self.log.append(f"add {number}")
        return number

    def step(self) -> list[Update]:
        self.num_begun += 1
        assert self.go.acquire(timeout=20)
        self.log.append("step")
        if self.error is not None:
            raise self.error
        updates = self.script.popleft() if self.script else ()
        news = [each for each in updates if each.number in self.active]
        self.active = [n for n in self.active if not any(u.number == n and (u.completion or u.error) for u in news)]
        return news

    def abort(self, number: int) -> None:
        self.log.append(f"abort {number}")
        if number in self.active:
            self.active.remove(number)

    def give(self, *updates: Update) -> None:
        """The step that is under way, or the next, gives these."""
        self.script.append(updates)
        self.go.release()

    async def serves(self, count: int) -> None:
        """Until a step is under way and so many requests have been added."""
        await until(lambda: self.num_begun)
        while len(self.added) < count:
            begun = self.num_begun
            self.give()
            await until(lambda begun=begun: self.num_begun > begun)


class Scene:
    """A worker over scripted engines."""

    def __init__(self, max_requests: int, timeout: float, engines: Sequence[Scripted | BaseException]) -> None:
        self.made: list[Scripted] = []
        self.failures: list[BaseException] = []
        self.metrics = Metrics("tiny")
        self.engines = list(engines)
        self.worker = Worker(
            self.make,
            max_requests=max_requests,
            timeout=timeout,
            metrics=self.metrics,
            on_failure=self.failures.append,
        )

    def make(self) -> Any:
        engine = self.engines.pop(0)
        if isinstance(engine, BaseException):
            raise engine
        self.made.append(engine)
        return engine

    def aborts(self, reason: str) -> float:
        return self.metrics.registry.get_sample_value("unmask_aborts_total", {"reason": reason}) or 0.0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def scene(
    *engines: Scripted | BaseException, max_requests: int = 8, timeout: float = 60.0, ready: bool = True
) -> AsyncIterator[Scene]:
    made = Scene(max_requests, timeout, engines)
    if ready:
        await until(lambda: made.worker.state == "ready")
    try:
        yield made
    finally:
        for engine in made.made:
            engine.go.release(1000)
        await made.worker.close(0.0)
        assert not made.worker.is_alive
        assert not made.worker.num_requests


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def update(number: int, *ids: int, completion: Completion | None = None, step: DecodingStep | None = None) -> Update:
    logprobs = tuple(TokenLogprob(token, -1.0) for token in ids)
    return Update(number, ids, step, completion, None, logprobs)


def step_of(tokens: tuple[int | None, ...]) -> DecodingStep:
    return DecodingStep(0, (False,), tokens, tokens, (0.5,), (True,), (False,), 1)


async def everything(submission: Submission) -> list[tuple[int, Update]]:
    return [entry async for updates in submission.updates() for entry in updates]


def test_a_slow_reader_gets_several_steps_as_one_in_order() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            submission = s.worker.submit([ORDINARY, ORDINARY])
            early, late = step_of((1,)), step_of((2,))
            engine.give(update(0, 1, 2, step=early), update(1, 9))
            await until(lambda: submission.first_token_seconds is not None)
            engine.give(update(0, 3, step=late))
            engine.give(update(0, 4), update(1, 8, completion=DONE))
            await until(lambda: submission.unfinished == {0})
            batches = submission.updates()
            first = dict(await anext(batches))
            assert first[0].new_ids == (1, 2, 3, 4)
            assert [each.token for each in first[0].new_logprobs] == [1, 2, 3, 4]
            assert first[0].step is late
            assert first[1].new_ids == (9, 8)
            assert first[1].completion is DONE
            engine.give(update(0, 5, completion=DONE))
            assert [(i, update.new_ids) for i, update in await anext(batches)] == [(0, (5,))]
            with pytest.raises(StopAsyncIteration):
                await anext(batches)
            assert s.worker.num_requests == 0

    run(test)


def test_abort_frees_cache_blocks_before_the_next_step_and_other_submissions_go_on() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            gone, stays = s.worker.submit([ORDINARY]), s.worker.submit([ORDINARY])
            await engine.serves(2)
            before = len(engine.log)
            gone.abort("disconnect")
            gone.abort("disconnect")
            assert s.worker.num_requests == 1
            engine.give(update(0, 1), update(1, 1))
            engine.give(update(1, 2, completion=DONE))
            assert [update.new_ids for _, update in await everything(stays)][-1][-1] == 2
            with pytest.raises(AbortedError):
                await everything(gone)
            assert engine.log[before : before + 2] == ["step", "abort 0"]
            assert s.aborts("disconnect") == 1

    run(test)


def test_a_submission_aborted_before_its_add_ran_leaves_nothing_behind() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            first = s.worker.submit([ORDINARY])
            await engine.serves(1)
            submission = s.worker.submit([ORDINARY, ORDINARY])
            submission.abort("disconnect")
            engine.give(update(0, 1, completion=DONE))
            assert len(await everything(first)) == 1
            await until(lambda: "abort 2" in engine.log)
            assert "abort 1" in engine.log
            assert "abort 0" not in engine.log
            assert not engine.has_work
            await until(lambda: s.worker.is_idle)

    run(test)


def test_updates_of_an_aborted_submission_are_not_delivered() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            submission = s.worker.submit([ORDINARY])
            await engine.serves(1)
            engine.give(update(0, 1, completion=DONE))
            while not s.worker.is_idle:
                time.sleep(0.002)  # The loop must not run: what the step gave is on its way to it.
            submission.abort("disconnect")
            with pytest.raises(AbortedError):
                await everything(submission)
            await asyncio.sleep(0.01)
            assert not s.metrics.registry.get_sample_value("unmask_completions_total", {"finish_reason": "stop"})

    run(test)


def test_the_bound_counts_completions_not_submissions() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine, max_requests=3) as s:
            submission = s.worker.submit([ORDINARY] * 2)
            with pytest.raises(ApiError) as refused:
                s.worker.submit([ORDINARY] * 2)
            assert refused.value.status == 429
            assert refused.value.code == "queue_full"
            assert 1 <= int(refused.value.headers["retry-after"]) <= 60
            last = s.worker.submit([ORDINARY])
            assert s.worker.num_requests == 3
            with pytest.raises(ApiError) as full:
                s.worker.check_room()
            assert full.value.status == 429
            submission.abort("disconnect")
            s.worker.check_room(2)
            last.abort("disconnect")

    run(test)


def test_a_400_takes_no_room() -> None:
    async def test() -> None:
        async with scene(Scripted(), max_requests=2) as s:
            with pytest.raises(ApiError, match="too many") as refused:
                s.worker.submit([ORDINARY, Request((1,), ResolvedParams(max_new_tokens=101))])
            assert refused.value.status == 400
            with pytest.raises(ApiError, match="completions") as refused:
                s.worker.submit([ORDINARY] * 3)
            assert refused.value.status == 400
            assert s.worker.num_requests == 0
            assert s.worker.is_idle

    run(test)


@pytest.mark.parametrize(("size", "status"), [(77, 400), (66, None)])
def test_one_that_cannot_be_added_fails_alone(size: int, status: int | None) -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            other = s.worker.submit([ORDINARY])
            await engine.serves(1)
            submission = s.worker.submit([ORDINARY, Request((1,), ResolvedParams(max_new_tokens=size))])
            engine.give()
            with pytest.raises(EngineFailedError if status is None else ApiError) as failed:
                await everything(submission)
            assert getattr(failed.value, "status", None) == status
            await until(lambda: engine.active == [0] or engine.give())
            engine.give(update(0, 1, completion=DONE))
            assert [update.completion for _, update in await everything(other)] == [DONE]

    run(test)


def test_a_request_that_cannot_go_on_fails_its_submission_alone() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            submission, other = s.worker.submit([ORDINARY] * 2), s.worker.submit([ORDINARY])
            await engine.serves(3)
            engine.give(update(1, 4), Update(0, (), None, None, RequestError("a dead end")))
            with pytest.raises(ApiError, match="a dead end") as failed:
                await everything(submission)
            assert failed.value.status == 400
            engine.give(update(2, 1, completion=DONE))
            assert len(await everything(other)) == 1

    run(test)


def test_a_deadline_ends_a_submission_with_504() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine, timeout=0.05) as s:
            submission = s.worker.submit([ORDINARY])
            with pytest.raises(ApiError, match="timeout") as late:
                await everything(submission)
            assert (late.value.status, late.value.headers["x-should-retry"]) == (504, "false")
            assert s.worker.num_requests == 0
            engine.give()
            await until(lambda: "abort 0" in engine.log)
            assert s.aborts("timeout") == 1

    run(test)


@pytest.mark.parametrize("error", [ValueError("a bug"), Panic("a panic")])
def test_a_crash_fails_those_served_and_the_next_engine_serves_those_still_to_be_added(error: BaseException) -> None:
    async def test() -> None:
        broken, fresh = Scripted(), Scripted()
        broken.error = error
        async with scene(broken, fresh) as s:
            submission = s.worker.submit([ORDINARY, ORDINARY])
            await broken.serves(2)
            waiting = s.worker.submit([ORDINARY])
            broken.go.release()
            with pytest.raises(EngineFailedError):
                await everything(submission)
            fresh.give(update(0, 7, completion=DONE))
            assert [update.new_ids for _, update in await everything(waiting)] == [(7,)]
            assert s.worker.state == "ready"
            assert s.worker.engine is fresh
            await until(lambda: s.worker.is_idle)
            assert not any(line.startswith("abort") for line in fresh.log), "the numbers of the broken one mean nothing to it"
            assert s.failures == []

    run(test)


def test_the_broken_engine_is_gone_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pytest keeps what is logged, and with it the traceback and all in it.
    monkeypatch.setattr(logging.getLogger("unmask.serve"), "disabled", True)

    async def test() -> None:
        broken, gone = Scripted(), []
        broken.error = ValueError("a bug")
        broken.go.release()
        known = weakref.ref(broken)
        made = [broken]
        del broken

        def make() -> Any:
            if made:
                return made.pop()
            gc.collect()
            gone.append(known() is None)
            return Scripted()

        worker = Worker(make, max_requests=1, timeout=60, metrics=Metrics("tiny"), on_failure=lambda error: None)
        await until(lambda: worker.state == "ready")
        with pytest.raises(EngineFailedError):
            await everything(worker.submit([ORDINARY]))
        await until(lambda: gone)
        assert gone == [True]
        await worker.close(0.0)

    run(test)


@pytest.mark.parametrize("error", [ValueError("no memory"), Panic("a panic")])
def test_an_engine_that_cannot_be_made_ends_all_submissions(error: BaseException) -> None:
    async def test() -> None:
        broken = Scripted()
        broken.error = ValueError("a bug")
        async with scene(broken, error) as s:
            submission = s.worker.submit([ORDINARY])
            await broken.serves(1)
            waiting = s.worker.submit([ORDINARY])
            broken.go.release()
            for each in (submission, waiting):
                with pytest.raises(EngineFailedError):
                    await everything(each)
            assert s.failures == [error]
            assert s.worker.state == "stopping"
            with pytest.raises(ApiError) as refused:
                s.worker.submit([ORDINARY])
            assert refused.value.status == 503

    run(test)


def test_a_worker_that_is_not_ready_says_503_and_when_to_come_back() -> None:
    async def test() -> None:
        gate = threading.Event()

        def make() -> Any:
            assert gate.wait(20)
            return Scripted()

        worker = Worker(make, max_requests=1, timeout=60, metrics=Metrics("tiny"), on_failure=lambda error: None)
        assert worker.state == "loading"
        for ask in (lambda: worker.submit([ORDINARY]), worker.check_room, lambda: worker.engine):
            with pytest.raises(ApiError, match="loading") as refused:
                ask()
            assert (refused.value.status, refused.value.headers["retry-after"]) == (503, "2")
        gate.set()
        await until(lambda: worker.state == "ready")
        worker.drain()
        assert worker.state == "stopping"
        with pytest.raises(ApiError, match="shutting down") as refused:
            worker.submit([ORDINARY])
        assert refused.value.status == 503
        await worker.close(0.0)
        assert not worker.is_alive

    run(test)


def test_closing_lets_what_runs_finish_within_the_grace() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            submission = s.worker.submit([ORDINARY])
            closing = asyncio.create_task(s.worker.close(20.0))
            await until(lambda: s.worker.state == "stopping")
            engine.give(update(0, 3, completion=DONE))
            assert [update.new_ids for _, update in await everything(submission)] == [(3,)]
            await closing
            assert not s.worker.is_alive

    run(test)


def test_closing_again_cuts_the_grace_short() -> None:
    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            submission = s.worker.submit([ORDINARY])
            closing = asyncio.create_task(s.worker.close(1000.0))
            await until(lambda: s.worker.state == "stopping")
            engine.go.release()
            await s.worker.close(0.0)
            with pytest.raises(ApiError, match="shutting down") as failed:
                await everything(submission)
            assert failed.value.status == 503
            await closing
            assert s.aborts("shutdown") == 1

    run(test)


def test_more_than_run_together_make_room_for_others() -> None:
    """The third and later of one submission wait as if they had come when those before them must have ended."""

    async def test() -> None:
        engine = Scripted()
        async with scene(engine) as s:
            submission = s.worker.submit([Request((1,), ResolvedParams(max_new_tokens=70))] * 5)
            await engine.serves(1)
            first, second, third, fourth, fifth = (engine.added[i].priority for i in range(5))
            assert first == second < third == fourth < fifth
            submission.abort("disconnect")
            engine.give()

    run(test)
