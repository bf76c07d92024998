"""Body of /v1/responses: OpenAI's Responses.

Owns its fields and items, and their translation into a `ChatRequest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from unmask.serve.errors import bad_request
from unmask.serve.protocol.chat import ChatRequest
from unmask.serve.protocol.fields import Body, Count
from unmask.serve.protocol.messages import HistoryModel
from unmask.serve.protocol.translated import TranslatedRequest

_FUNCTION = {"name", "description", "parameters", "strict"}
WITH_LOGPROBS = "message.output_text.logprobs"
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "item_reference": ("id",),
    "reasoning": (),
}


class ContentPart(HistoryModel):
    """A text in a message or in the output of a function."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str = ""
    refusal: str | None = None


class InputItem(HistoryModel):
    """An item of a conversation: a message, a call of a function, its output, or a reference to an earlier item."""

    type: Literal["message", "function_call", "function_call_output", "item_reference", "reasoning"] | None = None
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_reasoning(cls, value: Any) -> Any:
        """Reasoning of other models is not shown to this one, whatever it contains."""
        return {"type": "reasoning"} if isinstance(value, dict) and value.get("type") == "reasoning" else value

    @model_validator(mode="after")
    def _is_whole(self) -> InputItem:
        missing = next((name for name in _REQUIRED[self.kind] if self.model_dump(include={name})[name] is None), None)
        if missing is not None:
            raise ValueError(f"{missing} of the {self.kind} is missing")
        return self

    @property
    def kind(self) -> str:
        """Its type; messages and references may leave it out."""
        return self.type or ("item_reference" if self.role is None else "message")


class FunctionTool(Body):
    """A function that the model may call; the only kind of tool."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Body):
    """`tool_choice` by name."""

    type: Literal["function"]
    name: str


class AllowedTools(Body):
    """`tool_choice` among some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1)]


class TextFormat(Body):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> TextFormat:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("name and schema belong to the type json_schema; give both")
        return self


class TextConfig(Body):
    """Options of the answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(TranslatedRequest):
    """Body of /v1/responses."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        r"messages\b": "input",
        r"tools\[(\d+)\]\.function\.": r"tools[\1].",
        r"response_format\.json_schema\.": "text.format.",
        r"response_format\b": "text.format",
        r"max_completion_tokens\b": "max_output_tokens",
    }

    refused: ClassVar = {
        "background": "responses are made while the client waits; leave it out, or stream",
        "conversation": "conversations are not stored; send their items, or previous_response_id",
        "messages": "the field of /v1/chat/completions; give input",
        "prompt": "prompt templates are not stored; give instructions and input",
        "max_tokens": "give max_output_tokens",
        "response_format": "give text.format",
    }

    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    reasoning: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    stream_options: dict[str, Any] | None = None

    @property
    def items(self) -> list[InputItem]:
        """The input as items."""
        return [InputItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return bool(self.top_logprobs) or WITH_LOGPROBS in (self.include or [])

    def chat(self, items: Sequence[InputItem]) -> ChatRequest:
        """The chat request.

        Args:
            items: of the conversation: those of earlier responses, then the input; references are resolved.

        Raises:
            ApiError: naming the field at fault.
        """
        messages = _messages(items)
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        if not messages:
            raise bad_request("input has no message; give at least one", "input")
        tools = [{"type": "function", "function": tool.model_dump(include=_FUNCTION)} for tool in self.tools or []]
        return self.to_chat(
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.with_logprobs or None,
            top_logprobs=self.top_logprobs or None,
            response_format=_response_format(self.text),
            tools=tools or None,
            tool_choice=_tool_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
        )


def _messages(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Items as chat messages; neighbouring calls, and the text before them, are one message of the assistant."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if item.kind == "message":
            messages.append({"role": item.role, "content": _content(item.content)})
        elif item.kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            function = {"name": item.name, "arguments": item.arguments}
            messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
        elif item.kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
    return messages


def _content(content: str | list[ContentPart] | None) -> str | list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return content or ""
    return [{"type": "text", "text": part.text if part.refusal is None else part.refusal} for part in content]


def _response_format(text: TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    if text.format.type != "json_schema":
        return {"type": text.format.type}
    schema = text.format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": "json_schema", "json_schema": schema}


def _tool_choice(choice: str | FunctionChoice | AllowedTools | None) -> str | dict[str, Any] | None:
    if choice is None or isinstance(choice, str):
        return choice
    if isinstance(choice, FunctionChoice):
        return _named(choice)
    return {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": [_named(each) for each in choice.tools]}}


def _named(choice: FunctionChoice) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.name}}
