"""Preference pairs as rows: the chosen answer in one row, the rejected one in the next.

Owns which pairs are dropped. Knows neither what preferences are for nor what noise is applied.
"""

from __future__ import annotations

import numpy as np

from unmask.data.documents import Sample, SampleStream
from unmask.data.packing import Overlong, Packer, Segment
from unmask.errors import ConfigError


class PairPacker(Packer):
    """Packer of pairs of rows, one document in each: row 2i is the chosen one of a pair and row 2i + 1 the rejected one.

    Both rows have the epoch and the ordinal of their sample, so noise that is keyed by these is the same for both. A pair is
    dropped as a whole, when a side has nothing maskable (perhaps because it was truncated) or the sides are equal.
    """

    group_size = 2

    def __init__(self, stream: SampleStream, row_length: int, *, pad_id: int, overlong: Overlong = "truncate") -> None:
        """Pack a stream of pairs.

        Args:
            stream: samples whose documents have a `rejected` one; the packer moves it.
            row_length: tokens of a row, a multiple of the block size.
            pad_id: token id to fill rows with.
            overlong: treatment of a pair with a side longer than a row. "truncate": what does not fit is cut off;
                "drop": the pair is dropped.

        Raises:
            ConfigError: a length, an id or a choice that breaks these rules.
        """
        if overlong == "split":
            raise ConfigError("overlong split: a preference cannot be split over rows; use truncate or drop")
        super().__init__(stream, row_length, pad_id=pad_id, overlong=overlong)

    def _next_group(self) -> list[list[Segment]]:
        rows = [[segment] for segment in self._waiting] if self._read() else []
        self._waiting.clear()
        return rows

    def _segments(self, sample: Sample) -> list[Segment]:
        chosen, rejected = sample.document, sample.document.rejected
        assert rejected is not None, "a stream of pairs is opened with pairs=True"
        left, right = self._fitted(sample, chosen), self._fitted(sample, rejected)
        if left and right and np.array_equal(left.tokens, right.tokens) and np.array_equal(left.maskable, right.maskable):
            left = right = None
        return self._counted([chosen, rejected], [left, right])
