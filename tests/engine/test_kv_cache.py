"""The page pool against a plain model of it, in any order of calls; names of pages by content."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unmask.engine.kv_cache import BlockPool, PrefixHashes

NAMES = [bytes([n]) for n in range(6)]


class PoolMachine(RuleBasedStateMachine):
    """Sequences take pages, publish them in order, share each other's and let go.

    The model: what every sequence holds, the name of every published page, and which nameless ones are free, in a list of
    cached pages from the least to the most recently released.
    """

    @initialize(num_cache_blocks=st.integers(1, 9))
    def start(self, num_cache_blocks: int) -> None:
        self.pool = BlockPool(num_cache_blocks)
        self.num_cache_blocks = num_cache_blocks
        self.held: list[list[int]] = []
        self.named: dict[int, bytes] = {}
        self.cached: list[int] = []

    @property
    def ref_count(self) -> Counter[int]:
        return Counter(page for pages in self.held for page in pages)

    @property
    def free(self) -> set[int]:
        return set(range(self.num_cache_blocks)) - set(self.ref_count) - set(self.cached)

    @rule(which=st.integers(0, 9))
    def allocate(self, which: int) -> None:
        pages = self.held[which] if which < len(self.held) else []
        after = pages[-1] if pages else None
        free, writable = self.free, set(self.ref_count)
        page = self.pool.allocate(after)
        if page is None:
            assert not free
            assert not self.cached
            return
        assert page not in writable, "a page that somebody holds was handed out for writing"
        if free:
            assert page in free, "content worth keeping was dropped while there was a free page"
            assert after is None or after + 1 not in free or page == after + 1, "its neighbour was free"
        else:
            assert page == self.cached.pop(0), "not the least recently used"
            del self.named[page]
        assert self.pool.match([bytes([255])]) == []
        if not pages:
            self.held.append(pages)
        pages.append(page)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9), name=st.sampled_from(NAMES))
    def publish(self, which: int, name: bytes) -> None:
        pages = self.held[which % len(self.held)]
        private = [page for page in pages if page not in self.named]
        if not private:
            return
        self.pool.publish(private[0], name)
        if name not in self.named.values():
            self.named[private[0]] = name

    @rule(names=st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    def share(self, names: list[bytes]) -> None:
        known = {name: page for page, name in self.named.items()}
        expected = []
        for name in names:
            if name not in known:
                break
            expected.append(known[name])
        pages = self.pool.match(names)
        assert pages == expected
        if pages:
            self.pool.hold(pages)
            self.cached = [page for page in self.cached if page not in pages]
            self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        pages = self.held.pop(which % len(self.held))
        self.pool.release(pages)
        self.cached += [page for page in reversed(pages) if page in self.named and page not in self.ref_count]

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        ref_count = self.ref_count
        assert self.pool.num_held == len(ref_count)
        assert self.pool.num_available == self.num_cache_blocks - len(ref_count) == len(self.free) + len(self.cached)
        assert [self.pool.ref_count(page) for page in range(self.num_cache_blocks)] == [
            ref_count[p] for p in range(self.num_cache_blocks)
        ]
        assert {page for page in range(self.num_cache_blocks) if self.pool.is_published(page)} == set(self.named)
        assert all(count == 1 or page in self.named for page, count in ref_count.items()), "only published pages are shared"


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)


def test_check_notices_a_leak() -> None:
    """The checks that the suite and the soak rely on do fail."""
    pool = BlockPool(4)
    page = pool.allocate(None)
    assert page is not None
    pool.publish(page, b"a")
    pool.release([page])
    pool.check()
    for damage in (
        lambda broken: broken._free.pop(),
        lambda broken: broken._free.add(page),
        lambda broken: broken._name_of.clear(),
        lambda broken: broken._holders.update({page: 1}),
        lambda broken: broken._page_of.clear(),
    ):
        broken = BlockPool(4)
        assert broken.allocate(None) == page
        broken.publish(page, b"a")
        broken.release([page])
        damage(broken)  # type: ignore[no-untyped-call]
        with pytest.raises(AssertionError):
            broken.check()


def test_what_must_not_happen_is_refused() -> None:
    pool = BlockPool(3)
    page = pool.allocate(None)
    assert page is not None
    with pytest.raises(AssertionError, match="is not published"):
        pool.hold([page])
    pool.publish(page, b"a")
    with pytest.raises(AssertionError, match="is published already"):
        pool.publish(page, b"b")
    pool.hold([page])
    with pytest.raises(AssertionError, match="is shared"):
        pool.publish(page, b"b")


def test_pages_of_sequences_that_grow_together_stay_neighbours() -> None:
    """Each starts where there is room behind it."""
    pool = BlockPool(16)
    ends = [pool.allocate(None) for _ in range(2)]
    for _ in range(5):
        grown = [pool.allocate(end) for end in ends]
        assert grown == [end + 1 for end in ends if end is not None]
        ends = grown


def test_the_deepest_page_of_a_prefix_is_reused_first() -> None:
    pool = BlockPool(3)
    pages = []
    for name in NAMES[:3]:
        page = pool.allocate(pages[-1] if pages else None)
        assert page is not None
        pool.publish(page, name)
        pages.append(page)
    pool.release(pages)
    assert pool.match(NAMES[:3]) == pages
    assert pool.allocate(None) == pages[2]
    assert pool.match(NAMES[:3]) == pages[:2]


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6))


@given(SIZES, st.lists(st.integers(0, 2), min_size=30, max_size=30), st.integers(0, 29), st.data())
def test_a_name_stands_for_all_that_its_page_depends_on(
    sizes: tuple[int, int], tokens: list[int], changed: int, data: st.DataObject
) -> None:
    """Pages share a name exactly when all tokens up to the end of the block of their last token are equal."""
    block_size, cache_block_size = sizes
    final = len(tokens) // block_size * block_size
    other = list(tokens)
    other[changed] += 1
    names, others = (PrefixHashes(block_size, cache_block_size).extend(t, final) for t in (tokens, other))
    assert len(names) == len(others) == final // cache_block_size
    assert len(set(names)) == len(names), "the place counts"
    for page, (name, another) in enumerate(zip(names, others, strict=True)):
        last = (page + 1) * cache_block_size - 1
        seen = (last // block_size + 1) * block_size
        assert (name == another) == (changed >= seen)
    steps = data.draw(st.lists(st.integers(0, final // block_size), max_size=4).map(sorted))
    digests = PrefixHashes(block_size, cache_block_size)
    for blocks in steps:
        digests.extend(tokens, blocks * block_size)
        assert len(digests.names) == blocks * block_size // cache_block_size
    assert digests.extend(tokens, final) == names, "however it grew"


def test_pages_smaller_than_a_block_do_not_share_when_only_the_rest_of_the_block_differs() -> None:
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
