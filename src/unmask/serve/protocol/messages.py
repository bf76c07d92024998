"""Parts of chat bodies: messages, tools, and formats of answers, in OpenAI's form.

Owns their names, types and ranges.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unmask.serve.protocol.fields import Body


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


class JsonSchemaSpec(Body):
    """A schema with a name."""

    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and the type json_schema require each other; give both or neither")
        return self
