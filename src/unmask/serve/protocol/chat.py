"""Body of /v1/chat/completions.

Other APIs for conversations translate theirs into this one.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from unmask.serve.protocol.fields import UNMET, Count, GeneratingRequest, conflict
from unmask.serve.protocol.messages import AllowedToolChoice, ChatMessage, Layout, NamedTool
from unmask.serve.protocol.structured import Structured


class ChatRequest(GeneratingRequest, Structured, Layout):
    """Body of /v1/chat/completions."""

    refused: ClassVar = {
        **UNMET,
        "prompt": "given beside messages; give one of them, or send the prompt to /v1/completions",
        "text": "given beside messages; give one of them",
        "input": "given beside messages; give one of them",
        "audio": "this model neither hears nor speaks; leave it out",
        "best_of": "not supported for conversations; give n",
        "functions": "the older form of tools; give tools",
        "function_call": "the older form of tool_choice; give tools and tool_choice",
    }

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @field_validator("max_tokens", "max_completion_tokens", mode="before")
    @classmethod
    def _no_limit(cls, value: Any) -> Any:
        return None if type(value) is int and value == -1 else value

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "given without logprobs; set logprobs to true, or leave it out")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise conflict("tool_choice", "it requires a call but there are no tools; give tools")
        return self
