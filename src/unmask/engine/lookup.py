"""Prompt lookup: draft tokens that continue an earlier occurrence of what the text ends in.

Owns the index of the text, kept token by token. Knows token ids only: what a draft is worth is `engine.drafting`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHORTEST, _LONGEST = 2, 8
_NUM_COMPARED = 8
"""Earlier occurrences of the last two tokens that are compared: the most recent ones."""
_NONE = -1


class PromptLookup:
    """A text, and where what it ends in has occurred before: the longest of the most recent matches.

    A match is followed for as long as the text goes on as it did there. Memory: an integer and at most one entry of a
    dictionary for each token.

    Attributes:
        length: tokens of the match, those followed since among them; 0: there is none.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._last: dict[int, int] = {}  # of two tokens in a row: the position behind their last occurrence
        self._before: list[int] = [_NONE]  # by position: the one behind the occurrence before
        self._next, self.length = _NONE, 0
        for token in tokens:
            self._add(token)
        self._search()

    @property
    def next(self) -> int | None:
        """The token that followed last time; None without a match."""
        return self._tokens[self._next] if self.length else None

    def append(self, token: int) -> None:
        """The text goes on with this token."""
        goes_on = self.next == token
        self._add(token)
        if goes_on:
            self._next, self.length = self._next + 1, self.length + 1
        else:
            self._search()

    def draft(self, count: int) -> list[int]:
        """What followed last time, at most `count` tokens; a repetition is taken to go on."""
        if not self.length:
            return []
        found = self._tokens[self._next : self._next + count]
        period = len(self._tokens) - self._next
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _add(self, token: int) -> None:
        self._tokens.append(token)
        if len(self._tokens) >= _SHORTEST:
            self._before.append(self._last.get(self._key(), _NONE))
            self._last[self._key()] = len(self._tokens)

    def _key(self) -> int:
        return self._tokens[-2] << 32 | self._tokens[-1]

    def _search(self) -> None:
        """The longest of the most recent matches; of equals, the most recent."""
        self._next, self.length = _NONE, 0
        position = self._before[len(self._tokens) - 1] if len(self._tokens) >= _SHORTEST else _NONE
        for _ in range(_NUM_COMPARED):
            if position == _NONE or self.length == _LONGEST:
                return
            length = self._common(position)
            if length > self.length:
                self._next, self.length = position, length
            position = self._before[position - 1]

    def _common(self, stop: int) -> int:
        """How many tokens before `stop` are those that the text ends in."""
        length = _SHORTEST
        while length < min(_LONGEST, stop) and self._tokens[stop - 1 - length] == self._tokens[-1 - length]:
            length += 1
        return length
