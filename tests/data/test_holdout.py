"""The held-out split: complete, disjoint, stable, and honest about small data."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import refused
from unmask.data.documents import Document, DocumentStream, State
from unmask.data.holdout import Split, is_held_out
from unmask.errors import ConfigError, DataError


class Counting:
    """A finite source whose document i is the single token i, in order, pass after pass."""

    def __init__(self, length: int) -> None:
        self.length, self.given = length, 0

    @property
    def name(self) -> str:
        return "counting"

    @property
    def epoch(self) -> int:
        return self.given // self.length

    def next_document(self) -> Document:
        token = self.given % self.length
        self.given += 1
        return Document(np.array([token], dtype=np.int32), np.array([True]))

    def state_dict(self) -> State:
        return {"given": self.given}

    def load_state_dict(self, state: State) -> None:
        self.given = int(state["given"])


def tokens(split: Split, count: int) -> list[int]:
    return [int(split.next_document().tokens[0]) for _ in range(count)]


def held_out(length: int, share: float) -> list[int]:
    documents = [Document(np.array([i], dtype=np.int32), np.array([True])) for i in range(length)]
    return [i for i, document in enumerate(documents) if is_held_out(document, share)]


def test_sides_partition_the_documents_in_every_pass() -> None:
    kept_away = held_out(200, 0.2)
    assert 20 < len(kept_away) < 60
    expected = [i for i in range(200) if i not in kept_away]
    assert tokens(Split(Counting(200), 0.2, held_out=False), 2 * len(expected)) == expected * 2
    validation = DocumentStream([Split(Counting(200), 0.2, held_out=True)], epochs=1)
    assert [int(sample.document.tokens[0]) for sample in validation] == kept_away


def test_share_zero_trains_on_everything() -> None:
    assert tokens(Split(Counting(5), 0.0, held_out=False), 7) == [0, 1, 2, 3, 4, 0, 1]


def test_data_too_small_to_hold_anything_out_end_at_once() -> None:
    assert held_out(3, 0.001) == []
    assert list(DocumentStream([Split(Counting(3), 0.001, held_out=True)], epochs=1)) == []


def test_everything_held_out_is_an_error_not_a_hang() -> None:
    with refused(DataError, "data.validation_share"):
        Split(Counting(3), 0.999_999, held_out=False).next_document()


@pytest.mark.parametrize(("share", "side"), [(1.0, False), (-0.1, False), (0.0, True)])
def test_bad_share(share: float, side: bool) -> None:
    with pytest.raises(ConfigError):
        Split(Counting(3), share, held_out=side)


def test_resume_continues_with_the_next_document() -> None:
    split = Split(Counting(50), 0.3, held_out=False)
    tokens(split, 7)
    state = split.state_dict()
    expected = tokens(split, 30)
    again = Split(Counting(50), 0.3, held_out=False)
    again.load_state_dict(state)
    assert tokens(again, 30) == expected


def test_a_mixture_goes_on_when_one_source_has_given_all_it_holds_out() -> None:
    small, large = Split(Counting(3), 0.001, held_out=True), Split(Counting(200), 0.2, held_out=True)
    assert len(list(DocumentStream([small, large], epochs=1))) == len(held_out(200, 0.2))


def test_passes_end_where_the_last_documents_of_one_are_held_out() -> None:
    length = held_out(200, 0.2)[-1] + 1
    expected = [i for i in range(length) if i not in held_out(200, 0.2)]
    for epochs in (1, 2):
        split = Split(Counting(length), 0.2, held_out=False, epochs=epochs)
        found = [int(sample.document.tokens[0]) for sample in DocumentStream([split], epochs=epochs)]
        assert found == expected * epochs
