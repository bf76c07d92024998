"""Text of a growing list of ids: append-only, never half a character, never a stop string or the beginning of one.

Owns what of a completion's text may be shown already. Knows no request and no wire format.
"""

from __future__ import annotations

from collections.abc import Sequence

from unmask.data.tokenizer import Tokenizer
from unmask.engine.request import Completion

_BROKEN = "\ufffd"
"""What a tokenizer gives for the first half of a character."""
_RARE = "\U0010ffff"
"""A character that no tokenizer has as a token: it is spelled in bytes."""


class TextStream:
    """One completion's text as it becomes final.

    A window of ids is decoded, not all of them: it begins one piece early, because some tokenizers drop the space in front
    of the first token of a text. Others read bytes in a row as one, so that a broken one spoils the characters before it:
    text is shown when not even such a byte would change it.

    Args:
        tokenizer: the model's.
        stops: strings that end the completion and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = tokenizer.decode, tuple(stops)
        self._broken_byte = tokenizer.encode(_RARE)[-1:]
        self._window: list[int] = []
        self._num_read = 0
        self._known = ""
        self._held = ""
        self._num_shown = 0

    def push(self, ids: Sequence[int]) -> str:
        """What can be shown after these ids, beyond what was shown before."""
        return "".join(self._push(token) for token in ids)

    def finish(self, completion: Completion) -> str:
        """The rest: all that was shown, joined, is the completion's text. Its last ids need not have been pushed."""
        text = self._decode(completion.ids) if completion.text is None else completion.text
        return self._show(text[self._num_shown :])

    def _push(self, token: int) -> str:
        self._window.append(token)
        text = self._decode(self._window)
        if len(text) <= len(self._known) or text.endswith(_BROKEN):
            return ""
        if not self._decode([*self._window, *self._broken_byte]).startswith(text):
            return ""
        held = self._held + text[len(self._known) :]
        del self._window[: self._num_read]
        self._num_read, self._known = len(self._window), self._decode(self._window)
        keep = held_back(held, self._stops)
        self._held = held[len(held) - keep :]
        return self._show(held[: len(held) - keep])

    def _show(self, text: str) -> str:
        self._num_shown += len(text)
        return text


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of `text` with which one of `marks` begins (all of a mark counts as well)."""
    longest = min(len(text), max((len(mark) for mark in marks), default=0))
    return next((size for size in range(longest, 0, -1) if any(mark.startswith(text[-size:]) for mark in marks)), 0)
