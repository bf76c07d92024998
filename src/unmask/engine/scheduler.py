"""Which sequences take part in the next forward, and which pages they get.

Owns admission, order, preemption and the page table. Knows no tensors: a plan is a range of positions.

States: waiting -> running (prefill, denoise, commit: all are rows of one forward) -> ended; a preempted sequence waits again
and keeps everything it has decided.
"""

from __future__ import annotations

from unmask.engine.kv_cache import BlockPool
from unmask.engine.sequences.base import ScheduledSequence, Sequence

STEPS_PER_PRIORITY = 64
"""A finite price for priority: whoever waits long enough is first, so nobody starves."""


class Scheduler:
    """First come, first served, by (step of arrival + 64 priority, number).

    Args:
        pool: pages of the cache.
        cache_block_size: tokens in a page.
        max_num_seqs: most sequences that hold pages.
        max_num_batched_tokens: most rows of a forward.
        prefix_cache: share pages of equal prefixes.
    """

    def __init__(
        self, pool: BlockPool, cache_block_size: int, *, max_num_seqs: int, max_num_batched_tokens: int, prefix_cache: bool
    ) -> None:
        self.pool, self.cache_block_size, self.prefix_cache = pool, cache_block_size, prefix_cache
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.clock = 0

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its turn."""
        sequence.order = (self.clock + STEPS_PER_PRIORITY * sequence.request.priority, sequence.number)
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended or was aborted: its pages are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence.preempt())
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[tuple[Sequence, ScheduledSequence]]:
        """Plans for the next forward, at most `max_num_batched_tokens` rows in all.

        Those that run come before those that wait, the least recently served first; when pages run out, the newest running
        sequence that has no rows in this forward yet gives up its own.
        """
        self.clock += 1
        work: list[tuple[Sequence, ScheduledSequence]] = []
        budget = self.max_num_batched_tokens
        for sequence in sorted(self.running, key=lambda s: (s.last_served, s.order)):
            if sequence in self.running:
                budget -= self._serve(sequence, budget, work)
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            sequence = self.waiting[0]
            if not self._admit(sequence, budget):
                break
            budget -= self._serve(sequence, budget, work)
        assert work or not (self.running or self.waiting), "nothing can be scheduled"
        return work

    def publish(self, sequence: Sequence) -> None:
        """Share the pages that the last forward made final."""
        if not self.prefix_cache:
            return
        full = sequence.committed // self.cache_block_size
        if full > sequence.num_published:
            names = sequence.digests.extend(sequence.tokens, sequence.committed)
            for page in range(sequence.num_published, full):
                self.pool.publish(sequence.pages[page], names[page])
            sequence.num_published = full

    def _serve(self, sequence: Sequence, budget: int, work: list[tuple[Sequence, ScheduledSequence]]) -> int:
        """Put its rows into the forward if there is room for them and for their pages; returns how many."""
        plan = sequence.plan(budget)
        if plan is None or not self._provide(sequence, plan.stop, [done for done, _ in work]):
            return 0
        sequence.last_served = self.clock
        work.append((sequence, plan))
        return plan.stop - plan.start

    def _provide(self, sequence: Sequence, stop: int, scheduled: list[Sequence]) -> bool:
        """Pages for all positions below `stop`."""
        while len(sequence.pages) * self.cache_block_size < stop:
            page = self.pool.allocate(sequence.pages[-1] if sequence.pages else None)
            if page is not None:
                sequence.add_page(page)
                continue
            newer = [s for s in self.running if s.order > sequence.order and s not in scheduled]
            if not newer:
                return False
            self._preempt(max(newer, key=lambda s: s.order))
        return True

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        """Start the first waiting sequence if all it has to compute now fits the pages that nobody holds."""
        pages = self._cached_pages(sequence)
        self.pool.hold(pages)
        sequence.committed = len(pages) * self.cache_block_size
        needed = -(-sequence.reach // self.cache_block_size) - len(pages)
        if needed > self.pool.num_available or sequence.plan(budget) is None:
            self.pool.release(pages)
            sequence.committed = 0
            return False
        self.waiting.pop(0)
        self.running.append(sequence)
        sequence.start()
        for page in pages:
            sequence.add_page(page)
        sequence.num_published = len(pages)
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.committed
        return True

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        if not self.prefix_cache:
            return []
        pages = self.pool.match(sequence.digests.extend(sequence.tokens, sequence.num_final))
        while len(pages) * self.cache_block_size % sequence.block_size:
            pages.pop()  # the rest of the block would be written into a shared page
        return pages

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.preempt())
        sequence.preemptions += 1
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.order)
