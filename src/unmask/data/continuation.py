"""Text behind other text: the ids of a piece that follows others, and the text that ids add to those before them.

Owns what a tokenizer does at the start of a text and must not do within one: SentencePiece's put a space in front of a text
("dummy prefix"), and drop one in front of its first token when they decode. Knows no documents and no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise

from tokenizers import Tokenizer as Backend

REPLACEMENT = "\ufffd"
"""What a tokenizer gives for part of a character."""

_CHARACTER_TOKENS = 4
"""The most tokens that spell one character: its bytes."""
_SEPARATORS = ("\U0010ffff", "\n")
"""Characters that no tokenizer joins with what follows them; the first is spelled in bytes by nearly all."""


class Continuation:
    """Encoding and decoding of what continues a text.

    Args:
        plain: the tokenizer, which reads control tokens in a text as plain text.
        control: the same tokenizer, which reads them as such.
        added: spelling and id of every added token.
        special: ids of the control tokens, which decode to nothing.
        unknown_id: id of what the tokenizer cannot spell, if it has one.
        prefix_ids: ids before a plain text; what follows them is the start of a text.
    """

    def __init__(
        self,
        plain: Backend,
        control: Backend,
        added: Mapping[str, int],
        special: frozenset[int],
        unknown_id: int | None,
        prefix_ids: Sequence[int],
    ) -> None:
        self._plain, self._control, self._added = plain, control, dict(added)
        self._added_ids = frozenset(added.values())
        self._special, self._prefix_ids = special, list(prefix_ids)
        self._forgeable = special - {unknown_id}

    def encode(self, text: str, after: Sequence[int | None]) -> list[int]:
        """Ids of a text that follows ids; None among these is a token not known yet.

        Equal to the end of what the tokenizer makes of the whole, where it has a token's edge between the two.
        """
        if not text or not after or not self._pads:
            return self._encode(text)
        if after[-1] in self._added_ids and self._pads_after_control:
            return self._encode(text)
        for before in (*_SEPARATORS, self._letter):
            head, whole = self._encode(before), self._encode(before + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return self._encode(text)

    def decode(self, ids: Sequence[int], after: Sequence[int], *, skip_special: bool = True) -> str:
        """The text that ids add to those before them."""
        context = self._context(after) if after else []
        before = self._decode(context, skip_special) if context else ""
        whole = self._decode([*context, *ids], skip_special)
        # Where they complete a character, the replacement for its first bytes is no part of the text any more.
        return whole[len(before if whole.startswith(before) else before.rstrip(REPLACEMENT)) :]

    def _context(self, after: Sequence[int]) -> list[int]:
        """A few ids that stand for `after`: what decodes behind them decodes as it does behind `after`.

        Never more of `after` than part of a character at its end: bytes that follow cannot spoil any other.
        """
        tail = list(after[-_CHARACTER_TOKENS:])
        tail = tail[max((index + 1 for index, token in enumerate(tail) if token in self._special), default=0) :]
        if not tail:
            is_start = self._pads_after_control or list(after) == self._prefix_ids
            return [] if is_start else self._anchor
        return [*self._anchor, *tail] if self._decode([*self._anchor, *tail]).endswith(REPLACEMENT) else self._anchor

    @cached_property
    def _letter(self) -> str:
        """A character that the tokenizer knows."""
        return next((char for char in "a.0" if self._decode(self._encode(char)) == char), "a")

    @cached_property
    def _anchor(self) -> list[int]:
        """Ids of a text that has nothing to do with what follows it."""
        return self._encode(self._letter)

    @cached_property
    def _pads(self) -> bool:
        """Whether a text gets a space in front."""
        return self._decode([*self._anchor, *self._anchor]) != 2 * self._letter

    @cached_property
    def _pads_after_control(self) -> bool:
        """Whether the text after a control token gets one as well."""
        for name, id_ in self._added.items():
            ids = self._control.encode(name + self._letter, add_special_tokens=False).ids
            if ids[:1] == [id_]:
                return self._pads and ids[1:] == self._anchor
        return False

    def _encode(self, text: str) -> list[int]:
        encoding = self._plain.encode(text, add_special_tokens=False)
        if self._forgeable.isdisjoint(encoding.ids):
            return list(encoding.ids)
        # Some vocabularies spell control tokens as pieces of a text: such a piece is cut in two, unless it is one character.
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = [start + 1 for id_, (start, stop) in spans if id_ in self._forgeable and stop - start > 1]
        if not cuts:
            return list(encoding.ids)
        first, *rest = (text[start:stop] for start, stop in pairwise((0, *cuts, len(text))))
        return self._encode(first) + [id_ for part in rest for id_ in self.encode(part, [None])]

    def _decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return str(self._control.decode(list(ids), skip_special_tokens=skip_special))
