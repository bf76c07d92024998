"""A stream of given documents for the tests of packers."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.data.documents import Document, Sample, State

PAD = 999


@dataclass
class ListStream:
    """The given documents once, with ordinals 0, 1, ... and epochs 0, 0, 0, 1, 1, 1, ..."""

    documents: list[Document]
    position: int = 0

    def __next__(self) -> Sample:
        if self.position == len(self.documents):
            raise StopIteration
        self.position += 1
        return Sample(epoch=(self.position - 1) // 3, ordinal=self.position - 1, document=self.documents[self.position - 1])

    def state_dict(self) -> State:
        return {"position": self.position}

    def load_state_dict(self, state: State) -> None:
        self.position = state["position"]
