"""A sequence being decoded: what is decided, what is committed to the KV cache, what the next forward must hold.

Owns what all ways of decoding have in common: prefill, preemption, log-probabilities, and the end of a request. Knows neither
the model nor other sequences.
"""

from __future__ import annotations

import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from unmask.data.detokenizer import Decode, find_stop
from unmask.diffusion.decode import Guess
from unmask.engine.acceptance import DraftHistory
from unmask.engine.kv_cache import PrefixHashes
from unmask.engine.logprobs import token_logprobs
from unmask.engine.ngrams import NgramTable
from unmask.engine.request import Completion, Costs, DecodingStep, FinishReason, Request, TokenLogprob, finish
from unmask.errors import RequestError

NOTHING_LEFT = "logit_bias and min_new_tokens ban all that the grammar allows here; leave one of them out"


class ScheduledSequence(NamedTuple):
    """Positions `start..stop` of one sequence in a forward, with all that the runner and the sampler need of it.

    Attributes:
        request: what is being served.
        tokens: the sequence's tokens by position, at least up to `stop`.
        start: first position.
        stop: end of the positions.
        logits_positions: positions whose hidden states give the logits of `queries`.
        queries: positions that candidates are wanted for.
        causal_end: positions below it attend causally, as the context of a shifted model does, those from it on block-causally.
        mask_block_size: block size of the attention mask from `causal_end` on.
        step: denoising step within the block: part of the key of every draw.
        allowed: what the grammar allows, bool [V], by index into `queries`.
        targets: tokens given for the queries; where there are any, their log-probabilities are wanted in place of candidates.
        left_to_right: a query's context is what stands before it; False: all that is decided (see `engine.penalties`).
        block_table: cache blocks in order; the scheduler adds to them what the forward needs.
    """

    request: Request
    tokens: Sequence[int]
    start: int
    stop: int
    logits_positions: tuple[int, ...]
    queries: tuple[int, ...]
    causal_end: int
    mask_block_size: int
    step: int
    allowed: Mapping[int, Tensor]
    targets: tuple[int, ...] = ()
    left_to_right: bool = False
    block_table: Sequence[int] = ()


class ModelOutput(NamedTuple):
    """Candidates for the queries of a scheduled sequence.

    Attributes:
        guess: the candidates.
        logits_NV: as the model gave them, where the request needs more than the most probable token.
        processed_NV: the logits that the candidates come from, likewise.
        scores: log-probabilities of the targets of a sequence that has them; the guess is then of these tokens.
    """

    guess: Guess
    logits_NV: Tensor | None = None
    processed_NV: Tensor | None = None
    scores: Sequence[TokenLogprob] = ()


