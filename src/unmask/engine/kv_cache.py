"""The KV cache's bookkeeping: which cache blocks are used, shared, kept for later, or free.

Owns the states of a fixed number of cache blocks, and the hashes by which equal prefixes find each other. Knows neither
tensors nor requests: a cache block is a number, its content a hash. The memory is allocated by `Backend.new_kv_cache`, which
`Runner` calls.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile

import numpy as np


class PrefixHashes:
    """Prefix hashes of a sequence's full cache blocks.

    Within a diffusion block every token sees every other, so what a cache block holds depends on all tokens up to the end of
    the diffusion block that its last token is in. Its prefix hash is one of those tokens, the diffusion block size, its
    index in the block table, and a `key` (at most 64 bytes) that tells apart what computes it: an adapter's digest.
    """

    def __init__(self, block_size: int, cache_block_size: int, key: bytes = b"") -> None:
        self.block_size, self.cache_block_size = block_size, cache_block_size
        self._chain = blake2b(block_size.to_bytes(4, "little"), digest_size=16, key=key)
        self._blocks: list[bytes] = []
        self.hashes: list[bytes] = []

    def extend(self, tokens: Sequence[int], num_final: int) -> list[bytes]:
        """Hashes of all cache blocks that the first `num_final` tokens (whole diffusion blocks, final) fill."""
        while (len(self._blocks) + 1) * self.block_size <= num_final:
            start = len(self._blocks) * self.block_size
            self._chain.update(np.asarray(tokens[start : start + self.block_size], dtype=np.int64).tobytes())
            self._blocks.append(self._chain.digest())
        num_full = len(self._blocks) * self.block_size // self.cache_block_size
        self.hashes += [self._hash(index) for index in range(len(self.hashes), num_full)]
        return self.hashes

    def _hash(self, index: int) -> bytes:
        last_block = ((index + 1) * self.cache_block_size - 1) // self.block_size
        return self._blocks[last_block] + index.to_bytes(4, "little")


@dataclass(frozen=True)
class BlocksStored:
    """Cache blocks of one sequence, one after the other, that others can share from now on.

    Attributes:
        hashes: prefix hashes.
        parent: the prefix hash of the cache block before them; None: they are the first.
        tokens: what they hold.
        adapter: name of the adapter that computed them; None: the model alone.
    """

    hashes: tuple[bytes, ...]
    parent: bytes | None
    tokens: tuple[int, ...]
    adapter: str | None = None


@dataclass(frozen=True)
class BlockRemoved:
    """A cache block whose content is gone.

    Attributes:
        prefix_hash: of the content.
    """

    prefix_hash: bytes


CacheEvent = BlocksStored | BlockRemoved


class BlockPool:
    """Cache blocks in one of three states: used (with a reference count), cached (unused, content worth keeping), free.

    A cache block is *published* under its prefix hash when its content is final. A published one is never written again and may
    be shared; when its last user frees it, it stays cached until its memory is needed, the least recently used first.

    Where memory is taken as it is written, a cache block costs memory from its first use on. A pool that has written
    `num_retained` of them writes another one only when those that it has written are all used: cached ones are given up first.

    Args:
        num_cache_blocks: how many there are.
        num_retained: how many may be written before cached ones are given up; None: all.
        record_events: keep `events`.

    Attributes:
        events: what can be found has changed so, in order, since somebody emptied the list; None: not recorded.
    """

    def __init__(self, num_cache_blocks: int, num_retained: int | None = None, *, record_events: bool = False) -> None:
        self.num_cache_blocks = num_cache_blocks
        self.events: list[CacheEvent] | None = [] if record_events else None
        self._num_retained = num_cache_blocks if num_retained is None else num_retained
        self._unwritten = set(range(num_cache_blocks))
        self._free: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._ref_counts: dict[int, int] = {}
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Cache blocks that can be allocated: free and cached ones."""
        return len(self._unwritten) + len(self._free) + len(self._cached)

    @property
    def num_written(self) -> int:
        """Cache blocks that have been used at any time."""
        return self.num_cache_blocks - len(self._unwritten)

    @property
    def num_used(self) -> int:
        """Cache blocks with a reference count of at least one."""
        return len(self._ref_counts)

    def find_cached(self, prefix_hashes: Sequence[bytes]) -> list[int]:
        """Published cache blocks of the longest known prefix of `prefix_hashes`; no reference is taken."""
        return [self._block_of[prefix_hash] for prefix_hash in takewhile(self._block_of.__contains__, prefix_hashes)]

    def touch(self, cache_blocks: Sequence[int]) -> None:
        """One more reference to each of these published cache blocks."""
        for cache_block in cache_blocks:
            assert cache_block in self._hash_of, f"cache block {cache_block} is not published"
            self._cached.pop(cache_block, None)
            self._ref_counts[cache_block] = self._ref_counts.get(cache_block, 0) + 1

    def allocate(self, after: int | None) -> int | None:
        """A cache block to write, with one reference: `after + 1` if that may be taken, so that a sequence's blocks stay
        neighbours.

        Returns:
            The cache block; None when every one is used.
        """
        takes_unwritten = self.num_written < self._num_retained or not (self._free or self._cached)
        unwritten = self._unwritten if takes_unwritten else set()
        if after is not None and (after + 1 in self._free or after + 1 in unwritten):
            cache_block = after + 1
        elif self._free or unwritten:
            cache_block = _middle_of_largest_gap(self._free | unwritten)
        elif self._cached:
            cache_block, _ = self._cached.popitem(last=False)
            prefix_hash = self._hash_of.pop(cache_block)
            del self._block_of[prefix_hash]
            if self.events is not None:
                self.events.append(BlockRemoved(prefix_hash))
        else:
            return None
        self._free.discard(cache_block)
        self._unwritten.discard(cache_block)
        self._ref_counts[cache_block] = 1
        return cache_block

    def publish(self, cache_block: int, prefix_hash: bytes) -> bool:
        """The content of `cache_block` is final from now on. A second cache block of the same content stays private.

        Returns:
            Whether it is the first of this content, which can be found from now on.
        """
        assert self._ref_counts.get(cache_block) == 1, f"cache block {cache_block} is shared"
        assert cache_block not in self._hash_of, f"cache block {cache_block} is published already"
        is_new = prefix_hash not in self._block_of
        if is_new:
            self._block_of[prefix_hash], self._hash_of[cache_block] = cache_block, prefix_hash
        return is_new

    def free(self, cache_blocks: Sequence[int]) -> None:
        """One reference less to each; the last of a prefix is the first to be reused."""
        for cache_block in reversed(cache_blocks):
            self._ref_counts[cache_block] -= 1
            if self._ref_counts[cache_block] == 0:
                del self._ref_counts[cache_block]
                if cache_block in self._hash_of:
                    self._cached[cache_block] = None
                else:
                    self._free.add(cache_block)

    def is_published(self, cache_block: int) -> bool:
        """Whether the content is final."""
        return cache_block in self._hash_of

    def ref_count(self, cache_block: int) -> int:
        """How many sequences use this cache block."""
        return self._ref_counts.get(cache_block, 0)

    def check(self) -> None:
        """Every cache block is in exactly one state, and the two tables of hashes agree. For tests and the soak."""
        states = [self._unwritten, self._free, set(self._cached), set(self._ref_counts)]
        assert sum(map(len, states)) == self.num_cache_blocks, "a cache block is in two states, or in none"
        assert set.union(*states) == set(range(self.num_cache_blocks)), "a cache block is lost"
        assert all(count > 0 for count in self._ref_counts.values()), "a used cache block has no reference"
        assert {block: name for name, block in self._block_of.items()} == self._hash_of, "the tables of hashes differ"
        assert set(self._cached) <= set(self._hash_of), "a cached block has no hash"


def _middle_of_largest_gap(free: set[int]) -> int:
    """A free cache block with many free ones after it: the middle of the longest run, or its start when that is 0 or the run is
    short."""
    ordered = np.array(sorted(free))
    longest = max(np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1), key=len)
    return int(longest[0 if longest[0] == 0 or len(longest) < 3 else len(longest) // 2])
