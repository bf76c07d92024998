"""Request bodies: OpenAI's, and our own.

Owns names, types and ranges of fields. A field without an effect here is refused, unless it could not change the answer
anyway: those fields are in `_Ignored`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from unmask.engine.sampling_params import Option, SamplingParams, Surface

_Text = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
_MANY = Field(min_length=1, max_length=128)
_Model = TypeVar("_Model", bound=BaseModel)


def _conflict(param: str, message: str) -> PydanticCustomError:
    """The error of a field that excludes others."""
    return PydanticCustomError("conflict", "{reason}", {"reason": message, "param": param})


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def names_of(surface: Surface) -> set[str]:
    """The decoding options of a section whose fields are generated; the others (`stop`, `logit_bias`) have OpenAI's shapes."""
    options = SamplingParams.options().values()
    return {o.name for o in options if surface in o.surfaces and (o.choices or o.kind in (bool, int, float) or o.items is int)}


def _with_options(surface: Surface) -> Callable[[type[_Model]], type[_Model]]:
    """Decorator of a body: adds a field for each scalar decoding option that is declared for `surface`."""
    declared = SamplingParams.options()
    fields: dict[str, Any] = {name: (_field_type(declared[name]) | None, None) for name in names_of(surface)}

    def extend(body: type[_Model]) -> type[_Model]:
        return create_model(body.__name__, __base__=body, __module__=body.__module__, __doc__=body.__doc__, **fields)

    return extend


def _field_type(option: Option) -> Any:
    if option.choices:
        return Literal[option.choices]
    if option.items is int:
        return Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=128)]
    if option.kind not in (int, float):
        return option.kind
    # An excluded minimum is accepted, as OpenAI accepts top_p 0.
    maximum = option.maximum if option.http_maximum is None else option.http_maximum
    return Annotated[option.kind, Field(ge=option.minimum, le=maximum)]


@_with_options("diffusion")
class Diffusion(_StrictModel):
    """How to denoise: ours, in every body that generates.

    `watch`: with `stream`, also send what every forward saw (see docs/serving.md); the others are decoding options.
    """

    watch: bool = False


class _Ignored(_StrictModel):
    """Accepted fields without an effect: user, billing, storage, priority and reasoning effort."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None


@_with_options("http")
class _Sampling(_Ignored):
    """Fields of every body that generates text."""

    model: str
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    diffusion: Diffusion = Field(default_factory=Diffusion)

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((key for key in value or {} if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
        if wrong is not None:
            raise ValueError(f"{wrong[:40]!r} is not a token id; the keys are ids, as digits")
        return value


class StreamOptions(_StrictModel):
    """What a stream contains besides its deltas."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class GeneratingRequest(_Sampling):
    """Fields of OpenAI's bodies that generate text."""

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streams(self) -> GeneratingRequest:
        if not self.stream and (self.stream_options is not None or self.diffusion.watch):
            name = "diffusion.watch" if self.stream_options is None else "stream_options"
            raise _conflict(name, "given without stream; set stream to true, or leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class _HistoryModel(BaseModel):
    """Part of a conversation; unknown fields, which clients and earlier answers may add, are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True)


class TextPart(_HistoryModel):
    """A text part of a message's content."""

    type: Literal["text"]
    text: str


class CalledFunction(_HistoryModel):
    """Name and arguments (JSON text) of a call."""

    name: str
    arguments: str


class ToolCall(_HistoryModel):
    """A tool call of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_HistoryModel):
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


class FunctionSpec(_StrictModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(_StrictModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(_StrictModel):
    """The function that must be called."""

    name: str


class NamedTool(_StrictModel):
    """`tool_choice` by name."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchemaSpec(_StrictModel):
    """A schema with a name."""

    name: Annotated[str, Field(max_length=64)]
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(_StrictModel):
    """The format that the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaSpec | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and the type json_schema require each other; give both or neither")
        return self


class ChatRequest(GeneratingRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise _conflict("top_logprobs", "given without logprobs; set logprobs to true, or leave it out")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise _conflict("tool_choice", "it requires a call but there are no tools; give tools")
        return self


class CompletionRequest(GeneratingRequest):
    """Body of /v1/completions."""

    prompt: str | Annotated[list[str], _MANY] | _TokenIds | Annotated[list[_TokenIds], _MANY]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _conflict("best_of", f"it is {self.best_of} and n is {self.n or 1}; they must be equal")
        if self.suffix:
            raise _conflict("suffix", "it is not supported; send the text with a hole to /v1/infill")
        if self.echo and self.logprobs is not None:
            raise _conflict("echo", "given with logprobs, but prompts have no log-probabilities here; leave one of them out")
        return self


class InfillRequest(_Sampling):
    """Body of /v1/infill: a text with holes."""

    text: str
    hole: Annotated[str, Field(min_length=1)] = "___"
    tokens: Annotated[int, Field(ge=1, le=512)] | Annotated[list[Count], Field(min_length=2, max_length=2)] = 8


class TokenizeRequest(_StrictModel):
    """Body of /v1/tokenize: a text, or a conversation to lay out with the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise _conflict("prompt", "give either prompt or messages")
        return self
