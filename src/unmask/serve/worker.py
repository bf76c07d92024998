"""`Worker`: the engine in a thread of its own, driven from asyncio.

Owns the thread, the bounded queue, timeouts and the shutdown. Knows engine requests and updates only: no HTTP, no text.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from unmask.engine.engine import Engine, Update
from unmask.engine.request import Request
from unmask.engine.scheduler import STEPS_PER_PRIORITY
from unmask.errors import RequestError
from unmask.serve.drain_rate import DrainRate
from unmask.serve.errors import ApiError, bad_request, loading, stopping, timed_out
from unmask.serve.metrics import Metrics
from unmask.serve.vllm_metrics import TokenTimes

_JOIN_SECONDS = 10.0
"""How long a shutdown waits for the current forward, or for a model that is still loading."""
_BACKGROUND_PRIORITY = 2**20
"""Of requests that come after all others."""
_log = logging.getLogger("unmask.serve")
_Command = Callable[[Engine], None]


class AbortedError(Exception):
    """The client has disconnected."""


class EngineFailedError(Exception):
    """A bug ended this request."""


class Submission:
    """The engine requests of one client, and their updates since the client last read them.

    Updates of several steps are merged for a client that reads more slowly than the engine decodes, so that there is at most
    one update per request.
    """

    def __init__(self, worker: Worker, requests: Sequence[Request], *, watch: bool, background: bool) -> None:
        self.requests, self.watch, self.background = list(requests), watch, background
        self.started = time.perf_counter()
        self.times = [TokenTimes(self.started) for _ in self.requests]
        self.unfinished = set(range(len(self.requests)))
        self.first_token_seconds: float | None = None
        self._worker = worker
        self._new: dict[int, Update] = {}
        self._wake = asyncio.Event()
        self._error: Exception | None = None

    async def updates(self) -> AsyncIterator[list[tuple[int, Update]]]:
        """Updates with the index of their request, until all requests have ended.

        Raises:
            ApiError: the submission cannot be finished.
        """
        num_open = len(self.requests)
        while num_open:
            await self._wake.wait()
            self._wake.clear()
            new, self._new = self._new, {}
            num_open -= sum(update.completion is not None for update in new.values())
            if new:
                yield list(new.items())
            if self._error is not None:
                raise self._error

    def abort(self, reason: str) -> None:
        """End without a result and free the cache blocks before the next step; no effect after the end."""
        self._worker.abort(self, reason)

    def take(self, index: int, update: Update) -> None:
        """Store an update (on the event loop)."""
        if update.new_ids and self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self.started
        if update.completion is not None:
            self.unfinished.discard(index)
        unread = self._new.get(index)
        if unread is not None:
            ids, logprobs = unread.new_ids + update.new_ids, unread.new_logprobs + update.new_logprobs
            update = update._replace(new_ids=ids, new_logprobs=logprobs, step=update.step or unread.step)
        self._new[index] = update
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """End the submission with an error (on the event loop)."""
        self.unfinished.clear()
        self._error = error
        self._wake.set()


class Worker:
    """Runs the engine and passes its updates to submissions.

    Every method is called on the event loop's thread; only the worker's own thread uses the engine.

    Args:
        make_engine: called in the thread, and again after the engine has failed.
        max_requests: queued and running requests together; more are refused.
        timeout: seconds of a submission, waiting included.
        metrics: where completions and aborts are counted.
        on_failure: called when no engine can be made; the worker accepts nothing from then on.

    Attributes:
        loop: the event loop on which its methods are called.
        num_updates: updates with tokens that the engine has delivered.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        max_requests: int,
        timeout: float,
        metrics: Metrics,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._make_engine, self._max_requests, self._timeout = make_engine, max_requests, timeout
        self._metrics, self._on_failure = metrics, on_failure
        self.loop = asyncio.get_running_loop()
        self.num_updates = 0
        self._submissions: dict[Submission, asyncio.TimerHandle] = {}
        self._numbers: dict[int, tuple[Submission, int]] = {}
        self._commands: deque[_Command] = deque()
        self._wake = threading.Condition()
        self._stop = False
        self._draining = False
        self._engine: Engine | None = None
        self._drain_rate = DrainRate()
        self._thread = threading.Thread(target=self._run, name="unmask-engine", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """`loading`, `ready` or `stopping`."""
        return "stopping" if self._draining else "loading" if self._engine is None else "ready"

    @property
    def current_engine(self) -> Engine | None:
        """The engine; None while it is being made."""
        return self._engine

    @property
    def engine(self) -> Engine:
        """The engine, for reading sizes and counts.

        Raises:
            ApiError: the model is loading.
        """
        if self._engine is None:
            raise loading()
        return self._engine

    @property
    def num_requests(self) -> int:
        """Queued and running requests."""
        return sum(len(submission.unfinished) for submission in self._submissions)

    @property
    def num_background(self) -> int:
        """Those of batches among them."""
        return sum(len(submission.unfinished) for submission in self._submissions if submission.background)

    @property
    def is_idle(self) -> bool:
        """Nothing to do for the thread: no request in the engine, and no command."""
        return not (self._numbers or self._commands)

    @property
    def is_alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive()

    def check_room(self, count: int = 1) -> None:
        """Check that so many more requests can be accepted.

        Raises:
            ApiError: the queue is full, or the server is not ready.
        """
        self._check_ready()
        num_requests = self.num_requests - self.num_background
        if num_requests + count > self._max_requests:
            wait = self._drain_rate.retry_seconds(count, self.loop.time())
            message = f"{num_requests} requests are queued and running, of at most {self._max_requests}; retry in {wait} s"
            raise ApiError(429, message, code="queue_full", headers={"retry-after": str(wait)})

    def _check_ready(self) -> None:
        """Raises: ApiError: the server is starting or shutting down."""
        if self._draining:
            raise stopping()
        if self._engine is None:
            raise loading()

    def submit(self, requests: Sequence[Request], *, watch: bool = False, background: bool = False) -> Submission:
        """Queue requests of one client.

        Args:
            requests: of one body.
            watch: also deliver what every forward saw.
            background: of a batch: they come after all others, take no place in the queue and do not time out.

        Raises:
            ApiError: the queue is full, the server is not ready, or the engine cannot serve one of them.
        """
        for request in requests:
            try:
                self.engine.check(request)
            except RequestError as error:
                raise bad_request(str(error)) from error
        if len(requests) > self._max_requests:
            raise bad_request(f"{len(requests)} completions requested; this server accepts {self._max_requests} at once", "n")
        if background:
            self._check_ready()
        else:
            self.check_room(len(requests))
        submission = Submission(self, requests, watch=watch, background=background)
        if not self._submissions:
            self._drain_rate.begin(self.loop.time())
        timeout = math.inf if background else self._timeout
        expiry = (submission, timed_out(timeout), "timeout")
        self._submissions[submission] = self.loop.call_later(timeout, self._end, *expiry)
        self._send(lambda engine: self._add(engine, submission))
        return submission

    def abort(self, submission: Submission, reason: str) -> None:
        """End a running submission and free its cache blocks."""
        if submission in self._submissions:
            self._end(submission, AbortedError(reason), reason)

    def drain(self) -> None:
        """Accept no new requests."""
        self._draining = True

    async def close(self, grace: float) -> None:
        """Wait up to `grace` seconds for what runs, fail the rest and end the thread; a second call can shorten the wait."""
        self.drain()
        for submission in [each for each in self._submissions if each.background]:
            self._end(submission, stopping(), "shutdown")  # asked again when the batch goes on
        deadline = time.perf_counter() + grace
        while self._submissions and time.perf_counter() < deadline:
            await asyncio.sleep(0.02)
        for submission in list(self._submissions):
            self._end(submission, stopping(), "shutdown")
        with self._wake:
            self._stop = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join, _JOIN_SECONDS)

    def _end(self, submission: Submission, error: Exception, reason: str) -> None:
        self._metrics.aborts.labels(reason).inc(len(submission.unfinished))
        self._submissions.pop(submission).cancel()
        submission.fail(error)
        self._send(lambda engine: self._remove(engine, submission))

    def _deliver(self, updates: Sequence[tuple[Submission, int, Update]]) -> None:
        """Pass the updates of a step to their submissions (on the event loop)."""
        for submission, index, update in updates:
            if submission not in self._submissions:
                continue
            if update.error is not None:
                self._end(submission, bad_request(str(update.error)), "error")
                continue
            self.num_updates += bool(update.new_ids)
            self._metrics.vllm.observe(submission.requests[index], update, submission.times[index], time.perf_counter())
            submission.take(index, update)
            if update.completion is not None:
                self._metrics.completed(update.completion)
                self._drain_rate.end(self.loop.time())
            if not submission.unfinished:
                self._submissions.pop(submission).cancel()

    def _fail(self, submissions: Iterable[Submission], error: Exception) -> None:
        for submission in submissions:
            if submission in self._submissions:
                self._end(submission, error, "error")

    def _give_up(self, error: BaseException) -> None:
        self.drain()
        self._fail(list(self._submissions), EngineFailedError())
        self._on_failure(error)

    def _send(self, command: _Command) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    # The methods below run in the engine's thread.

    def _run(self) -> None:
        while not self._stop:
            try:
                engine = self._engine = self._make_engine()
            except BaseException as error:  # a panic in a Rust library is no Exception
                self._call(self._give_up, error)
                return
            try:
                while self._turn(engine):
                    pass
            except BaseException:  # likewise
                # A bug: running requests fail, requests still to be added start with an empty cache.
                _log.exception("the engine failed; starting a new one")
                # Free its memory before the next engine allocates as much.
                self._engine = None
                del engine
                running = {submission for submission, _ in self._numbers.values()}
                self._numbers.clear()
                self._call(self._fail, running, EngineFailedError())

    def _turn(self, engine: Engine) -> bool:
        with self._wake:
            while not (self._commands or engine.has_work or self._stop):
                self._wake.wait()
        while self._commands:
            self._commands.popleft()(engine)
        if engine.has_work and not self._stop:
            updates = [(*self._numbers[update.number], update) for update in engine.step()]
            for _, _, update in updates:
                if update.completion is not None or update.error is not None:
                    del self._numbers[update.number]
            visible = [each for each in updates if each[2].new_ids or each[2].step or each[2].completion or each[2].error]
            if visible:
                self._call(self._deliver, visible)
        return not self._stop

    def _add(self, engine: Engine, submission: Submission) -> None:
        for index, request in enumerate(submission.requests):
            # Requests beyond what can run together queue as if they arrived when those before them end, so that another
            # client's requests need not wait for all of them.
            wave = index // engine.scheduler.max_num_seqs
            priority = request.priority + _BACKGROUND_PRIORITY * submission.background
            priority += wave * (1 + request.num_wanted // STEPS_PER_PRIORITY)
            try:
                self._numbers[engine.add(replace(request, priority=priority), watch=submission.watch)] = (submission, index)
            except RequestError as error:
                self._call(self._fail, [submission], bad_request(str(error)))
                return
            except Exception:
                _log.exception("a request could not be added")
                self._call(self._fail, [submission], EngineFailedError())
                return

    def _remove(self, engine: Engine, submission: Submission) -> None:
        for number in [number for number, (owner, _) in self._numbers.items() if owner is submission]:
            engine.abort(number)
            del self._numbers[number]

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        # After a forced shutdown the loop may be closed already.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(function, *arguments)
