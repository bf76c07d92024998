"""Bodies of Ollama's API, and what they amount to as our own.

Owns their names, types and defaults. Options that are not declared are ignored and named, as everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from unmask.serve.protocol.chat import ChatRequest
from unmask.serve.protocol.fields import Body, conflict
from unmask.serve.protocol.messages import FunctionSpec
from unmask.serve.protocol.text import CompletionRequest

_RENAMED = {"repeat_penalty": "repetition_penalty"}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repeat_penalty", "stop")
LATEST = ":latest"


class OllamaOptions(Body):
    """`options` of a body: decoding options, and a few about memory, which have no effect here."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    num_predict: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    num_thread: int | None = None
    num_keep: int | None = None
    use_mmap: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """The decoding options under our names. A negative seed is none, and so is a length below 1."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        given["max_tokens"] = self.num_predict if self.num_predict is not None and self.num_predict > 0 else None
        given["seed"] = self.seed if self.seed is not None and self.seed >= 0 else None
        return {_RENAMED.get(name, name): value for name, value in given.items() if value is not None}


class OllamaRequest(Body):
    """Fields of both bodies that generate."""

    model: str
    stream: bool | None = None
    options: OllamaOptions = Field(default_factory=OllamaOptions)
    format: Literal["", "json"] | dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    diffusion: dict[str, Any] | None = None

    @field_validator("options", mode="before")
    @classmethod
    def _no_options(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("think")
    @classmethod
    def _does_not_think(cls, value: bool | str | None) -> bool | str | None:
        if value:
            raise conflict("think", "this model does not support thinking; leave it out, or use false")
        return value

    @property
    def unloads(self) -> bool:
        """Whether a body without anything to answer asks to unload the model rather than to load it."""
        return self.keep_alive in (0, "0", "0s")

    def _chat_fields(self, model: str) -> dict[str, Any]:
        return {**self._fields(model), "logprobs": self.logprobs, "top_logprobs": self.top_logprobs}

    def _fields(self, model: str) -> dict[str, Any]:
        """Fields of our bodies that both endpoints share."""
        fields: dict[str, Any] = {"model": model, **self.options.sampling(), "diffusion": self.diffusion or {}}
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif self.format:
            fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "format", "schema": self.format}}
        return fields


class OllamaFunction(Body):
    """A called function; its arguments are an object."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class OllamaToolCall(Body):
    """A tool call of the assistant."""

    function: OllamaFunction


class OllamaMessage(Body):
    """A message of a conversation."""

    refused: ClassVar = {"images": "this model reads text only; leave them out"}

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[OllamaToolCall] | None = None
    tool_name: str | None = None


class OllamaTool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: FunctionSpec


class OllamaChatRequest(OllamaRequest):
    """Body of /api/chat."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: Annotated[list[OllamaTool], Field(max_length=128)] | None = None

    def to_chat(self, model: str) -> ChatRequest:
        """The same as a body of /v1/chat/completions.

        Raises:
            ValidationError: a value that has no place there.
        """
        tools = [tool.model_dump() for tool in self.tools or []]
        return ChatRequest.model_validate(
            {
                **self._chat_fields(model),
                "messages": list(_openai_messages(self.messages)),
                **({"tools": tools} if tools else {}),
            }
        )


class OllamaGenerateRequest(OllamaRequest):
    """Body of /api/generate."""

    refused: ClassVar = {
        "images": "this model reads text only; leave them out",
        "template": "the model has its own; lay the prompt out yourself and set raw to true",
        "context": "conversations are sent to /api/chat",
    }

    prompt: str = ""
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = None

    def to_chat(self, model: str) -> ChatRequest:
        """The prompt as a conversation, with the system prompt if there is one."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return ChatRequest.model_validate(
            {**self._chat_fields(model), "messages": [*system, {"role": "user", "content": self.prompt}]}
        )

    def to_completion(self, model: str) -> CompletionRequest:
        """The prompt as plain text."""
        logprobs = self.top_logprobs or 0 if self.logprobs else None
        texts = {"prompt": self.prompt, "suffix": self.suffix, "logprobs": logprobs}
        return CompletionRequest.model_validate(self._fields(model) | texts)


class OllamaModelRequest(Body):
    """Body that names a model, by the field's present or its former name."""

    model: str = ""
    name: str = ""
    verbose: bool | None = None


def _openai_messages(messages: list[OllamaMessage]) -> Iterator[Mapping[str, Any]]:
    """The messages in OpenAI's form.

    Ollama's calls have no ids: a tool's answer goes to the first open call of its name, or else to the first open one.
    """
    num_calls, open_calls = 0, list[tuple[str, str]]()
    for message in messages:
        fields: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                function = {"name": call.function.name, "arguments": json.dumps(call.function.arguments, ensure_ascii=False)}
                calls.append({"id": f"call_{num_calls}", "type": "function", "function": function})
                open_calls.append((f"call_{num_calls}", call.function.name))
                num_calls += 1
            fields |= {"tool_calls": calls, "content": message.content or None}
        elif message.role == "tool":
            answered = next((each for each in open_calls if each[1] == message.tool_name), (*open_calls, ("call", ""))[0])
            fields["tool_call_id"] = answered[0]
            open_calls = [each for each in open_calls if each != answered]
        yield fields
