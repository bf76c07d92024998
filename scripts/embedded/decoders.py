"""Decoders that write the autoregressive model's own text: the engine, on a CPU, or `graph_decoder`'s slots, on a GPU.

Owns what `own_text` needs of them. Knows nothing of jobs and files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from unmask.engine.llm import LanguageModel


@dataclass(frozen=True)
class Decoded:
    """A finished answer: its number, its tokens, and whether the model ended it."""

    number: int
    ids: list[int]
    ended: bool


class Decoder(Protocol):
    """Answers many prompts at once."""

    @property
    def room(self) -> int:
        """Prompts that may still be added."""
        ...

    def add(self, ids: list[int], *, budget: int, temperature: float, seed: int) -> int:
        """Queue a prompt for at most `budget` tokens; returns its number."""
        ...

    def step(self) -> list[Decoded]:
        """Go on for a while; what has finished."""
        ...


class EngineDecoder:
    """The engine's continuous batching."""

    def __init__(self, model: LanguageModel, max_num_seqs: int) -> None:
        self._model, self._engine = model, model.engine(max_num_seqs=max_num_seqs)
        self.room = max_num_seqs

    def add(self, ids: list[int], *, budget: int, temperature: float, seed: int) -> int:
        self.room -= 1
        request = self._model.request(
            tuple(ids), max_new_tokens=budget, temperature=temperature, seed=seed, prompt_lookup=False
        )
        return self._engine.add(request)

    def step(self) -> list[Decoded]:
        decoded = []
        for update in self._engine.step():
            assert update.error is None
            if update.completion is not None:
                self.room += 1
                ended = update.completion.finish_reason == "stop"
                decoded.append(Decoded(update.number, list(update.completion.ids), ended))
        return decoded
