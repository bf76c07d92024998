"""The scheduler: which sequences take part in the next forward, and which cache blocks they get.

Owns admission, order, preemption and the block tables. Knows no tensors: a scheduled sequence is a range of positions.

States: waiting -> running (prefill, denoise, commit: all in one forward) -> ended; a preempted sequence waits again
and keeps everything it has decided.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import replace

from unmask.engine.kv_cache import BlockPool
from unmask.engine.sequences.base import DecodingSequence, ScheduledSequence

STEPS_PER_PRIORITY = 64
"""A finite price for priority: whoever waits long enough is first, so nobody starves."""


class Scheduler:
    """First come, first served, by (step of arrival + 64 priority, number).

    Args:
        pool: the KV cache's blocks.
        cache_block_size: tokens in a cache block.
        max_num_seqs: most sequences that hold cache blocks.
        max_num_batched_tokens: most tokens of a forward.
        prefix_cache: share cache blocks of equal prefixes.
    """

    def __init__(
        self, pool: BlockPool, cache_block_size: int, *, max_num_seqs: int, max_num_batched_tokens: int, prefix_cache: bool
    ) -> None:
        self.pool, self.cache_block_size, self.prefix_cache = pool, cache_block_size, prefix_cache
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.waiting: list[DecodingSequence] = []
        self.running: list[DecodingSequence] = []
        self.clock = 0

    def add(self, sequence: DecodingSequence) -> None:
        """Let it wait for its turn."""
        sequence.order = (self.clock + STEPS_PER_PRIORITY * sequence.request.priority, sequence.number)
        insort(self.waiting, sequence, key=lambda waiting: waiting.order)

    def remove(self, sequence: DecodingSequence) -> None:
        """It has ended or was aborted: its cache blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.free(sequence.preempt())
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[tuple[DecodingSequence, ScheduledSequence]]:
        """What the next forward holds, at most `max_num_batched_tokens` tokens in all.

        Those that run come before those that wait, the least recently served first; when cache blocks run
        out, the newest running sequence that is not in this forward yet is preempted.
        """
        self.clock += 1
        work: list[tuple[DecodingSequence, ScheduledSequence]] = []
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

    def publish(self, sequence: DecodingSequence) -> None:
        """Share the cache blocks that the last forward made final."""
        if not self.prefix_cache:
            return
        full = sequence.committed // self.cache_block_size
        if full > sequence.num_published:
            hashes = sequence.prefix_hashes.extend(sequence.tokens, sequence.committed)
            for index in range(sequence.num_published, full):
                self.pool.publish(sequence.block_table[index], hashes[index])
            sequence.num_published = full

    def _serve(self, sequence: DecodingSequence, budget: int, work: list[tuple[DecodingSequence, ScheduledSequence]]) -> int:
        """Put it into the forward if there is room for its tokens and their cache blocks; returns how many tokens."""
        scheduled = sequence.schedule(budget)
        if scheduled is None or not self._provide(sequence, scheduled.stop, [served for served, _ in work]):
            return 0
        sequence.last_served = self.clock
        work.append((sequence, replace(scheduled, block_table=tuple(sequence.block_table))))
        return scheduled.stop - scheduled.start

    def _provide(self, sequence: DecodingSequence, stop: int, scheduled: list[DecodingSequence]) -> bool:
        """Allocate cache blocks for all positions below `stop`."""
        while len(sequence.block_table) * self.cache_block_size < stop:
            cache_block = self.pool.allocate(sequence.block_table[-1] if sequence.block_table else None)
            if cache_block is not None:
                sequence.block_table.append(cache_block)
                continue
            newer = [s for s in self.running if s.order > sequence.order and s not in scheduled]
            if not newer:
                return False
            self.preempt(max(newer, key=lambda s: s.order))
        return True

    def _admit(self, sequence: DecodingSequence, budget: int) -> bool:
        """Start the first waiting sequence if all it has to compute now fits the available cache blocks."""
        cache_blocks = self._cached_blocks(sequence)
        self.pool.touch(cache_blocks)
        sequence.committed = len(cache_blocks) * self.cache_block_size
        needed = -(-sequence.reach // self.cache_block_size) - len(cache_blocks)
        if needed > self.pool.num_available or sequence.schedule(budget) is None:
            self.pool.free(cache_blocks)
            sequence.committed = 0
            return False
        self.waiting.pop(0)
        self.running.append(sequence)
        sequence.start(sequence.committed)
        sequence.block_table = cache_blocks
        sequence.num_published = len(cache_blocks)
        return True

    def _cached_blocks(self, sequence: DecodingSequence) -> list[int]:
        if not self.prefix_cache:
            return []
        cache_blocks = self.pool.find_cached(sequence.prefix_hashes.extend(sequence.tokens, sequence.num_final))
        while len(cache_blocks) * self.cache_block_size % sequence.block_size:
            cache_blocks.pop()  # the rest of the diffusion block would be written into a shared cache block
        return cache_blocks

    def preempt(self, sequence: DecodingSequence) -> None:
        """Free the cache blocks of a running sequence, which waits again."""
        self.running.remove(sequence)
        self.pool.free(sequence.preempt())
        sequence.preemptions += 1
        insort(self.waiting, sequence, key=lambda waiting: waiting.order)
