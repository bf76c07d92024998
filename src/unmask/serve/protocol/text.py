"""Bodies of /v1/completions, /v1/infill and /v1/tokenize: plain text."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from unmask.serve.protocol.fields import UNMET, Body, Count, GeneratingRequest, Sampling, conflict
from unmask.serve.protocol.messages import ChatMessage, Layout
from unmask.serve.protocol.structured import Structured

_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_MANY = Field(min_length=1, max_length=128)


class CompletionRequest(GeneratingRequest, Structured):
    """Body of /v1/completions."""

    refused: ClassVar = {
        **UNMET,
        "messages": "given beside prompt; give one of them, or send messages to /v1/chat/completions",
        "text": "given beside prompt; give one of them",
    }

    prompt: str | Annotated[list[str], _MANY] | _TokenIds | Annotated[list[_TokenIds], _MANY]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: str | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value is False else value

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise conflict("best_of", f"it is {self.best_of} and n is {self.n}; it must be at least n")
        if self.stream and (self.best_of or 1) > (self.n or 1):
            raise conflict("best_of", "the best are known at the end only; set stream to false, or leave it out")
        if self.max_tokens == 0 and not self.scores_prompt:
            raise conflict("max_tokens", "it is 0, which only scores a prompt; give echo and logprobs beside it, or at least 1")
        if self.suffix and self.scores_prompt:
            raise conflict("suffix", "given with echo and logprobs, but a prompt with a suffix is not scored; leave it out")
        extra = "best_of" if (self.best_of or 1) > (self.n or 1) else None if self.constraint is None else self.constraint.field
        if self.suffix and extra is not None:
            raise conflict(extra, "given beside suffix; leave one of them out")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether the client asks for log-probabilities of the prompt."""
        return bool(self.echo) and self.logprobs is not None


class InfillRequest(Sampling):
    """Body of /v1/infill: a text with holes."""

    refused: ClassVar = {
        "n": "one filling is answered; leave it out",
        "stream": "fillings are not streamed; leave it out",
        "prompt": "given beside text; write the hole into text",
        "messages": "given beside text; write the hole into text",
    }

    text: str
    hole: Annotated[str, Field(min_length=1)] = "___"
    tokens: Annotated[int, Field(ge=1, le=512)] | Annotated[list[Count], Field(min_length=2, max_length=2)] = 8


class TokenizeRequest(Layout):
    """Body of /v1/tokenize: a text, or a conversation to lay out with the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """Body of /v1/detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
