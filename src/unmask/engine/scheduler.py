"""The scheduler: which sequences take part in the next forward, and which cache blocks they get.

Owns admission, order, preemption and the block tables. Knows no tensors: a scheduled sequence is a range of positions.

States: waiting -> running (prefill, denoise, commit: all in one forward) -> ended; a preempted sequence waits again
and keeps everything it has decided.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from unmask.engine.kv_cache import BlockPool, BlocksStored
from unmask.engine.sequences.base import DecodingSequence, ScheduledSequence

STEPS_PER_PRIORITY = 64
"""A finite price for priority: whoever waits long enough is first, so nobody starves."""
_PREFILL_PER_DECODING_TOKEN = 2
_PREFILL_ALONE = 4
"""Where nobody decodes, a forward holds so many prefill chunks: it ends soon for whoever comes meanwhile."""


class Scheduler:
    """First come, first served, by (step of arrival + 64 priority, number).

    Args:
        pool: the KV cache's blocks.
        cache_block_size: tokens in a cache block.
        max_num_seqs: most sequences that hold cache blocks.
        max_num_batched_tokens: most tokens of a forward.
        prefill_chunk: tokens that sequences which prefill may take beside those that decode; see `Backend.prefill_chunk`.
        prefix_cache: share cache blocks of equal prefixes.
        plan_drafts: told which sequences decide tokens in this forward, and the number of tokens beside theirs, before they are
            asked for their parts.

    Attributes:
        queried_tokens: of the prompts that were looked up in the prefix cache, each when it was first admitted.
        hit_tokens: of those, found there.
    """

    def __init__(
        self,
        pool: BlockPool,
        cache_block_size: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefill_chunk: int,
        prefix_cache: bool,
        plan_drafts: Callable[[Sequence[DecodingSequence], int], None] = lambda sequences, num_beside: None,
    ) -> None:
        self._plan_drafts = plan_drafts
        self.pool, self.cache_block_size, self.prefix_cache = pool, cache_block_size, prefix_cache
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.prefill_chunk = prefill_chunk
        self.waiting: list[DecodingSequence] = []
        self.running: list[DecodingSequence] = []
        self.clock = self.queried_tokens = self.hit_tokens = 0

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

        Sequences that decode come first, the least recently served before the others; then those that prefill, in parts, with
        those that wait, as far as there is room. When cache blocks run out, the newest running sequence that is not in this
        forward yet is preempted.
        """
        self.clock += 1
        work: list[tuple[DecodingSequence, ScheduledSequence]] = []
        prefilling, decoding = list[DecodingSequence](), list[DecodingSequence]()
        for sequence in self.running:
            (prefilling if sequence.is_prefilling else decoding).append(sequence)
        budget = self.max_num_batched_tokens
        self._plan_drafts(decoding, self._expected_beside(prefilling, len(decoding)))
        decoding.sort(key=lambda s: (s.last_served, s.order))
        needed = [sequence.num_missing for sequence in decoding]
        others = sum(needed)
        for sequence, least in zip(decoding, needed, strict=True):
            others -= least
            if sequence in self.running:
                # Drafts take what the others leave.
                budget -= self._serve(sequence, max(budget - others, min(budget, least)), work)
        prefilling = [sequence for sequence in prefilling if sequence in self.running]
        prefilling += self._admit_waiting(budget - sum(sequence.min_tokens for sequence in prefilling))
        for sequence, share in self._shares(prefilling, budget):
            if sequence in self.running:
                if share >= sequence.num_missing:  # the rest of its prompt, and what it drafts behind it
                    self._plan_drafts([sequence], self.max_num_batched_tokens - budget + sequence.num_missing - 1)
                    share = budget
                budget -= self._serve(sequence, min(share, budget), work)
        assert work or not (self.running or self.waiting), "nothing can be scheduled"
        return work

    def _expected_beside(self, prefilling: Sequence[DecodingSequence], num_decoding: int) -> int:
        """Tokens of prompts that the next forward is likely to hold beside sequences that decode (see `_shares`)."""
        lacking = sum(sequence.num_missing for sequence in prefilling)
        if self.waiting and len(self.running) < self.max_num_seqs:
            lacking += self.waiting[0].num_missing
        most = max(self.prefill_chunk, _PREFILL_PER_DECODING_TOKEN * num_decoding)
        return min(lacking, most, max(self.max_num_batched_tokens - num_decoding, 0))

    def _shares(self, prefilling: list[DecodingSequence], budget: int) -> list[tuple[DecodingSequence, int]]:
        """Tokens of this forward for each sequence that prefills, the oldest first.

        Half of them are for the oldest, so that nobody starves; the others are served shortest first, so that a short prompt
        does not wait for a long one. Beside sequences that decode, all of them together take a few times the tokens of those:
        a long prompt slows the others down, and does not stop them.
        """
        if not prefilling:
            return []
        num_decoding = self.max_num_batched_tokens - budget
        beside = max(self.prefill_chunk, _PREFILL_PER_DECODING_TOKEN * num_decoding)
        limit = beside if num_decoding else _PREFILL_ALONE * self.prefill_chunk
        limit = min(budget, max(limit, 2 * max(sequence.min_tokens for sequence in prefilling)))
        oldest, *others = sorted(prefilling, key=lambda s: s.order)
        reserved = min(oldest.num_missing, max(limit // 2, oldest.min_tokens))
        left, shares = limit - reserved, []
        for sequence in sorted(others, key=lambda s: (s.num_missing, s.order)):
            share = min(sequence.num_missing, left)
            if share >= sequence.min_tokens:
                shares.append((sequence, share))
                left -= share
        return [(oldest, reserved + left), *shares]

    def publish(self, sequence: DecodingSequence) -> None:
        """Share the cache blocks that the last forward made final."""
        if not self.prefix_cache:
            return
        full = sequence.committed // self.cache_block_size
        if full > sequence.num_published:
            hashes = sequence.prefix_hashes.extend(sequence.tokens, sequence.committed)
            ready = range(sequence.num_published, full)
            new = [index for index in ready if self.pool.publish(sequence.block_table[index], hashes[index])]
            sequence.num_published = full
            if self.pool.events is not None:
                self.pool.events += self._stored(sequence, new)

    def _stored(self, sequence: DecodingSequence, indices: Sequence[int]) -> Iterator[BlocksStored]:
        """Events of newly published cache blocks, by their indices in the block table: one for each run of neighbours."""
        hashes, size, adapter = sequence.prefix_hashes.hashes, self.cache_block_size, sequence.request.adapter
        for _, run in groupby(enumerate(indices), lambda each: each[1] - each[0]):
            start, *others = [index for _, index in run]
            stop = start + len(others) + 1
            yield BlocksStored(
                tuple(hashes[start:stop]),
                hashes[start - 1] if start else None,
                tuple(sequence.tokens[start * size : stop * size]),
                None if adapter is None else adapter.name,
            )

    def _serve(self, sequence: DecodingSequence, budget: int, work: list[tuple[DecodingSequence, ScheduledSequence]]) -> int:
        """Put it into the forward if there is room for its tokens and their cache blocks; returns how many tokens."""
        scheduled = sequence.schedule(budget)
        if scheduled is None or not self._provide(sequence, scheduled.stop, work):
            return 0
        sequence.last_served = self.clock
        work.append((sequence, scheduled))
        return scheduled.stop - scheduled.start

    def _provide(self, sequence: DecodingSequence, stop: int, work: list[tuple[DecodingSequence, ScheduledSequence]]) -> bool:
        """Allocate cache blocks for all positions below `stop`."""
        while len(sequence.block_table) * self.cache_block_size < stop:
            cache_block = self.pool.allocate(sequence.block_table[-1] if sequence.block_table else None)
            if cache_block is not None:
                sequence.block_table.append(cache_block)
                continue
            scheduled = [each for each, _ in work]
            newer = [s for s in self.running if s.order > sequence.order and s not in scheduled]
            if not newer:
                return False
            self.preempt(max(newer, key=lambda s: s.order))
        return True

    def _admit_waiting(self, budget: int) -> list[DecodingSequence]:
        """Start those that wait, in order, until one does not fit."""
        admitted: list[DecodingSequence] = []
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_num_seqs or budget <= 0:
                break
            if self._is_being_prefilled(sequence):
                continue
            if not self._admit(sequence, budget):
                break
            admitted.append(sequence)
            budget -= sequence.min_tokens
        return admitted

    def _is_being_prefilled(self, sequence: DecodingSequence) -> bool:
        """Whether a running sequence is about to publish at least half of what this one lacks, as of several samples of a
        prompt: then it waits for that."""
        if not self.prefix_cache:
            return False
        hashes = sequence.prefix_hashes.extend(sequence.tokens, sequence.num_final)
        middle = (len(self.pool.find_cached(hashes)) + len(hashes)) // 2
        prefix_hash = hashes[middle : middle + 1]
        return bool(prefix_hash) and any(s.prefix_hashes.hashes[middle : middle + 1] == prefix_hash for s in self.running)

    def _admit(self, sequence: DecodingSequence, budget: int) -> bool:
        """Start a waiting sequence if all it has to compute now fits the available cache blocks, beside what others lack."""
        cache_blocks = self._cached_blocks(sequence)
        self.pool.touch(cache_blocks)
        sequence.committed = len(cache_blocks) * self.cache_block_size
        needed = sum(-(-s.reach // self.cache_block_size) - len(s.block_table) for s in self.running if s.is_prefilling)
        needed += -(-sequence.reach // self.cache_block_size) - len(cache_blocks)
        if needed > self.pool.num_available or sequence.schedule(budget) is None:
            self.pool.free(cache_blocks)
            sequence.committed = 0
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.start(sequence.committed) and self.prefix_cache:
            self.queried_tokens += len(sequence.request.prefix)
            self.hit_tokens += sequence.committed
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
