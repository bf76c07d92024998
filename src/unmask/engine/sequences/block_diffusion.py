"""A sequence decoded by block diffusion: which blocks are being denoised, which positions are queried, what a step decides.

Owns the state of its blocks between forwards; the decision is `diffusion.decode`'s, the choice of positions a policy's.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import partial

from unmask.diffusion.decode import Decision, decide
from unmask.engine.policies import choose
from unmask.engine.request import DecodingStep
from unmask.engine.sequences.base import DecodingSequence, ModelOutput, ScheduledSequence


class BlockDiffusionSequence(DecodingSequence):
    """Denoises block by block; the newest `window` blocks stay open to edits.

    A block commits in the forward in which all its tokens are final and none of them changes: with a threshold that is the
    pass after its last one, fused with the first pass of the next block; with editing it is the pass that edits nothing.
    A shifted model's block commits in the pass after its last one always: only there does it attend causally.
    """

    left_to_right = False

    def _begin(self) -> None:
        request, mask_id = self.request, self.mask_id
        assert mask_id is not None, "diffusion models have a mask token"
        num_new = request.canvas_length - len(request.ids)
        self.tokens = [mask_id if token is None else token for token in request.ids] + [mask_id] * num_new
        self.undecided = [token is None for token in request.ids] + [True] * num_new
        self._fixed = [not undecided for undecided in self.undecided]
        self._to_decide = [position for position, undecided in enumerate(self.undecided) if undecided]
        self._first = self._front = self._settled = self._to_decide[0] // self.block_size * self.block_size
        self._post_steps = self._num_stable = 0

    @property
    def block_size(self) -> int:
        return self.request.params.block_size

    @property
    def num_final(self) -> int:
        return self._settled

    @property
    def reach(self) -> int:
        return self._front + self.block_size

    def schedule(self, budget: int) -> ScheduledSequence | None:
        start, stop, causal_end = self.committed, self.reach, self._settled if self._shifted else 0
        if stop - start > budget:
            chunk = min(budget // self.block_size * self.block_size, self._settled - start)
            return self._scheduled(start, start + chunk, causal_end=causal_end) if chunk > 0 else None
        if self.request.params.editing:
            queries = tuple(p for p in range(self._settled, stop) if not self._fixed[p])
        else:
            queries = tuple(p for p in range(self._front, stop) if self.undecided[p])
        return self._scheduled(start, stop, queries, causal_end=causal_end)

    def apply(self, scheduled: ScheduledSequence, output: ModelOutput | None) -> None:
        self._count(scheduled)
        if output is None:
            self.committed = scheduled.stop
            return
        start, before = self._settled, self.tokens[self._settled : scheduled.stop]
        had_masks = any(self.undecided[p] for p in scheduled.queries)
        decision = self._decide(output)
        self._note_logprobs(decision.commits.keys() | decision.edits.keys(), output)
        self._edits += len(decision.edits)
        self.step += 1
        if self.watched:
            positions = range(start if self.request.params.editing else self._front, scheduled.stop)
            state = (self.tokens, self.undecided, self._fixed)
            self._report(DecodingStep.after(positions, output.guess, decision, *state, self.forwards))
        done = self._is_done(had_masks, decision)
        self._end(self._final_positions(done))
        if done and self.completion is None:
            self._next_block()
        changed = [start + i for i, token in enumerate(before) if token != self.tokens[start + i]]
        self._commit(scheduled.causal_end if self._shifted else scheduled.stop, min(changed, default=scheduled.stop))

    def _decide(self, output: ModelOutput) -> Decision:
        """Carry out one denoising step on the canvas."""
        guess, params = output.guess, self.request.params
        decided = {p: self.tokens[p] for p in guess.positions if not self.undecided[p]}
        decision = decide(guess, decided, partial(choose, step=self.step, params=params), params.edit_threshold)
        for position, token in (*decision.commits.items(), *decision.edits.items()):
            self.tokens[position], self.undecided[position] = token, False
        return decision

    def _is_done(self, had_masks: bool, decision: Decision) -> bool:
        """Whether the newest block is."""
        params = self.request.params
        if any(self.undecided[self._front : self.reach]):
            return False
        if not params.editing:
            return True
        self._post_steps += not had_masks
        return self._post_steps >= params.max_post_steps or (not had_masks and not decision.edits)

    def _final_positions(self, done: bool) -> list[int]:
        """Positions of the completion whose tokens will not change any more; `done`: the newest block is."""
        params = self.request.params
        if not params.editing:
            while self._num_stable < len(self._to_decide) and not self.undecided[self._to_decide[self._num_stable]]:
                self._num_stable += 1
            return self._to_decide[: self._num_stable]
        stable = self.reach if done else self._settled
        decided = self._to_decide[: bisect_left(self._to_decide, stable)]
        ended = len(decided) >= self.request.num_wanted or any(self.tokens[p] in self.request.end_ids for p in decided)
        if done and not ended and stable < len(self.tokens):
            # The newest blocks may still be edited while the next one is decided.
            stable = max(self._settled, stable - (params.window - 1) * self.block_size)
        return self._to_decide[: bisect_left(self._to_decide, stable)]

    def _next_block(self) -> None:
        """Begin the next block with anything undecided."""
        self._front += self.block_size
        while not any(self.undecided[self._front : self.reach]):
            self._front += self.block_size
        oldest = self._front - (self.request.params.window - 1) * self.block_size
        self._settled = max(self._settled, min(self._front, max(oldest, self._first)))
        self.step = self._post_steps = 0

    def _commit(self, stop: int, first_changed: int) -> None:
        while self.committed + self.block_size <= min(stop, self._settled, first_changed):
            self.committed += self.block_size
