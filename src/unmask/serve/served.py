"""The model as the server sees it: bodies of clients become engine requests.

Owns defaults, limits and the layout of prompts. Knows neither HTTP responses nor the worker. Everything here may be called
from several threads.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from unmask.data.tokenizer import Tokenizer
from unmask.diffusion.decode import DecodeRules
from unmask.engine.grammar import Grammar
from unmask.engine.infill import filling_requests, split_holes
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.errors import ConfigError, RequestError, UnmaskError
from unmask.serve import protocol
from unmask.serve.errors import ApiError, bad_request
from unmask.serve.tool_parser import CallParser
from unmask.serve.tools import Function, ToolChoice, ToolFormat, tool_format

_PLACE = re.compile(r"tools\[\d+\][\w.]*|tool_choice")
_LEAST_TOP_P = 1e-9
"""OpenAI takes 0, too: the likeliest token."""


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    Attributes:
        name: what clients call the model; default: its own name.
        api_keys: any of them opens the API; none: it is open.
        max_concurrent: completions decoded together.
        max_queue: completions that may wait beside those.
        timeout: most seconds of a request, waiting included.
        shutdown_grace: seconds that running requests get to finish when the server stops.
        max_body: most bytes of a request's body.
        default_max_tokens: most new tokens where a client does not say.
        cache_tokens: tokens that the cache holds; default: the engine's.
        allow_origins: web origins other than the server's own that may use it; "*" is any.
        allow_hosts: names that the Host header may hold; default: any, or without keys on loopback the loopback names.
        log_prompts: write prompts and answers into the log.
    """

    name: str | None = None
    api_keys: tuple[str, ...] = ()
    max_concurrent: int = 16
    max_queue: int = 64
    timeout: float = 600.0
    shutdown_grace: float = 30.0
    max_body: int = 4 * 2**20
    default_max_tokens: int = 1024
    cache_tokens: int | None = None
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_concurrent", "max_body", "default_max_tokens", "cache_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("max_queue", "shutdown_grace"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be finite, and at least 0")
        if not self.timeout > 0:
            raise ConfigError(f"timeout is {self.timeout}; it must be positive")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise ConfigError("an API key is empty, has white space around it or is not ASCII; give another")


@dataclass(frozen=True)
class Prepared:
    """What a body asks of the engine.

    Attributes:
        requests: all completions, those of one prompt next to each other.
        prompt_tokens: of all prompts, each counted once.
        parses_calls: tool calls are looked for in the text.
        forced_call: the client named the function.
    """

    requests: list[Request]
    prompt_tokens: int
    parses_calls: bool = False
    forced_call: bool = False
    prompts: tuple[str, ...] = ()


class ServedModel:
    """A language model behind the API.

    Args:
        language_model: with a tokenizer.
        settings: of the server.

    Raises:
        ConfigError: the model has no tokenizer.
    """

    def __init__(self, language_model: LanguageModel, settings: Settings) -> None:
        if language_model.tokenizer is None:
            raise ConfigError(f"model {language_model.name} has no tokenizer; add tokenizer.json to its folder to serve it")
        self.language_model, self.settings = language_model, settings
        self.tokenizer: Tokenizer = language_model.tokenizer
        self.name = settings.name or language_model.name
        self.created = int(time.time())
        self._compile = lru_cache(maxsize=64)(self._compile_once)

    @property
    def context(self) -> int:
        """Most tokens of prompt and completion."""
        return self.language_model.config.max_positions

    def describe(self) -> dict[str, Any]:
        """OpenAI's model object, with the context length and, for a diffusion model, its block."""
        size, rules = self.language_model.config.block_size, DecodeRules()
        diffusion = {"block_size": size or rules.block_size, "threshold": rules.threshold}
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "unmask",
            "max_model_len": self.context,
            "diffusion": diffusion if self.language_model.is_diffusion else None,
        }

    def check_name(self, name: str) -> None:
        """Raises: ApiError: another model."""
        if name != self.name:
            message = f"model {name[:80]!r} is not served here; use {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def spell(self, token: int) -> bytes:
        """What a token stands for; nothing for a control token."""
        return self._spelling[token] if self._spelling is not None else self.tokenizer.decode([token]).encode()

    def chat_ids(self, messages: Sequence[protocol.Message], body: protocol.ChatRequest | None = None) -> list[int]:
        """Token ids of a conversation, laid out for an answer.

        Raises:
            ApiError: there is no template, or it does not take these messages.
        """
        if not self.tokenizer.has_chat_template:
            raise bad_request(f"model {self.name} has no chat template; use /v1/completions", "messages")
        functions, choice, _ = _tools(body)
        turns: list[Mapping[str, Any]] = [self._turn(each) for each in messages]
        shown = None
        try:
            # A model whose tool format is unknown can still talk.
            if functions or any(each.tool_calls or each.role == "tool" for each in messages):
                turns, shown = self._format.messages(turns, functions, choice)
            return self.tokenizer.chat(turns, add_generation_prompt=True, tools=shown)
        except UnmaskError as error:
            raise bad_request(str(error), "messages") from error

    def chat(self, body: protocol.ChatRequest) -> Prepared:
        """Requests of a chat body.

        Raises:
            ApiError: naming the field at fault.
        """
        self.check_name(body.model)
        functions, choice, parallel = _tools(body)
        ids = self.chat_ids(body.messages, body)
        calling = bool(functions) and choice.mode != "none"
        schema = _answer_schema(body.response_format)
        grammar = None if schema is None else self._answer_grammar(schema)
        if calling:
            told = [[each.name, each.description, each.parameters] for each in functions]
            try:
                grammar = self._compile("tools", json.dumps([told, [choice.mode, choice.name], parallel, schema]))
            except RequestError as error:
                place = _PLACE.match(str(error))
                raise bad_request(str(error), "tools" if place is None else place[0]) from error
        most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        wants = None if not body.logprobs else body.top_logprobs or 0
        requests = self._requests(body, [ids], most, self.settings.default_max_tokens, wants, grammar)
        return Prepared(requests, len(ids), calling, choice.name is not None)

    def completion(self, body: protocol.CompletionRequest) -> Prepared:
        """Requests of a completion body.

        Raises:
            ApiError: naming the field at fault.
        """
        self.check_name(body.model)
        given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if given and isinstance(given[0], int):
            given = [given]
        prompts = [self.plain_ids(prompt) if isinstance(prompt, str) else list(prompt) for prompt in given]
        echoed = given if body.echo else []
        texts = tuple(prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in echoed)
        requests = self._requests(body, prompts, body.max_tokens, 16, body.logprobs, None)
        return Prepared(requests, sum(map(len, prompts)), prompts=texts)

    def infilling(self, body: protocol.InfillRequest) -> Prepared:
        """Requests of an infill body, one per length that is tried.

        Raises:
            ApiError: naming the field at fault.
        """
        self.check_name(body.model)
        tokens = body.tokens if isinstance(body.tokens, int) else (body.tokens[0], body.tokens[1])
        try:
            parts = split_holes(body.text, body.hole)
            template = self.language_model.request((None,), max_new_tokens=1, **self._options(body))  # a hole: not verified
            whole = body.diffusion.block_size is None
            requests = filling_requests(template, parts, tokens, self.tokenizer, whole=whole)
            requests[-1].check(self.language_model.config)
        except UnmaskError as error:
            raise _refused(error, body, "text") from error
        return Prepared(requests, sum(token is not None for token in requests[0].ids))

    def parser(self) -> CallParser:
        """Finds the tool calls in one answer."""
        return self._format.parser()

    def warm(self) -> None:
        """What would make the first request slow."""
        assert self._spelling is None or self._spelling

    @cached_property
    def _spelling(self) -> tuple[bytes, ...] | None:
        try:
            return self.language_model.grammars.token_bytes
        except RequestError:
            return None  # Its tokens are not byte strings: every token is decoded on its own.

    def plain_ids(self, text: str) -> list[int]:
        try:
            return self.language_model.encode_prompt(text, chat=False)
        except UnmaskError as error:
            raise bad_request(str(error), "prompt") from error

    def _requests(
        self,
        body: protocol.ChatRequest | protocol.CompletionRequest,
        prompts: Sequence[Sequence[int]],
        most: int | None,
        default: int,
        logprobs: int | None,
        grammar: Grammar | None,
    ) -> list[Request]:
        options = self._options(body)
        made = []
        for ids in prompts:
            room = self.context - len(ids)
            new = min(default, room) if most is None else most
            if room < 1 or new > room:
                raise bad_request(
                    f"the prompt has {len(ids)} tokens and {max(new, 1)} new ones are asked for, but the context of "
                    f"{self.name} holds {self.context}; shorten the prompt or ask for fewer",
                    "messages" if isinstance(body, protocol.ChatRequest) else "prompt",
                    "context_length_exceeded",
                )
            try:
                request = self.language_model.request(
                    ids, max_new_tokens=new, stop=body.stops, logprobs=logprobs, grammar=grammar, **options
                )
                request.check(self.language_model.config)
            except RequestError as error:
                raise _refused(error, body, "response_format") from error
            made += request.samples(body.n or 1)
        return made

    def _options(self, body: protocol._Sampling) -> dict[str, Any]:
        """Decoding options as `LanguageModel.request` calls them. Without a seed, draws differ from call to call."""
        options = body.diffusion.model_dump(exclude_none=True, exclude={"watch"})
        if body.temperature is not None:
            options["temperature"] = body.temperature
        if body.top_p is not None:
            options["top_p"] = max(body.top_p, _LEAST_TOP_P)
        if body.top_k is not None:
            options["top_k"] = body.top_k
        options["seed"] = secrets.randbits(62) if body.seed is None else body.seed
        options["logit_bias"] = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
        return options

    def _answer_grammar(self, schema: Mapping[str, Any]) -> Grammar | None:
        try:
            return self._compile("json_schema", json.dumps(schema))
        except RequestError as error:
            raise bad_request(str(error), "response_format.json_schema.schema") from error

    def _turn(self, message: protocol.Message) -> dict[str, Any]:
        """A message as templates read it: content as one text, a role they know."""
        turn: dict[str, Any] = {"content": None} | message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            turn["content"] = "\n".join(part.text for part in message.content)
        if message.role == "developer" and "developer" not in self.tokenizer.chat_template:
            turn["role"] = "system"
        return turn

    @cached_property
    def _format(self) -> ToolFormat:
        return tool_format(self.tokenizer)

    def _compile_once(self, kind: str, source: str) -> Grammar | None:
        grammars = self.language_model.grammars
        if kind == "json_schema":
            return grammars.json_schema(source)
        functions, choice, parallel, answer = json.loads(source)
        given = [Function(*function) for function in functions]
        return self._format.compile(grammars, given, ToolChoice(*choice), parallel=parallel, answer=answer)


