"""A request that denoises: which blocks are open, which positions are asked about, what a step decides.

Owns the state of blocks between forwards; the decision rule is `diffusion.decode`'s, a grammar's `constrained`'s.
"""

from __future__ import annotations

from bisect import bisect_left

from unmask.data.detokenizer import Decode
from unmask.diffusion.decode import Decision, Guess, decide
from unmask.engine.request import Request, Step
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence
from unmask.engine.sequences.constrained import advance_frontier, fill_forced


class BlockDiffusionSequence(DecodingSequence):
    """Denoises block by block; the newest `window` blocks stay open to edits.

    A block commits in the forward in which all its tokens are final and none of them changes: with a threshold that is the
    pass behind its last one, fused with the first pass of the next block; with editing it is the pass that edits nothing.
    A shifted model's block commits in the pass behind its last one always: only there is it read causally.
    """

    def __init__(
        self,
        request: Request,
        number: int,
        mask_id: int,
        cache_block_size: int,
        decode: Decode | None = None,
        *,
        shifted: bool = False,
    ) -> None:
        """`shifted`: the model reads its context causally (`ModelConfig.shifted`)."""
        self.block_size, self._shifted = request.params.block_size, shifted
        super().__init__(request, number, mask_id, cache_block_size, decode)
        rest = request.canvas_length - len(request.ids)
        self.tokens = [mask_id if token is None else token for token in request.ids] + [mask_id] * rest
        self.undecided = [token is None for token in request.ids] + [True] * rest
        self._wanted = [place for place, open_ in enumerate(self.undecided) if open_]
        self._fixed = [not open_ for open_ in self.undecided]
        self._front = self._settled = self._wanted[0] // self.block_size * self.block_size
        self._first = self._front
        self._post_steps = self._num_stable = 0
        self.frontier = self._wanted[0]
        self.forced: set[int] = set()
        if self._fill_forced() and self.completion is None:
            self._next_block()

    @property
    def num_final(self) -> int:
        return self._settled

    @property
    def reach(self) -> int:
        return self._front + self.block_size

    def plan(self, budget: int) -> ScheduledSequence | None:
        start, stop, causal_end = self.committed, self.reach, self._settled if self._shifted else 0
        if stop - start > budget:
            chunk = min(budget // self.block_size * self.block_size, self._settled - start)
            return ScheduledSequence(start, start + chunk, causal_end=causal_end) if chunk > 0 else None
        if self.request.params.editing:
            queries = tuple(p for p in range(self._settled, stop) if not self._fixed[p])
        else:
            queries = tuple(p for p in range(self._front, stop) if self.undecided[p])
        return ScheduledSequence(start, stop, queries, queries, causal_end)

    def apply(self, plan: ScheduledSequence, answer: ModelOutput | None) -> None:
        self._count(plan)
        if answer is None:
            self.committed = plan.stop
            return
        before = [self.tokens[p] for p in range(self._settled, plan.stop)]
        place = self._settled
        had_masks = any(self.undecided[p] for p in plan.queries)
        decision = self._decide(answer.guess) if self.grammar is None else advance_frontier(self, answer, self.reach)
        at = {position: i for i, position in enumerate(plan.queries) if position not in self.forced}
        self.note_logprobs([*decision.commits, *decision.edits], answer.logits_NV, at)
        self._edits += len(decision.edits)
        self.step += 1
        if self.watched:
            places = range(place if self.request.params.editing else self._front, plan.stop)
            state = (self.tokens, self.undecided, self._fixed)
            self._report(Step.after(places, answer.guess, decision, *state, self.forwards))
        done = self._is_done(had_masks, decision)
        self._end(self._final_positions(done), over=self.is_whole)
        if done and self.completion is None:
            self._next_block()
        changed = [place + i for i, token in enumerate(before) if token != self.tokens[place + i]]
        self._commit(plan.causal_end if self._shifted else plan.stop, min(changed, default=plan.stop))

    def _decide(self, guess: Guess) -> Decision:
        params = self.request.params
        decided = {p: self.tokens[p] for p in guess.positions if not self.undecided[p]}
        decision = decide(guess, decided, self.step, params)
        for position, token in (*decision.commits.items(), *decision.edits.items()):
            self.tokens[position], self.undecided[position] = token, False
        return decision

    def reopen(self, position: int) -> None:
        """Mask a provisional token again."""
        assert self.mask_id is not None
        self.tokens[position], self.undecided[position] = self.mask_id, True

    def _is_done(self, had_masks: bool, decision: Decision) -> bool:
        params, end = self.request.params, self._front + self.block_size
        if any(self.undecided[self._front : end]) or (self.grammar is not None and self.frontier < end):
            return False
        if not params.editing:
            return True
        self._post_steps += not had_masks
        return self._post_steps >= params.max_post_steps or (not had_masks and not decision.edits)

    def _final_positions(self, done: bool) -> list[int]:
        """Positions of the completion whose tokens will not change any more."""
        params = self.request.params
        if self.grammar is not None:
            stable = self.frontier
        elif not params.editing:
            while self._num_stable < len(self._wanted) and not self.undecided[self._wanted[self._num_stable]]:
                self._num_stable += 1
            return self._wanted[: self._num_stable]
        else:
            stable = self._front + self.block_size if done else self._settled
            decided = self._wanted[: bisect_left(self._wanted, stable)]
            ended = len(decided) >= self.request.num_wanted or any(self.tokens[p] in self.request.eos_ids for p in decided)
            if done and not ended and stable < len(self.tokens):
                # The newest blocks may still be edited while the next one is decided.
                stable = max(self._settled, stable - (params.window - 1) * self.block_size)
        return self._wanted[: bisect_left(self._wanted, stable)]

    def _next_block(self) -> None:
        """Open the next block with anything undecided; blocks that a grammar fills on its own need no forward."""
        complete = True
        while complete and self.completion is None:
            self._front += self.block_size
            while not any(self.undecided[self._front : self.reach]):
                self._front += self.block_size
            oldest = self._front - (self.request.params.window - 1) * self.block_size
            self._settled = max(self._settled, min(self._front, max(oldest, self._first)))
            self.step = self._post_steps = 0
            complete = self._fill_forced()

    def _fill_forced(self) -> bool:
        """Write what the grammar leaves no choice about; whether that completes the block."""
        if self.grammar is None:
            return False
        fill_forced(self, self.reach)
        complete = self.frontier == self.reach or self.is_whole
        if complete:
            self._end(self._final_positions(True), over=self.is_whole)
        return complete

    def _commit(self, stop: int, first_changed: int) -> None:
        size = self.block_size
        while self.committed + size <= min(stop, self._settled, first_changed):
            self.committed += size
