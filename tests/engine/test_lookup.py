"""Prompt lookup against a plain search of the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from unmask.engine.lookup import PromptLookup

FEW_TOKENS = st.lists(st.integers(0, 3), max_size=60)


def longest_match(text: list[int]) -> int:
    """Length of the longest earlier occurrence of what the text ends in, of 2 to 8 tokens; 0 without one."""
    lengths = [
        n
        for n in range(2, 9)
        for start in range(len(text) - n)
        if len(text) >= n and text[start : start + n] == text[len(text) - n :]
    ]
    return max(lengths, default=0)


@given(FEW_TOKENS, FEW_TOKENS)
def test_a_match_is_one_and_its_continuation_what_followed(prompt: list[int], answer: list[int]) -> None:
    lookup, text = PromptLookup(prompt), list(prompt)
    for token in (None, *answer):
        if token is not None:
            lookup.append(token)
            text.append(token)
        assert (lookup.next is None) == (lookup.length == 0) == (longest_match(text) == 0), "none is missed"
        for count in (1, 3, 20):
            draft = lookup.draft(count)
            assert len(draft) == (count if lookup.length else 0)
            if lookup.length:
                shown = [*text, *draft]
                ends = [*text[-min(lookup.length, len(text)) :], *draft]
                known = ends[: len(ends) - max(0, count - 3)]
                starts = range(len(shown) - len(ends))
                assert any(shown[start : start + len(known)] == known for start in starts), "as it went on before"


def test_the_longest_of_the_most_recent_occurrences_is_followed() -> None:
    lookup = PromptLookup([1, 2, 3, 7, 7, 9, 2, 3, 8, 8, 1, 2, 3])
    assert (lookup.length, lookup.draft(3)) == (3, [7, 7, 9])
    assert PromptLookup([5, 6, 1, 5, 6, 2, 5, 6]).draft(1) == [2], "of equals the last"


def test_a_match_is_followed_until_the_text_leaves_it() -> None:
    lookup = PromptLookup([10, 11, 12, 13, 14, 15, 16, 20, 10, 11])
    for token in (12, 13, 14):
        assert lookup.next == token
        lookup.append(token)
    assert (lookup.length, lookup.next) == (5, 15)
    lookup.append(40)
    assert (lookup.length, lookup.next, lookup.draft(4)) == (0, None, [])


def test_a_repetition_is_taken_to_go_on() -> None:
    assert PromptLookup([4, 1, 2, 3, 1, 2]).draft(7) == [3, 1, 2, 3, 1, 2, 3]
    assert PromptLookup([9, 9, 9]).draft(5) == [9] * 5


def test_short_texts_hold_nothing() -> None:
    for text in ([], [1], [1, 2]):
        lookup = PromptLookup(text)
        assert (lookup.length, lookup.next, lookup.draft(4)) == (0, None, [])