class DecodingSequence(ABC):
    """A request while it is decoded: the state common to all ways of decoding.

    Args:
        request: what to decode.
        number: of the request.
        mask_id: the mask token; None for an autoregressive model.
        cache_block_size: tokens in a cache block.
        decode: text of ids, for stop strings and the completion's text.
        shifted: the model's context attends causally (`ModelConfig.shifted`).
        history: what other requests have shown of drafts.

    Attributes:
        tokens: the canvas by position; a mask where undecided.
        committed: positions whose keys and values are in the KV cache, computed from final tokens.
        block_table: cache blocks in order; the first `num_published` are published and never written.
        prompt_logprobs: of the prompt's tokens, None for the first; set when all are known, where they are asked for.
        completion: set when it has ended.
    """

    def __init__(
        self,
        request: Request,
        number: int,
        mask_id: int | None,
        cache_block_size: int,
        decode: Decode | None = None,
        *,
        shifted: bool = False,
        history: DraftHistory | None = None,
        ngrams: NgramTable | None = None,
    ) -> None:
        self._history, self._ngrams = DraftHistory() if history is None else history, ngrams
        self.request, self.number, self.mask_id, self._decode, self._shifted = request, number, mask_id, decode, shifted
        key = b"" if request.adapter is None else request.adapter.digest
        self.prefix_hashes = PrefixHashes(self.block_size, cache_block_size, key)
        self.committed = 0
        self.block_table: list[int] = []
        self.num_published = 0
        self.order = (0, number)
        self._final_ids: list[int] = []
        self._final_at: Sequence[int] = ()
        self._num_taken = 0
        self.step = 0
        self.last_step: DecodingStep | None = None
        self.last_served = 0
        self.forwards = self._prefills = self._edits = self.cached_tokens = self.preemptions = self._accepted_drafts = 0
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.completion: Completion | None = None
        self._logprobs: dict[int, TokenLogprob] = {}
        self._forced: set[int] = set()
        self._trace: list[DecodingStep] = []
        self._times = [time.perf_counter()]
        self.watched = request.trace
        self.grammar = None if request.grammar is None else request.grammar.start()
        self._begin()

    tokens: list[int]
    left_to_right = True

    @property
    def block_size(self) -> int:
        """Tokens that are committed together; 1 where they are decided from left to right."""
        return 1

    @property
    def mask_block_size(self) -> int:
        """Block size of the attention mask from `ScheduledSequence.causal_end` on."""
        return self.block_size

    @abstractmethod
    def _begin(self) -> None:
        """Lay out the canvas, and decide what a grammar leaves no choice about."""

    @property
    @abstractmethod
    def num_final(self) -> int:
        """Leading positions, in whole blocks, whose tokens will not change any more."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """Positions that the next forward covers when all it lacks fits."""

    @property
    def num_missing(self) -> int:
        """Tokens of the next forward when all fit."""
        return self.reach - self.committed

    @property
    def min_tokens(self) -> int:
        """A number of tokens with which a forward gets on."""
        return self.reach - self.num_final

    @property
    def is_prefilling(self) -> bool:
        """Whether it lacks more than what a step decides, and the block decided before: the rest may come in parts."""
        return self.num_missing > 2 * self.min_tokens

    @abstractmethod
    def schedule(self, budget: int) -> ScheduledSequence | None:
        """Its part of the next forward, at most `budget` tokens; None when not even the least part fits."""

    @abstractmethod
    def apply(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        """Take in what the forward gave (None: there were no queries)."""

    def start(self, num_cached: int) -> bool:
        """It has been admitted; so many tokens were found in the prefix cache, which counts the first time: if this is it."""
        is_first = len(self._times) == 1
        if is_first:
            self._times.append(time.perf_counter())
            self.cached_tokens = num_cached
        return is_first

    def resume(self, scored: DecodingSequence) -> None:
        """Take over the prompt's log-probabilities and all costs from the sequence that has scored the prompt."""
        self.prompt_logprobs, self.watched = scored.prompt_logprobs, scored.watched
        self.forwards, self._prefills, self.preemptions = scored.forwards, scored.forwards, scored.preemptions
        self.cached_tokens, self._times = scored.cached_tokens, scored._times[:2]
        if self.completion is not None:  # a grammar has left no choice
            self.completion = replace(self.completion, forwards=self.forwards, prompt_logprobs=self.prompt_logprobs)

    def preempt(self) -> list[int]:
        """Give up the cache blocks; everything decided stays. Returns them."""
        cache_blocks, self.block_table = self.block_table, []
        self.committed = self.num_published = 0
        return cache_blocks

    def _scheduled(
        self,
        start: int,
        stop: int,
        queries: tuple[int, ...] = (),
        *,
        logits_positions: tuple[int, ...] | None = None,
        causal_end: int = 0,
        allowed: Mapping[int, Tensor] = MappingProxyType({}),
        targets: tuple[int, ...] = (),
    ) -> ScheduledSequence:
        return ScheduledSequence(
            request=self.request,
            tokens=self.tokens,
            start=start,
            stop=stop,
            logits_positions=queries if logits_positions is None else logits_positions,
            queries=queries,
            causal_end=causal_end,
            mask_block_size=self.mask_block_size,
            step=self.step,
            allowed=allowed,
            left_to_right=self.left_to_right,
            targets=targets,
            block_table=self.block_table,
        )

    @property
    def is_whole(self) -> bool:
        """Whether there is a grammar, and nothing may follow."""
        return self.grammar is not None and self.grammar.finished

    def _check_grammar(self) -> None:
        """Raise now what the next `schedule` would, that the grammar cannot go on: there it would end other requests too."""
        if self.grammar is not None and self.completion is None:
            self.grammar.allowed()

    def take_new(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Ids that have become final since the last call, and their log-probabilities if those were asked for."""
        new = slice(self._num_taken, len(self._final_ids))
        self._num_taken = len(self._final_ids)
        logprobs = () if self.request.params.logprobs is None else tuple(self._logprobs[p] for p in self._final_at[new])
        return tuple(self._final_ids[new]), logprobs

    def _count(self, scheduled: ScheduledSequence) -> None:
        self.forwards += 1
        if not scheduled.queries:
            self._prefills += 1
        elif len(self._times) == 2:
            self._times.append(time.perf_counter())

    def _follow(self, token: int, confidence: float = 1.0) -> None:
        """Advance the grammar, if there is one, over a token just decided; of confidence NaN where every token is banned.

        Raises:
            RequestError: the grammar does not allow it: the request's options ban all that it does.
        """
        if self.grammar is not None:
            if math.isnan(confidence) or not self.grammar.accepts(token):
                raise RequestError(NOTHING_LEFT)
            self.grammar.advance(token)

    def _take_forced(self, start: int, most: int | None = None) -> list[int]:
        """Tokens that the grammar leaves no choice about, of log-probability 0; the grammar advances over them.

        Args:
            start: position of the first.
            most: how many at most.
        """
        forced = [] if self.grammar is None else self.grammar.forced()[:most]
        for position, token in enumerate(forced, start):
            self._follow(token)
            self._forced.add(position)
            self._logprobs[position] = TokenLogprob(token, 0.0)
        return forced

    def _note_logprobs(self, positions: Container[int], output: ModelOutput) -> None:
        """Log-probabilities of the tokens just decided at queried positions, if they are asked for."""
        count = self.request.params.logprobs
        if count is None:
            return
        assert output.logits_NV is not None, "the sampler gives the logits to a request for log-probabilities"
        decided = [(row, p) for row, p in enumerate(output.guess.positions) if p in positions and p not in self._forced]
        logits_NV = output.logits_NV[[row for row, _ in decided]]
        entries = token_logprobs(logits_NV, [self.tokens[p] for _, p in decided], count, self.mask_id)
        self._logprobs |= {p: entry for (_, p), entry in zip(decided, entries, strict=True)}

    def _end(self, positions: Sequence[int]) -> None:
        """Hand out what is final, and end here if it holds an end, a stop string or all that was asked for.

        Args:
            positions: of the completion so far, in order.
        """
        if self._goes_on(positions):
            return
        completion = finish([self.tokens[position] for position in positions], self.request, self.forwards)
        # What a grammar completes beyond the budget is cut, and so is no sentence.
        stopped = completion.finish_reason == "stop" or (self.is_whole and len(positions) <= self.request.num_wanted)
        if self.request.params.stop:
            assert self._decode is not None, "the engine refuses stop strings without a tokenizer"
            decode = partial(self._decode, after=self.request.prefix)
            params = self.request.params
            cut = find_stop(decode, completion.text_ids, len(self._final_ids), params.stop, num_kept=params.min_new_tokens)
            if cut is not None:
                count, text, stop = cut
                completion = replace(completion, ids=completion.ids[:count], text=text, stop=stop, end_token=None)
                stopped = True
        self._final_ids, self._final_at = list(completion.ids), positions
        if stopped or len(completion.ids) == self.request.num_wanted:
            reason: FinishReason = "stop" if stopped else "length"
            logprobs = None
            if self.request.params.logprobs is not None:
                logprobs = tuple(self._logprobs[position] for position in positions[: len(completion.ids)])
            if completion.text is None and self._decode is not None:
                completion = replace(completion, text=self._decode(completion.text_ids, after=self.request.prefix))
            costs, trace = self._costs(), tuple(self._trace)
            self.completion = replace(
                completion,
                finish_reason=reason,
                logprobs=logprobs,
                prompt_logprobs=self.prompt_logprobs,
                costs=costs,
                trace=trace,
            )

    def _goes_on(self, positions: Sequence[int]) -> bool:
        """Whether nothing of this ends it, as after most steps: what is new is final then."""
        if self.request.params.stop or self.grammar is not None or len(positions) >= self.request.num_wanted:
            return False
        new = [self.tokens[position] for position in positions[len(self._final_ids) :]]
        if not self.request.end_ids.isdisjoint(new):
            return False
        self._final_ids += new
        self._final_at = positions
        return True

    def _costs(self) -> Costs:
        times = [*self._times, *[time.perf_counter()] * (4 - len(self._times))]
        queue, prefill, denoise = (late - early for early, late in itertools.pairwise(times))
        counts = (self._prefills, self._edits, self.cached_tokens, self.preemptions, self._accepted_drafts)
        return Costs(*counts, queue, prefill, denoise)

    def _report(self, step: DecodingStep) -> None:
        self.last_step = step
        if self.request.trace:
            self._trace.append(step)
