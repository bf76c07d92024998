"""A language model with scripted answers, for tests of everything around a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers import make_tokenizer
from tiny import tiny_model
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Completion, Costs, Request


class _Engine:
    def __init__(self, model: ScriptedModel) -> None:
        self._model = model

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._model.reply(request) for request in requests]


class ScriptedModel(LanguageModel):
    """Answers a prompt's text with `script(prompt)`, in one forward and 10 ms for every two tokens."""

    def __init__(self, folder: Path, script: Callable[[str], str], *, tokens_per_forward: int = 2) -> None:
        tokenizer = make_tokenizer(folder)
        transformer = tiny_model("llama", vocab_size=tokenizer.vocab_size, max_positions=2048, eos_ids=(tokenizer.eos_id,))
        super().__init__(transformer, tokenizer, name="scripted")
        self.script, self.asked, self._per_forward = script, [], tokens_per_forward

    def engine(self, *, mask_id: int | None = None, **options: Any) -> Any:
        return _Engine(self)

    def reply(self, request: Request) -> Completion:
        assert self.tokenizer is not None
        prompt = self.tokenizer.decode([token for token in request.ids if token is not None])
        self.asked.append(prompt)
        ids = tuple(self.tokenizer.encode(self.script(prompt))[: request.params.max_new_tokens])
        forwards = max(1, len(ids) // self._per_forward)
        return Completion(ids, "stop", forwards, self.tokenizer.decode(ids), costs=Costs(denoise_seconds=forwards / 100))
