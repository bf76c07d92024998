"""Parts of chat bodies: messages, tools and layout, in OpenAI's form.

Owns their names, types and ranges.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unmask.serve.protocol.fields import Body, conflict


class HistoryModel(BaseModel):
    """Part of a conversation; unknown fields, which clients and earlier answers may add, are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(HistoryModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(HistoryModel):
    """Name and arguments (JSON text) of a call."""

    name: str
    arguments: str


class ToolCall(HistoryModel):
    """A tool call of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(HistoryModel):
    """A message. Fields of answers (refusal, annotations, audio) are accepted when a client sends an answer back."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"content of the {self.role} message is missing; give a text")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("tool_call_id of the tool message is missing; give the id of the call that it answers")
        return self


class FunctionSpec(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    """The function that must be called."""

    name: str


class NamedTool(Body):
    """`tool_choice` by name."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """Some of the tools, which may or must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedToolChoice(Body):
    """`tool_choice` that leaves some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class Layout(Body):
    """How the chat template lays a conversation out."""

    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_end(self) -> Layout:
        if self.continue_final_message and self.add_generation_prompt:
            raise conflict("add_generation_prompt", "given beside continue_final_message; leave one of them out")
        return self
