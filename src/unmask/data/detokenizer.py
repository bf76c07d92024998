"""`IncrementalDetokenizer`: the text of a growing list of ids, with stop strings.

Owns which part of a completion's text is final: never half a character, never a stop string or the beginning of one. The one
place where text is made from ids that are still coming. Knows no request and no wire format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from unmask.data.continuation import REPLACEMENT
from unmask.data.tokenizer import Tokenizer

DecodePiece = Callable[[Sequence[int]], str]
"""Text of ids."""


class Decode(Protocol):
    """`Tokenizer.decode`."""

    def __call__(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text that ids add to that of the ids before them."""


_RARE = "\U0010ffff"
"""A character that no tokenizer has as a token, so that it is spelled in bytes."""


class IncrementalDetokenizer:
    """Text of one completion as it becomes final; append-only.

    A window of ids is decoded instead of all ids, behind those before it. Some tokenizers read neighbouring byte tokens as one
    string, so that one broken byte changes the characters before it: text is handed out once not even such a byte would change
    it.

    Args:
        tokenizer: the model's.
        stops: stop strings: they end the completion and are not part of it.
        after: ids that the completion follows.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, after: Sequence[int] = ()) -> None:
        self._decode, self._stops, self._after = tokenizer.decode, tuple(stops), after
        self._broken_byte = tokenizer.encode(_RARE)[-1:]
        self._window: list[int] = []
        self._before_window = after
        self._num_read = 0
        self._window_text = ""
        self._pending = ""
        self._num_handed_out = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids make final."""
        return "".join(self._push(token) for token in ids)

    def finish(self, ids: Sequence[int], text: str | None = None) -> str:
        """The rest of the text: with all that was handed out before, it is the completion's text.

        Args:
            ids: all ids of the completion; the last ones need not have been pushed.
            text: the completion's text where a stop string has cut it; None: that of the ids.
        """
        return self._hand_out((self._decode(ids, after=self._after) if text is None else text)[self._num_handed_out :])

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window, after=self._before_window)
        is_complete = len(text) > len(self._window_text) and not text.endswith(REPLACEMENT)
        spoilt = [*self._window, *self._broken_byte]
        if not is_complete or not self._decode(spoilt, after=self._before_window).startswith(text):
            return ""
        pending = self._pending + text[len(self._window_text) :]
        if self._num_read:
            # What has been read stays in front until more has: it keeps the space of the token behind it.
            del self._window[: self._num_read]
            self._before_window = ()
        self._num_read, self._window_text = len(self._window), self._decode(self._window, after=self._before_window)
        end = len(pending) - held_back(pending, self._stops)
        self._pending = pending[end:]
        return self._hand_out(pending[:end])

    def _hand_out(self, text: str) -> str:
        self._num_handed_out += len(text)
        return text


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a prefix of one of `marks` (or all of it)."""
    longest = min(len(text), max((len(mark) for mark in marks), default=0))
    return next((size for size in range(longest, 0, -1) if any(mark.startswith(text[-size:]) for mark in marks)), 0)


def find_stop(
    decode: DecodePiece, ids: Sequence[int], num_searched: int, stops: Sequence[str], *, num_kept: int = 0
) -> tuple[int, str, str] | None:
    """The fewest leading ids whose text contains a stop string, the text before that string, and the string.

    Args:
        decode: text of ids.
        ids: the completion so far.
        num_searched: leading ids known to contain none.
        stops: stop strings; of several, the one that begins first counts, and of those the longest.
        num_kept: leading ids whose text may contain them: one that ends in it does not count.
    """
    whole = decode(ids)
    if not any(stop in whole for stop in stops):
        return None
    kept = len(decode(ids[:num_kept]))
    for count in range(max(num_searched, num_kept), len(ids) + 1):
        text = decode(ids[:count])
        places = [(text.find(stop, max(0, kept - len(stop) + 1)), -len(stop), stop) for stop in stops]
        found = [place for place in places if place[0] >= 0]
        if found:
            position, _, stop = min(found)
            return count, text[:position], stop
    return None


def decode_whole_characters(decode: DecodePiece, ids: Sequence[int]) -> str:
    """Text of ids without the part of a character at its end."""
    return decode(ids).rstrip(REPLACEMENT)
