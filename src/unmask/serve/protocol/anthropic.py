"""Bodies of /v1/messages: Anthropic's Messages.

Owns their fields and content blocks, and their translation into a `ChatRequest`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from unmask.serve.protocol.chat import ChatRequest
from unmask.serve.protocol.fields import Count
from unmask.serve.protocol.messages import HistoryModel
from unmask.serve.protocol.translated import TranslatedRequest

_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
    "thinking": (),
    "redacted_thinking": (),
}
_ERROR = "Error: "
"""Begins the result of a tool that failed: chat templates have no other place for `is_error`."""


class TextBlock(HistoryModel):
    """A text."""

    type: Literal["text"]
    text: str


class Block(HistoryModel):
    """A content block of a message; thinking of earlier turns is not shown to the model."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> Block:
        missing = next((name for name in _REQUIRED[self.type] if self.model_dump(include={name})[name] is None), None)
        if missing is not None:
            raise ValueError(f"{missing} of the {self.type} block is missing")
        return self


class Message(HistoryModel):
    """A turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.role != "assistant" and not self.content:
            raise ValueError(f"content of the {self.role} message is empty; give a text")
        return self


class Tool(HistoryModel):
    """A tool that the client runs; the only kind."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class Choice(HistoryModel):
    """Whether tools are used: `any` requires a call, `tool` one of `name`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> Choice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name and the type tool require each other; give both or neither")
        return self


class Thinking(HistoryModel):
    """Thinking: models here do none, so that only being asked for a budget of it is refused."""

    type: Literal["disabled", "adaptive", "between_tools"]


class JsonFormat(HistoryModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(HistoryModel):
    """The format of the answer; effort is ignored."""

    format: JsonFormat | None = None


class CountTokensRequest(TranslatedRequest):
    """Body of /v1/messages/count_tokens."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
        r"tools\[(\d+)\]\.function\.": r"tools[\1].",
        r"response_format\.json_schema\.": "output_config.format.",
        r"response_format\b": "output_config.format",
        r"max_completion_tokens\b": "max_tokens",
        r"stop\b": "stop_sequences",
        r"continue_final_message\b": "messages",
    }
    refused: ClassVar = {
        "mcp_servers": "this server calls no others; give their functions as tools",
        "container": "nothing runs in containers here; leave it out",
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None

    def chat(self, **fields: Any) -> ChatRequest:
        """The chat request.

        Raises:
            ApiError: naming the field at fault.
        """
        system = [{"role": "system", "content": _joined(self.system)}] if self.system else []
        turns = [turn for message in self.messages for turn in _turns(message)]
        choice = self.tool_choice
        return self.to_chat(
            messages=[*system, *turns],
            tools=[_tool(tool) for tool in self.tools or []] or None,
            tool_choice=None if choice is None else _tool_choice(choice),
            parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
            response_format=_response_format(self.output_config),
            continue_final_message=self.messages[-1].role == "assistant" or None,
            **fields,
        )


class MessagesRequest(CountTokensRequest):
    """Body of /v1/messages."""

    max_tokens: Count
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] | None = None

    def chat(self, **fields: Any) -> ChatRequest:
        """The chat request, limits included.

        Raises:
            ApiError: naming the field at fault.
        """
        return super().chat(max_completion_tokens=self.max_tokens, stop=self.stop_sequences or None, **fields)


def _turns(message: Message) -> Iterator[dict[str, Any]]:
    """A message as chat messages: results of tools are messages of their own."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    texts = [block for block in message.content if block.type == "text"]
    if message.role == "assistant":
        calls = [_call(block) for block in message.content if block.type == "tool_use"]
        yield {"role": "assistant", "content": _joined(texts), **({"tool_calls": calls} if calls else {})}
        return
    for block in message.content:
        if block.type == "tool_result":
            content = (_ERROR if block.is_error else "") + _joined(block.content or "")
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
    if texts:
        yield {"role": message.role, "content": _joined(texts)}


def _joined(content: str | Sequence[Block] | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text or "" for block in content)


def _call(block: Block) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}}


def _tool(tool: Tool) -> dict[str, Any]:
    about = tool.model_dump(include={"name", "description", "strict"}, exclude_none=True)
    return {"type": "function", "function": {**about, "parameters": tool.input_schema}}


def _tool_choice(choice: Choice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _response_format(config: OutputConfig | None) -> dict[str, Any] | None:
    if config is None or config.format is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": config.format.schema_}}
