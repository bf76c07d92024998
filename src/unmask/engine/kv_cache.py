"""Pages of keys and values: who holds which, which are shared, which may be reused.

Owns the bookkeeping of a fixed number of pages. Knows neither tensors nor requests: a page is a number, its content a digest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


class PrefixHashes:
    """Names of a sequence's full pages, by content.

    Within a block every token sees every other, so what a page holds depends on all tokens up to the end of the block that
    its last token is in; its name is a digest of those, the block size, and its place.
    """

    def __init__(self, block_size: int, cache_block_size: int) -> None:
        self.block_size, self.cache_block_size = block_size, cache_block_size
        self._chain = blake2b(block_size.to_bytes(4, "little"), digest_size=16)
        self._blocks: list[bytes] = []
        self.names: list[bytes] = []

    def extend(self, tokens: Sequence[int], num_final: int) -> list[bytes]:
        """Names of all pages that the first `num_final` tokens (whole blocks, final) fill."""
        while (len(self._blocks) + 1) * self.block_size <= num_final:
            start = len(self._blocks) * self.block_size
            self._chain.update(np.asarray(tokens[start : start + self.block_size], dtype=np.int64).tobytes())
            self._blocks.append(self._chain.digest())
        full = len(self._blocks) * self.block_size // self.cache_block_size
        self.names += [self._name(page) for page in range(len(self.names), full)]
        return self.names

    def _name(self, page: int) -> bytes:
        last_block = ((page + 1) * self.cache_block_size - 1) // self.block_size
        return self._blocks[last_block] + page.to_bytes(4, "little")


class BlockPool:
    """Pages in one of three states: held (a count of ref_count), cached (nobody's, content worth keeping), free.

    A page is *published* under the digest of its content when that is final; a published page is never written again, may
    have several ref_count, and when the last one lets go it stays cached until its place is needed, the least recently used
    first.

    Args:
        num_cache_blocks: pages there are.
    """

    def __init__(self, num_cache_blocks: int) -> None:
        self.num_cache_blocks = num_cache_blocks
        self._free = set(range(num_cache_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Pages that can be had without taking one from a holder."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages with at least one holder."""
        return len(self._holders)

    def match(self, names: Sequence[bytes]) -> list[int]:
        """Published pages of the longest known prefix of `names`; nothing is held yet."""
        pages = []
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """One more holder for each of these published pages."""
        for page in pages:
            assert page in self._name_of, f"page {page} is not published"
            self._cached.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def allocate(self, after: int | None) -> int | None:
        """A page to write, held once: the one behind `after` if it is free, so that a sequence's pages stay neighbours.

        Returns:
            The page; None when every page is held.
        """
        page = self._pick(after)
        if page is None:
            return None
        self._forget(page)
        self._free.discard(page)
        self._holders[page] = 1
        return page

    def publish(self, page: int, name: bytes) -> None:
        """The content of `page` is final from now on. A second page of the same content stays private."""
        assert self._holders.get(page) == 1, f"page {page} is shared"
        assert page not in self._name_of, f"page {page} is published already"
        if name not in self._page_of:
            self._page_of[name], self._name_of[page] = page, name

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each; the deepest page is the first to be reused."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                del self._holders[page]
                if page in self._name_of:
                    self._cached[page] = None
                else:
                    self._free.add(page)

    def is_published(self, page: int) -> bool:
        """Whether nobody may write this page."""
        return page in self._name_of

    def ref_count(self, page: int) -> int:
        """How many sequences hold this page."""
        return self._holders.get(page, 0)

    def check(self) -> None:
        """Every page is in exactly one state, and the two name tables agree. For tests and the soak."""
        held = set(self._holders)
        states = [self._free, set(self._cached), held]
        assert sum(map(len, states)) == self.num_cache_blocks, "a page is in two states, or in none"
        assert set.union(*states) == set(range(self.num_cache_blocks)), "a page is lost"
        assert all(count > 0 for count in self._holders.values()), "a page is held by nobody"
        assert {page: name for name, page in self._page_of.items()} == self._name_of, "the name tables differ"
        assert set(self._cached) <= set(self._name_of), "a cached page has no name"

    def _pick(self, after: int | None) -> int | None:
        if after is not None and after + 1 in self._free:
            return after + 1
        if self._free:
            return _middle_of_largest_gap(self._free)
        return next(iter(self._cached), None)

    def _forget(self, page: int) -> None:
        if page in self._cached:
            del self._cached[page]
            del self._page_of[self._name_of.pop(page)]


def _middle_of_largest_gap(free: set[int]) -> int:
    """A free page with many free ones behind it: the middle of the longest run, its start when that begins at page 0 or the
    run is short."""
    best_start, best_length, start = 0, 0, None
    ordered = sorted(free)
    for i, page in enumerate(ordered):
        if i == 0 or page != ordered[i - 1] + 1:
            start = page
        assert start is not None
        if page - start + 1 > best_length:
            best_start, best_length = start, page - start + 1
    return best_start if best_start == 0 or best_length < 3 else best_start + best_length // 2
