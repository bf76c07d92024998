"""A request being served: what is decided, what is committed to the cache, what the next forward must hold.

Owns what `BlockDiffusionSequence` and `AutoregressiveSequence` have in common: both are prefilled, preempted and finished alike
whatever runs beside them. Knows neither the model nor its neighbours.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unmask.data.detokenizer import Decode, find_stop
from unmask.diffusion.decode import Guess
from unmask.diffusion.objectives import ban_mask
from unmask.engine.kv_cache import PrefixHashes
from unmask.engine.request import Completion, Costs, FinishReason, Request, Step, TokenLogprob, finish


@dataclass(frozen=True)
class ScheduledSequence:
    """Positions `start..stop` to forward; the hidden states at `rows` answer what stands at `queries`.

    Positions below `causal_end` attend causally, as the context of a shifted model does, those from it on block-causally.
    """

    start: int
    stop: int
    rows: tuple[int, ...] = ()
    queries: tuple[int, ...] = ()
    causal_end: int = 0


@dataclass(frozen=True)
class ModelOutput:
    """Candidates for a plan's queries, and their logits [N, V] where the request needs more than candidates."""

    guess: Guess
    logits_NV: Tensor | None


class DecodingSequence(ABC):
    """State common to both kinds.

    Attributes:
        tokens: the canvas by position; a mask where undecided.
        committed: positions whose keys and values are in the cache, computed from final tokens.
        block_table: cache blocks in order; the first `num_published` are published and never written.
        completion: set when it has ended.
    """

    block_size: int

    @property
    def mask_block_size(self) -> int:
        """Block size of the attention mask from `ScheduledSequence.causal_end` on."""
        return self.block_size

    def __init__(
        self, request: Request, number: int, mask_id: int | None, cache_block_size: int, decode: Decode | None
    ) -> None:
        self.request, self.number, self.mask_id, self._decode = request, number, mask_id, decode
        self.prefix_hashes = PrefixHashes(self.block_size, cache_block_size)
        self.committed = 0
        self.block_table: list[int] = []
        self.num_published = 0
        self.order = (0, number)
        self._final_ids: list[int] = []
        self._final_places: Sequence[int] = ()
        self._num_taken = 0
        self.step = 0
        self.last_step: Step | None = None
        self.last_served = 0
        self.forwards = self._prefills = self._edits = self.cached_tokens = self.preemptions = 0
        self.completion: Completion | None = None
        self._logprobs: dict[int, TokenLogprob] = {}
        self._trace: list[Step] = []
        self._times = [time.perf_counter()]
        self.watched = request.trace
        self.grammar = None if request.grammar is None else request.grammar.start()

    tokens: list[int]

    @property
    @abstractmethod
    def num_final(self) -> int:
        """Leading positions, in whole blocks, whose tokens will not change any more."""

    @property
    @abstractmethod
    def reach(self) -> int:
        """Positions that the next forward covers when all it lacks fits."""

    @abstractmethod
    def plan(self, budget: int) -> ScheduledSequence | None:
        """The next forward's rows, at most `budget` of them; None when not even the least part fits."""

    @abstractmethod
    def apply(self, plan: ScheduledSequence, answer: ModelOutput | None) -> None:
        """Take in what the forward of `plan` gave (None: it asked nothing)."""

    def start(self) -> None:
        """It has been admitted for the first time."""
        if len(self._times) == 1:
            self._times.append(time.perf_counter())

    def preempt(self) -> list[int]:
        """Give up the cache blocks; everything decided stays. Returns them."""
        cache_blocks, self.block_table = self.block_table, []
        self.committed = self.num_published = 0
        return cache_blocks

    def adjusted(self, logits_NV: Tensor, positions: Sequence[int]) -> Tensor:
        """A copy of the logits at `positions` with what the request bans or favours; the grammar is not applied here."""
        logits_NV = logits_NV.float().clone()
        for token, bias in self.request.params.logit_bias.items():
            logits_NV[:, token] += bias
        if self.mask_id is not None:
            logits_NV[:, self.mask_id] = float("-inf")
        early = len(self.request.ids) + self.request.params.min_new_tokens
        too_early = torch.tensor([position < early for position in positions], device=logits_NV.device)
        if self.request.eos_ids and bool(too_early.any()):
            is_end_V = torch.zeros(logits_NV.shape[1], dtype=torch.bool, device=logits_NV.device)
            is_end_V[sorted(self.request.eos_ids)] = True
            logits_NV[too_early[:, None] & is_end_V] = float("-inf")
        return logits_NV

    @property
    def is_whole(self) -> bool:
        """Whether there is a grammar, and nothing may follow."""
        return self.grammar is not None and self.grammar.finished

    @cached_property
    def is_plain(self) -> bool:
        """Whether the likeliest token and its probability are all it needs of the logits."""
        request, params = self.request, self.request.params
        whole = request.params.logprobs is None and request.grammar is None and not request.params.logit_bias
        ends = bool(request.eos_ids) and (request.params.min_new_tokens > 0 or None in request.ids)
        return whole and not ends and params.temperature == 0.0 and params.policy != "entropy"

    def take_new(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Ids that have become final since the last call, and their log-probabilities if those were asked for."""
        new = slice(self._num_taken, len(self._final_ids))
        self._num_taken = len(self._final_ids)
        logprobs = () if self.request.params.logprobs is None else tuple(self._logprobs[p] for p in self._final_places[new])
        return tuple(self._final_ids[new]), logprobs

    def _count(self, plan: ScheduledSequence) -> None:
        self.forwards += 1
        if not plan.queries:
            self._prefills += 1
        elif len(self._times) == 2:
            self._times.append(time.perf_counter())

    def note_logprobs(self, positions: Sequence[int], logits_NV: Tensor | None, at: dict[int, int]) -> None:
        """Log-probabilities of tokens just decided, if they are asked for; 0 for one that the grammar left no choice about.

        Args:
            positions: of the tokens.
            logits_NV: as the model gave them; None: nothing was asked of it.
            at: their row, by position.
        """
        count = self.request.params.logprobs
        if count is None:
            return
        logprobs_NV = None if logits_NV is None else ban_mask(logits_NV.float(), self.mask_id).log_softmax(-1)
        for position in positions:
            token = self.tokens[position]
            if logprobs_NV is None or position not in at:
                self._logprobs[position] = TokenLogprob(token, 0.0)
                continue
            row = logprobs_NV[at[position]]
            best = row.topk(count) if count else None
            others = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            self._logprobs[position] = TokenLogprob(token, float(row[token]), others)

    def _end(self, positions: Sequence[int], *, over: bool) -> None:
        """Hand out what is final, and end here if it holds an end, a stop string or all that was asked for.

        Args:
            positions: of the completion so far, in order.
            over: nothing more may follow.
        """
        found = finish([self.tokens[position] for position in positions], self.request, self.forwards)
        # What a grammar completes beyond the budget is cut, and so is no sentence.
        stopped = found.finish_reason == "stop" or (over and len(positions) <= self.request.num_wanted)
        if self.request.params.stop:
            assert self._decode is not None, "the engine refuses stop strings without a tokenizer"
            cut = find_stop(self._decode, found.ids, len(self._final_ids), self.request.params.stop)
            count, text = (len(found.ids), self._decode(found.ids)) if cut is None else cut
            found = replace(found, ids=found.ids[:count], text=text)
            stopped |= cut is not None
        self._final_ids, self._final_places = list(found.ids), positions
        if stopped or len(found.ids) == self.request.num_wanted:
            reason: FinishReason = "stop" if stopped else "length"
            logprobs = None
            if self.request.params.logprobs is not None:
                logprobs = tuple(self._logprobs[position] for position in positions[: len(found.ids)])
            costs, trace = self._costs(), tuple(self._trace)
            self.completion = replace(found, finish_reason=reason, logprobs=logprobs, costs=costs, trace=trace)

    def _costs(self) -> Costs:
        times = [*self._times, *[time.perf_counter()] * (4 - len(self._times))]
        queue, prefill, denoise = (late - early for early, late in itertools.pairwise(times))
        return Costs(self._prefills, self._edits, self.cached_tokens, self.preemptions, queue, prefill, denoise)

    def _report(self, step: Step) -> None:
        self.last_step = step
        if self.request.trace:
            self._trace.append(step)
