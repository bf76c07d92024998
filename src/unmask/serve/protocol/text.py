"""Bodies of /v1/completions, /v1/infill and /v1/tokenize: plain text."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from unmask.serve.protocol.fields import Body, Count, GeneratingRequest, Sampling, conflict
from unmask.serve.protocol.messages import ChatMessage

_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_MANY = Field(min_length=1, max_length=128)


class CompletionRequest(GeneratingRequest):
    """Body of /v1/completions."""

    refused: ClassVar = {
        "messages": "given beside prompt; give one of them, or send messages to /v1/chat/completions",
        "text": "given beside prompt; give one of them",
    }

    prompt: str | Annotated[list[str], _MANY] | _TokenIds | Annotated[list[_TokenIds], _MANY]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise conflict("best_of", f"it is {self.best_of} and n is {self.n or 1}; they must be equal")
        if self.max_tokens == 0 and not self.scores_prompt:
            raise conflict("max_tokens", "it is 0, which only scores a prompt; give echo and logprobs beside it, or at least 1")
        if self.suffix and self.scores_prompt:
            raise conflict("suffix", "given with echo and logprobs, but a prompt with a suffix is not scored; leave it out")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether the client asks for log-probabilities of the prompt."""
        return bool(self.echo) and self.logprobs is not None


class InfillRequest(Sampling):
    """Body of /v1/infill: a text with holes."""

    refused: ClassVar = {
        "prompt": "given beside text; write the hole into text",
        "messages": "given beside text; write the hole into text",
    }

    text: str
    hole: Annotated[str, Field(min_length=1)] = "___"
    tokens: Annotated[int, Field(ge=1, le=512)] | Annotated[list[Count], Field(min_length=2, max_length=2)] = 8


class TokenizeRequest(Body):
    """Body of /v1/tokenize: a text, or a conversation to lay out with the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "give either prompt or messages")
        return self
