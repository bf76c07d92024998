"""The block pool against a plain model of it, in any order of calls; prefix hashes by content."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unmask.engine.kv_cache import BlockPool, PrefixHashes

HASHES = [bytes([n]) for n in range(6)]


class PoolMachine(RuleBasedStateMachine):
    """Sequences take cache blocks, publish them in order, share each other's and let go.

    The model: the block table of every sequence, the prefix hash of every published cache block, and which are free, in a list
    of cached ones from the least to the most recently released.
    """

    @initialize(num_cache_blocks=st.integers(1, 9), num_retained=st.none() | st.integers(0, 9))
    def start(self, num_cache_blocks: int, num_retained: int | None) -> None:
        self.pool = BlockPool(num_cache_blocks, num_retained)
        self.num_cache_blocks = num_cache_blocks
        self.num_retained = num_cache_blocks if num_retained is None else num_retained
        self.written: set[int] = set()
        self.block_tables: list[list[int]] = []
        self.named: dict[int, bytes] = {}
        self.cached: list[int] = []

    @property
    def ref_count(self) -> Counter[int]:
        return Counter(block for blocks in self.block_tables for block in blocks)

    @property
    def free(self) -> set[int]:
        return set(range(self.num_cache_blocks)) - set(self.ref_count) - set(self.cached)

    @rule(which=st.integers(0, 9))
    def allocate(self, which: int) -> None:
        blocks = self.block_tables[which] if which < len(self.block_tables) else []
        after = blocks[-1] if blocks else None
        free, writable = self.free, set(self.ref_count)
        if len(self.written) >= self.num_retained and (self.cached or free & self.written):
            free &= self.written
        block = self.pool.allocate(after)
        if block is None:
            assert not free
            assert not self.cached
            return
        assert block not in writable, "a cache block that somebody uses was handed out for writing"
        if free:
            assert block in free, "content worth keeping was dropped while there was a free block"
            assert after is None or after + 1 not in free or block == after + 1, "its neighbour was free"
        else:
            assert block == self.cached.pop(0), "not the least recently used"
            del self.named[block]
        self.written.add(block)
        assert self.pool.find_cached([bytes([255])]) == []
        if not blocks:
            self.block_tables.append(blocks)
        blocks.append(block)

    @precondition(lambda self: self.block_tables)
    @rule(which=st.integers(0, 9), name=st.sampled_from(HASHES))
    def publish(self, which: int, name: bytes) -> None:
        blocks = self.block_tables[which % len(self.block_tables)]
        private = [block for block in blocks if block not in self.named]
        if not private:
            return
        self.pool.publish(private[0], name)
        if name not in self.named.values():
            self.named[private[0]] = name

    @rule(names=st.lists(st.sampled_from(HASHES), max_size=4, unique=True))
    def share(self, names: list[bytes]) -> None:
        known = {name: block for block, name in self.named.items()}
        expected = []
        for name in names:
            if name not in known:
                break
            expected.append(known[name])
        blocks = self.pool.find_cached(names)
        assert blocks == expected
        if blocks:
            self.pool.touch(blocks)
            self.cached = [block for block in self.cached if block not in blocks]
            self.block_tables.append(blocks)

    @precondition(lambda self: self.block_tables)
    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        blocks = self.block_tables.pop(which % len(self.block_tables))
        self.pool.free(blocks)
        self.cached += [block for block in reversed(blocks) if block in self.named and block not in self.ref_count]

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        ref_count = self.ref_count
        assert self.pool.num_used == len(ref_count)
        assert self.pool.num_written == len(self.written)
        assert self.pool.num_available == self.num_cache_blocks - len(ref_count) == len(self.free) + len(self.cached)
        assert [self.pool.ref_count(block) for block in range(self.num_cache_blocks)] == [
            ref_count[p] for p in range(self.num_cache_blocks)
        ]
        assert {block for block in range(self.num_cache_blocks) if self.pool.is_published(block)} == set(self.named)
        assert all(count == 1 or block in self.named for block, count in ref_count.items()), "only published blocks are shared"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)


def test_check_notices_a_leak() -> None:
    """The checks that the suite and the soak rely on do fail."""
    pool = BlockPool(4)
    block, free = pool.allocate(None), pool.allocate(None)
    assert block is not None
    assert free is not None
    pool.publish(block, b"a")
    pool.free([block])
    pool.check()
    used = pool.allocate(None)
    pool.free([free])
    tables = [name for name, value in vars(pool).items() if isinstance(value, (set, dict))]
    assert used is not None
    assert all(vars(pool)[name] for name in tables)
    for name in tables:
        broken = deepcopy(pool)
        vars(broken)[name].clear()
        with pytest.raises(AssertionError):
            broken.check()


def test_memory_is_what_was_used_at_a_time_and_the_retained_prefixes() -> None:
    """Requests one after the other, each with a prefix of its own, take no more cache blocks than are retained."""
    pool, hashes = BlockPool(100, num_retained=10), iter(range(1000))

    def serve(num_blocks: int) -> None:
        blocks = [block for _ in range(num_blocks) if (block := pool.allocate(None)) is not None]
        for block in blocks:
            pool.publish(block, next(hashes).to_bytes(4, "little"))
        pool.free(blocks)

    for _ in range(20):
        serve(3)
    assert pool.num_written == 10
    serve(40)
    assert pool.num_written == 40, "what one request needs is there"
    for _ in range(20):
        serve(3)
    assert pool.num_written == 40


def test_what_must_not_happen_is_refused() -> None:
    pool = BlockPool(3)
    block = pool.allocate(None)
    assert block is not None
    with pytest.raises(AssertionError, match="is not published"):
        pool.touch([block])
    pool.publish(block, b"a")
    with pytest.raises(AssertionError, match="is published already"):
        pool.publish(block, b"b")
    pool.touch([block])
    with pytest.raises(AssertionError, match="is shared"):
        pool.publish(block, b"b")


def test_cache_blocks_of_sequences_that_grow_together_stay_neighbours() -> None:
    """Each starts where there is room behind it."""
    pool = BlockPool(16)
    ends = [pool.allocate(None) for _ in range(2)]
    for _ in range(5):
        grown = [pool.allocate(end) for end in ends]
        assert grown == [end + 1 for end in ends if end is not None]
        ends = grown


def test_the_deepest_cache_block_of_a_prefix_is_reused_first() -> None:
    pool = BlockPool(3)
    blocks = []
    for name in HASHES[:3]:
        block = pool.allocate(blocks[-1] if blocks else None)
        assert block is not None
        pool.publish(block, name)
        blocks.append(block)
    pool.free(blocks)
    assert pool.find_cached(HASHES[:3]) == blocks
    assert pool.allocate(None) == blocks[2]
    assert pool.find_cached(HASHES[:3]) == blocks[:2]


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(SIZES, st.lists(st.integers(0, 2), min_size=30, max_size=30), st.integers(0, 29), st.data())
def test_a_prefix_hash_stands_for_all_that_its_cache_block_depends_on(
    sizes: tuple[int, int], tokens: list[int], changed: int, data: st.DataObject
) -> None:
    """Cache blocks share a prefix hash exactly when all tokens up to the end of the block of their last token are equal."""
    block_size, cache_block_size = sizes
    final = len(tokens) // block_size * block_size
    other = list(tokens)
    other[changed] += 1
    names, others = (PrefixHashes(block_size, cache_block_size).extend(t, final) for t in (tokens, other))
    assert len(names) == len(others) == final // cache_block_size
    assert len(set(names)) == len(names), "the place counts"
    for block, (name, another) in enumerate(zip(names, others, strict=True)):
        last = (block + 1) * cache_block_size - 1
        seen = (last // block_size + 1) * block_size
        assert (name == another) == (changed >= seen)
    steps = data.draw(st.lists(st.integers(0, final // block_size), max_size=4).map(sorted))
    prefix_hashes = PrefixHashes(block_size, cache_block_size)
    for blocks in steps:
        prefix_hashes.extend(tokens, blocks * block_size)
        assert len(prefix_hashes.hashes) == blocks * block_size // cache_block_size
    assert prefix_hashes.extend(tokens, final) == names, "however it grew"


def test_cache_blocks_smaller_than_a_block_do_not_share_when_only_the_rest_of_the_block_differs() -> None:
    first, second = ([1, 2, 3, 4, 5, 6, 7, end] for end in (8, 9))
    assert not set(PrefixHashes(8, 2).extend(first, 8)) & set(PrefixHashes(8, 2).extend(second, 8))
    assert PrefixHashes(4, 2).extend(first, 8)[:2] == PrefixHashes(4, 2).extend(second, 8)[:2]


def test_block_sizes_do_not_share() -> None:
    """The same tokens under another block size have other keys and values."""
    tokens = list(range(8))
    assert not set(PrefixHashes(4, 4).extend(tokens, 8)) & set(PrefixHashes(2, 4).extend(tokens, 8))


def test_nothing_is_named_before_its_block_is_final() -> None:
    assert PrefixHashes(4, 2).extend(list(range(8)), 7) == PrefixHashes(4, 2).extend(list(range(8)), 4)
    assert PrefixHashes(4, 8).extend(list(range(8)), 4) == []
