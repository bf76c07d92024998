"""The engine: requests in, tokens out, many at a time.

Owns the loop and the public calls `add`, `step`, `stream`, `run`, `abort`. What it decides is in `scheduler` (which
sequences), in `sequences` (which tokens) and in `runner` (how they are computed).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from unmask.data.detokenizer import Decode
from unmask.engine.backends.base import Backend
from unmask.engine.backends.torch import TorchBackend
from unmask.engine.draft_statistics import DraftStatistics
from unmask.engine.drafting import DraftPlanner
from unmask.engine.kv_cache import BlockPool, CacheEvent
from unmask.engine.request import Completion, DecodingStep, Request, TokenLogprob
from unmask.engine.runner import Runner
from unmask.engine.scheduler import Scheduler
from unmask.engine.sequences.base import DecodingSequence, ScheduledSequence
from unmask.engine.sequences.block_diffusion import BlockDiffusionSequence
from unmask.engine.sequences.constrained import ConstrainedSequence
from unmask.engine.sequences.scoring import BlockScoringSequence, CausalScoringSequence, ScoringSequence
from unmask.engine.sequences.speculative import SpeculativeSequence
from unmask.errors import RequestError
from unmask.models.arch.transformer import Transformer
from unmask.models.dtypes import dtype_name
from unmask.models.weights.room import RESERVE, Memory, available_memory, check_fits, kv_cache_bytes

DEFAULT_CACHE_BLOCK_SIZE = 32
_KV_CACHE_BYTES = 2**30
_RETAINED_BYTES = 2**25
"""Of the KV cache on a CPU: what prefixes that no request uses may take of memory, unless requests have needed more."""


class Update(NamedTuple):
    """What a step did for one request: ids that are final now, what it saw, and the completion when it has ended.

    `error` is set instead when the request cannot go on (a grammar that has led into a dead end); the others do.
    `new_logprobs` are those of `new_ids` where the request asked for them, else empty. `prompt_logprobs` are those of the
    prompt where the request asked for them, from the first update with anything else on.
    """

    number: int
    new_ids: tuple[int, ...]
    step: DecodingStep | None
    completion: Completion | None
    error: RequestError | None = None
    new_logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


class Engine:
    """Serves many requests through one KV cache. Not thread-safe: one caller at a time.

    A request's tokens do not depend on what else is served, on what is cached, or on whether it was interrupted: float
    rounding aside (a matrix product may round differently in another batch), its steps are those of a request
    served alone.

    Args:
        model: a transformer, or a backend that computes one.
        mask_id: the mask token; default: the model's. A model without one decodes autoregressively.
        decode: text of ids (`Tokenizer.decode`), for stop strings and the texts of completions.
        cache_block_size: tokens in a block of the KV cache; default: the model's block size.
        num_tokens: tokens that the cache holds; default: what fits 1 GiB, but at least one full context and no more than
            `max_num_seqs` of them. On a CPU, memory is taken as it is used, and by default the prefixes that no request uses
            are kept in 32 MiB, or as much as requests have used at a time. By default no more than fits into memory; a number
            that does not is refused.
        max_num_seqs: most requests denoised together.
        max_num_batched_tokens: most tokens of a forward. Longer prompts are prefilled in parts, and so are shorter ones that
            would keep others waiting.
        prefix_cache: share the cache of equal beginnings, also with requests that have ended.
        drafting: costs of forwards and acceptance of drafts, by which the numbers of draft tokens are chosen; default: learnt
            by this engine alone. They decide the speed, and no text.
        on_cache_events: called after every step that has changed what the prefix cache holds.
    """

    def __init__(
        self,
        model: Transformer | Backend,
        *,
        mask_id: int | None = None,
        decode: Decode | None = None,
        cache_block_size: int | None = None,
        num_tokens: int | None = None,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        prefix_cache: bool = True,
        drafting: DraftStatistics | None = None,
        on_cache_events: Callable[[Sequence[CacheEvent]], object] | None = None,
    ) -> None:
        backend = TorchBackend(model) if isinstance(model, Transformer) else model
        self.config = backend.config
        self.mask_id = self.config.mask_id if mask_id is None else mask_id
        if self.mask_id is not None and not 0 <= self.mask_id < self.config.vocab_size:
            raise RequestError(f"mask token {self.mask_id} is outside the vocabulary (0..{self.config.vocab_size - 1})")
        size = cache_block_size if cache_block_size is not None else self.config.block_size or DEFAULT_CACHE_BLOCK_SIZE
        num_retained, memory = None, available_memory(backend.device)
        per_token = kv_cache_bytes(self.config, backend.dtype, 1)
        if num_tokens is None:
            num_tokens = self._default_tokens(memory, per_token, max_num_seqs)
            if backend.device.type == "cpu":
                num_retained = _RETAINED_BYTES // (per_token * max(size, 1))
        for name, value in (
            ("cache_block_size", size),
            ("num_tokens", num_tokens),
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
        ):
            if value < 1:
                raise RequestError(f"{name} is {value}; it must be at least 1")
        _check_room(num_tokens, per_token, memory, backend.dtype)
        num_cache_blocks = -(-num_tokens // size)
        self.cache_block_size, self._decode = size, decode
        self.pool = BlockPool(num_cache_blocks, num_retained, record_events=on_cache_events is not None)
        self._on_cache_events = on_cache_events
        self._drafting = DraftStatistics(backend.kernels) if drafting is None else drafting
        self._planner = DraftPlanner(self._drafting.costs)
        self.scheduler = Scheduler(
            self.pool,
            size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefill_chunk=backend.prefill_chunk,
            prefix_cache=prefix_cache,
            plan_drafts=self._plan_drafts,
        )
        self.runner = Runner(backend, num_cache_blocks, size, self.mask_id)
        self._sequences: dict[int, DecodingSequence] = {}
        self._unread: list[Update] = []
        self._ended_unrun: list[DecodingSequence] = []  # a grammar may leave no choice at all
        self._next = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._sequences or self._unread)

    def add(self, request: Request, *, watch: bool = False) -> int:
        """Queue a request.

        Args:
            request: what to do.
            watch: report what every step saw (`Update.step`).

        Returns:
            Its number.

        Raises:
            RequestError: an impossible request; nothing is queued.
        """
        self.check(request)
        number = self._next
        sequence = self._sequence(request, number, scoring=request.params.prompt_logprobs is not None)
        sequence.watched |= watch
        self._next += 1
        if (entered := self._enter(sequence)).completion is not None:
            self._ended_unrun.append(entered)
        return number

    def _sequence(self, request: Request, number: int, *, scoring: bool) -> DecodingSequence:
        kind: type[DecodingSequence]
        if scoring:
            kind = CausalScoringSequence if self.mask_id is None or self.config.shifted else BlockScoringSequence
        elif self.mask_id is None or (self.config.shifted and request.params.mode != "diffusion"):
            kind = SpeculativeSequence
        else:
            kind = BlockDiffusionSequence if request.grammar is None else ConstrainedSequence
        options: dict[str, Any] = {
            "shifted": self.config.shifted,
            "history": self._drafting.history,
            "ngrams": self._drafting.ngrams,
        }
        return kind(request, number, self.mask_id, self.cache_block_size, self._decode, **options)

    def _enter(self, sequence: DecodingSequence) -> DecodingSequence:
        """Let a sequence wait for its turn, unless it has ended; one that has scored its prompt makes room for decoding."""
        if isinstance(sequence, ScoringSequence) and sequence.completion is not None and sequence.request.num_wanted:
            self.scheduler.remove(sequence)
            scored, sequence = sequence, self._sequence(sequence.request, sequence.number, scoring=False)
            sequence.resume(scored)
        self._sequences[sequence.number] = sequence
        if sequence.completion is None:
            self.scheduler.add(sequence)
        return sequence

    def check(self, request: Request) -> None:
        """Whether `add` would take a request; may be called from any thread.

        Raises:
            RequestError: an impossible request.
        """
        request.check(self.config)
        if self.mask_id is None:
            if None in request.ids:
                raise RequestError("an autoregressive model cannot fill holes; use a diffusion model")
            if not request.ids:
                raise RequestError("autoregressive decoding needs at least one prompt token")
            if request.params.editing:
                raise RequestError("edit_threshold takes a diffusion model; leave it out, and preset")
        elif request.params.window * request.params.block_size > self.scheduler.max_num_batched_tokens:
            raise RequestError(
                f"{request.params.window} blocks of {request.params.block_size} tokens do not fit a forward of "
                f"{self.scheduler.max_num_batched_tokens} tokens; lower block_size or window, or raise max_num_batched_tokens"
            )
        length = len(request.ids) + request.params.max_new_tokens if self.mask_id is None else request.canvas_length
        capacity = self.pool.num_cache_blocks * self.cache_block_size
        if length > capacity:
            raise RequestError(
                f"{length} tokens in whole blocks do not fit a KV cache of {capacity}; "
                "shorten the prompt, lower max_new_tokens, or raise num_tokens"
            )
        if request.params.stop and self._decode is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids, or give the engine a decode function")

    def step(self) -> list[Update]:
        """One forward for everyone who takes part in it; nothing if there is no work."""
        started = time.perf_counter()
        updates, self._unread = self._unread, []
        ended, self._ended_unrun = self._ended_unrun, []
        updates += [self._update(sequence) for sequence in ended if sequence.number in self._sequences]
        work = self.scheduler.schedule()
        outputs = self.runner.run([scheduled for _, scheduled in work]) if work else []
        for (sequence, scheduled), output in zip(work, outputs, strict=True):
            sequence.last_step = None
            try:
                sequence.apply(scheduled, output)
                self.scheduler.publish(sequence)
                if sequence.completion is not None:
                    sequence = self._enter(sequence)  # of one that has scored its prompt, the grammar begins here
            except RequestError as error:
                self.abort(sequence.number)
                updates.append(Update(sequence.number, (), None, None, error))
            else:
                updates.append(self._update(sequence))
        self._observe(work, time.perf_counter() - started)
        if self._on_cache_events is not None and self.pool.events:
            self._on_cache_events(self.pool.events)
            self.pool.events = []
        if work and not self._sequences:
            self._drafting.keep()
        return updates

    def _plan_drafts(self, sequences: Sequence[DecodingSequence], num_beside: int) -> None:
        """Choose the drafts of those that draft."""
        drafting = [sequence for sequence in sequences if isinstance(sequence, SpeculativeSequence)]
        beside = sum(each.num_missing for each in sequences if not isinstance(each, SpeculativeSequence))
        self._planner.plan(drafting, num_beside + beside, len(self.scheduler.running))

    def _observe(self, work: Sequence[tuple[DecodingSequence, ScheduledSequence]], seconds: float) -> None:
        """What a forward costs that decides tokens by verifying drafts and does nothing else."""
        counts = [0, 0, 0]
        for sequence, scheduled in work:
            count = scheduled.stop - scheduled.start
            if not isinstance(sequence, SpeculativeSequence) or len(scheduled.queries) != count:
                return
            counts[0] += count
            counts[1] += scheduled.stop - scheduled.causal_end
            counts[2] += count if sequence.is_drawn else 0
        if work:
            self._drafting.costs.observe(counts, seconds)

    def abort(self, number: int) -> None:
        """End a request without a completion; its cache blocks are free at once, and nothing is reported of it any more."""
        self._unread = [update for update in self._unread if update.number != number]
        sequence = self._sequences.pop(number, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def stream(self, request: Request, *, watch: bool = False) -> Iterator[Update]:
        """Updates of one request until it ends. Other requests advance alongside; `step` reports on them afterwards.

        Stopping early aborts it.

        Raises:
            RequestError: it is impossible, or cannot go on.
        """
        number = self.add(request, watch=watch)
        try:
            # A step for somebody else may have ended it, and what that step said of it is still unread.
            while number in self._sequences or any(update.number == number for update in self._unread):
                yield from self._step_for({number})
        finally:
            self.abort(number)

    def run(
        self, requests: Sequence[Request], *, on_completion: Callable[[Completion], object] = lambda _: None
    ) -> list[Completion]:
        """Serve all of these to the end; completions in their order. `step` reports on others afterwards.

        Args:
            requests: what to serve.
            on_completion: sees each completion as soon as it is there.

        Raises:
            RequestError: one of them is impossible, or cannot go on; all are aborted.
        """
        numbers, completions = dict[int, None](), dict[int, Completion]()
        try:
            for request in requests:
                numbers[self.add(request)] = None
            while len(completions) < len(numbers):
                for update in self._step_for(numbers):
                    if update.completion is not None:
                        completions[update.number] = update.completion
                        on_completion(update.completion)
        finally:
            for number in numbers:
                self.abort(number)
        return [completions[number] for number in numbers]

    def _step_for(self, numbers: Container[int]) -> list[Update]:
        """A step's updates of some requests; those of others are kept for whoever calls `step`."""
        updates = self.step()
        self._unread += [update for update in updates if update.number not in numbers]
        mine = [update for update in updates if update.number in numbers]
        for update in mine:
            if update.error is not None:
                raise update.error
        return mine

    def _update(self, sequence: DecodingSequence) -> Update:
        if sequence.completion is not None:
            self.abort(sequence.number)
        new_ids, new_logprobs = sequence.take_new()
        prompt_logprobs = sequence.prompt_logprobs
        return Update(sequence.number, new_ids, sequence.last_step, sequence.completion, None, new_logprobs, prompt_logprobs)

    def _default_tokens(self, memory: Memory | None, per_token: int, max_num_seqs: int) -> int:
        config = self.config
        fitting = min(_KV_CACHE_BYTES // per_token, max_num_seqs * config.max_positions)
        wanted = max(fitting, config.max_positions + DEFAULT_CACHE_BLOCK_SIZE)
        return wanted if memory is None else max(min(wanted, _tokens_that_fit(memory, per_token)), 1)


def _check_room(num_tokens: int, per_token: int, memory: Memory | None, dtype: torch.dtype) -> None:
    """Refuse a KV cache that does not fit into memory."""

    def others() -> dict[str, int]:
        most = 0 if memory is None else _tokens_that_fit(memory, per_token)
        return {f"at most {most:,} tokens (num_tokens, or fewer max_new_tokens)": most * per_token} if most > 0 else {}

    check_fits(f"a KV cache of {num_tokens:,} tokens", {dtype_name(dtype): num_tokens * per_token}, memory, others)


def _tokens_that_fit(memory: Memory, per_token: int) -> int:
    return (memory.num_bytes - RESERVE) // per_token
