from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import refused
from unmask.data.documents import Document, DocumentStream, State
from unmask.errors import ConfigError, DataError


class CountingSource:
    """Documents [tag, 0], [tag, 1], ... over and over."""

    def __init__(self, tag: int, length: int) -> None:
        self.tag, self.length, self.position = tag, length, 0

    @property
    def name(self) -> str:
        return f"source {self.tag}"

    @property
    def epoch(self) -> int:
        return self.position // self.length

    def next_document(self) -> Document:
        tokens = np.array([self.tag, self.position % self.length], dtype=np.int32)
        self.position += 1
        return Document(tokens=tokens, maskable=np.ones(2, dtype=np.bool_))

    def state_dict(self) -> State:
        return {"position": self.position}

    def load_state_dict(self, state: State) -> None:
        self.position = state["position"]


def take(stream: DocumentStream, count: int) -> list[tuple[int, int, list[int]]]:
    samples = [next(stream) for _ in range(count)]
    return [(sample.epoch, sample.ordinal, sample.document.tokens.tolist()) for sample in samples]


def test_single_source_repeats_with_new_epochs_and_ordinals():
    assert take(DocumentStream([CountingSource(7, 2)]), 5) == [
        (0, 0, [7, 0]),
        (0, 1, [7, 1]),
        (1, 2, [7, 0]),
        (1, 3, [7, 1]),
        (2, 4, [7, 0]),
    ]


@given(weights=st.lists(st.floats(0.05, 20), min_size=1, max_size=5), count=st.integers(1, 300))
def test_every_stretch_has_the_proportions_of_the_weights(weights, count):
    stream = DocumentStream([CountingSource(tag, 10) for tag in range(len(weights))], weights)
    tags = [tokens[0] for _, _, tokens in take(stream, count)]
    for tag, weight in enumerate(weights):
        assert abs(tags.count(tag) - count * weight / sum(weights)) < len(weights)


@given(weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=4), before=st.integers(0, 60))
def test_state_restored_in_a_new_stream_gives_the_same_samples(weights, before):
    def make() -> DocumentStream:
        return DocumentStream([CountingSource(tag, 3 + tag) for tag in range(len(weights))], weights)

    stream, resumed = make(), make()
    take(stream, before)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.num_samples == before
    assert take(resumed, 40) == take(stream, 40)


def test_identities_are_unique_in_a_mixture():
    samples = take(DocumentStream([CountingSource(1, 3), CountingSource(2, 5)], [2, 1]), 100)
    assert len({(epoch, ordinal) for epoch, ordinal, _ in samples}) == 100


def test_limited_epochs_read_every_source_exactly_so_often():
    stream = DocumentStream([CountingSource(1, 3), CountingSource(2, 5)], [10, 1], epochs=2)
    tokens = [tuple(sample.document.tokens.tolist()) for sample in stream]
    assert sorted(tokens) == sorted([(1, i) for i in range(3)] * 2 + [(2, i) for i in range(5)] * 2)
    with pytest.raises(StopIteration):
        next(stream)


def test_state_of_another_mixture_is_refused():
    state = DocumentStream([CountingSource(1, 3)]).state_dict()
    with refused(DataError, "sources"):
        DocumentStream([CountingSource(2, 3)]).load_state_dict(state)


@pytest.mark.parametrize(
    ("num_sources", "weights", "epochs", "names"),
    [
        (0, None, None, ("sources", 0)),
        (2, [1.0], None, ("weights", 1, "sources", 2)),
        (1, [0.0], None, ("weight", 0.0, "source 0")),
        (1, [float("nan")], None, ("weight", "nan")),
        (1, [float("inf")], None, ("weight", "inf")),
        (1, None, 0, ("epochs", 0)),
    ],
)
def test_bad_mixtures(num_sources, weights, epochs, names):
    with refused(ConfigError, *names):
        DocumentStream([CountingSource(tag, 3) for tag in range(num_sources)], weights, epochs=epochs)
