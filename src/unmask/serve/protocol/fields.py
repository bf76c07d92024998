"""Fields that request bodies share: names, types and ranges, decoding options included.

A body takes every field that it declares and ignores others, which `ignored_fields` lists; our own section `diffusion` refuses
them, as a misspelt option there is a mistake of somebody who knows this server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator
from pydantic_core import PydanticCustomError

from unmask.engine.sampling_params import Option, SamplingParams, Surface

_NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("n", "length_penalty", "typical_p", "tfs_z", "best_of"), 1),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens", "add_special_tokens", "detokenize"), True),
}
"""Values at which other servers' fields change nothing; so do null, false, 0 and what is empty."""
_UNMET_NAMES = (
    *("use_beam_search", "prompt_logprobs", "allowed_token_ids", "bad_words", "truncate_prompt_tokens", "prompt_embeds"),
    *("include_stop_str_in_output", "chat_template", "documents", "web_search_options"),
)
UNMET = dict.fromkeys(_UNMET_NAMES, "not supported here, and the answer would be another without it; leave it out")
"""Fields of other servers that are refused: whoever sends them relies on what they do."""
_Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
_Model = TypeVar("_Model", bound=BaseModel)


def conflict(param: str, message: str) -> PydanticCustomError:
    """The error of a field that excludes others."""
    return PydanticCustomError("conflict", "{reason}", {"reason": message, "param": param})


class Body(BaseModel):
    """A body or a part of one; unknown fields are kept, and listed by `ignored_fields`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields that a body must not have, with what to do: without them the answer would not be to what the client asks."""

    @model_validator(mode="after")
    def _no_refused(self) -> Self:
        for name, reason in self.refused.items():
            if not _asks_nothing(name, (self.model_extra or {}).get(name)):
                raise conflict(name, reason)
        return self


def ignored_fields(body: BaseModel) -> list[str]:
    """Paths of the fields that a body has and does not declare, those of its parts included."""
    return list(_undeclared(body, ""))


def _undeclared(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, list):
        for index, each in enumerate(value):
            yield from _undeclared(each, f"{path}[{index}]")
    elif isinstance(value, BaseModel):
        prefix = f"{path}." if path else ""
        yield from (prefix + name for name, extra in (value.model_extra or {}).items() if not _asks_nothing(name, extra))
        for name, field in type(value).model_fields.items():
            yield from _undeclared(getattr(value, name), prefix + (field.alias or name))


def _asks_nothing(name: str, value: Any) -> bool:
    """Whether a field that is not declared is at its neutral value, so that nothing is missed without it."""
    return not value or (name in _NEUTRAL and value == _NEUTRAL[name] and type(value) in (bool, int, float))


def names_of(surface: Surface) -> set[str]:
    """The decoding options of a section whose fields are generated; the others (`stop`, `logit_bias`) have OpenAI's shapes."""
    options = SamplingParams.options().values()
    return {o.name for o in options if surface in o.surfaces and (o.choices or o.kind in (bool, int, float) or o.items is int)}


def with_options(surface: Surface) -> Callable[[type[_Model]], type[_Model]]:
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


@with_options("diffusion")
class Diffusion(Body):
    """How to denoise: ours, in every body that generates.

    `watch`: with `stream`, also send what every forward saw (see docs/serving.md); the others are decoding options.
    """

    model_config = ConfigDict(extra="forbid")

    watch: bool = False


class _WithoutEffect(Body):
    """Accepted fields without an effect: user, billing, storage, priority and reasoning effort."""

    user: str | int | None = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None
    prediction: Any = None
    reasoning_effort: Any = None


@with_options("http")
class Sampling(_WithoutEffect):
    """Fields of every body that generates text."""

    model: str
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    diffusion: Diffusion = Field(default_factory=Diffusion)

    @field_validator("top_k", mode="before", check_fields=False)
    @classmethod
    def _all(cls, value: Any) -> Any:
        return None if type(value) is int and value in (0, -1) else value

    @field_validator("seed", mode="before", check_fields=False)
    @classmethod
    def _random(cls, value: Any) -> Any:
        return None if type(value) is int and value == -1 else value

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((key for key in value or {} if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
        if wrong is not None:
            raise ValueError(f"{wrong[:40]!r} is not a token id; the keys are ids, as digits")
        return value


class StreamOptions(Body):
    """What a stream contains besides its deltas."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False


class GeneratingRequest(Sampling):
    """Fields of OpenAI's bodies that generate text."""

    refused: ClassVar = UNMET

    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: _Text | Annotated[list[_Text], Field(max_length=16)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streams(self) -> GeneratingRequest:
        if not self.stream and (self.stream_options is not None or self.diffusion.watch):
            name = "diffusion.watch" if self.stream_options is None else "stream_options"
            raise conflict(name, "given without stream; set stream to true, or leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