def _answer_schema(wanted: protocol.ResponseFormat | None) -> dict[str, Any] | None:
    """What an answer that is no call must be; None: any text."""
    if wanted is None or wanted.type == "text":
        return None
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
    return schema if isinstance(schema, dict) else {} if schema else {"allOf": [False]}


def _tools(body: protocol.ChatRequest | None) -> tuple[list[Function], ToolChoice, bool]:
    """Functions, which of them must or may be called, and whether several may."""
    if body is None or not body.tools:
        return [], ToolChoice("none"), False
    functions = [
        Function(tool.function.name, tool.function.description, tool.function.parameters, bool(tool.function.strict))
        for tool in body.tools
    ]
    chosen = body.tool_choice if body.tool_choice is not None else "auto"
    if isinstance(chosen, protocol.NamedTool):
        names = [function.name for function in functions]
        if chosen.function.name not in names:
            known = ", ".join(names)
            raise bad_request(f"tool_choice names {chosen.function.name[:64]!r}; the tools are {known}", "tool_choice")
        return functions, ToolChoice("required", chosen.function.name), False
    return functions, ToolChoice(chosen), body.parallel_tool_calls is not False


def _refused(error: UnmaskError, body: protocol._Sampling, otherwise: str) -> ApiError:
    """What the engine says of an option, with the name of the field that it begins with."""
    name = str(error).partition(" ")[0]
    if name in protocol.Diffusion.model_fields:
        name = f"diffusion.{name}"
    elif name not in type(body).model_fields:
        name = otherwise
    return bad_request(str(error), name)
