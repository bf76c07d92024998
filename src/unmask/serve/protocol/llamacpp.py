"""Body of llama.cpp's /infill, as the plugins llama.vim and llama.vscode send it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from unmask.serve.protocol.fields import Body
from unmask.serve.protocol.text import CompletionRequest

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "stop")


class ExtraContext(Body):
    """A text from elsewhere that goes before the prefix."""

    text: str
    filename: str = ""
    time: Any = None


class LlamaInfillRequest(Body):
    """Body of /infill. How llama.cpp caches, schedules and orders its samplers has no effect here."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraContext] = Field(default_factory=list)
    prompt: str = ""
    n_predict: int = -1
    stream: bool = False
    response_fields: list[str] | None = None
    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str], Field(max_length=16)] | str | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    cache_prompt: bool | None = None
    id_slot: int | None = None
    n_indent: int | None = None
    samplers: list[str] | str | None = None
    t_max_prompt_ms: float | None = None
    t_max_predict_ms: float | None = None

    @property
    def prefix(self) -> str:
        """The text before the gap: other files, the prefix, and what is typed on the present line."""
        extra = "".join(f"{each.filename}\n{each.text}\n\n" for each in self.input_extra)
        return extra + self.input_prefix + self.prompt

    def to_completion(self, model: str, before: list[int], tokens: int) -> CompletionRequest:
        """The same as a body of /v1/completions, with log-probabilities.

        Args:
            model: the served one.
            before: ids of the prefix.
            tokens: of the filling, at most.

        Raises:
            ValidationError: a value that has no place there.
        """
        given = {name: getattr(self, name) for name in _SAMPLING} | {"repetition_penalty": self.repeat_penalty}
        given["seed"] = self.seed if self.seed is not None and self.seed >= 0 else None
        body = {"model": model, "prompt": before or "", "suffix": self.input_suffix, "max_tokens": tokens, "logprobs": 0}
        return CompletionRequest.model_validate(
            body | {name: value for name, value in given.items() if value or name == "seed"}
        )
