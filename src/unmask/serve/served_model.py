"""`ServedModel`: a language model behind the API; turns request bodies into engine requests.

Owns defaults, limits and the layout of prompts. Knows neither HTTP responses nor the worker. Thread-safe.
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
from unmask.engine.grammar import Grammar
from unmask.engine.infill import filling_requests, split_holes
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError, RequestError, UnmaskError
from unmask.serve import protocol
from unmask.serve.config import ServerConfig
from unmask.serve.errors import ApiError, bad_request
from unmask.serve.tool_parser import CallParser
from unmask.serve.tools import ToolChoice, ToolFormat, tool_format

_FIELD = re.compile(r"tools\[\d+\][\w.]*|tool_choice")
_MIN_TOP_P = 1e-9
"""OpenAI accepts 0 as well: the likeliest token."""


@dataclass(frozen=True)
class PreparedRequests:
    """The engine requests of one body.

    Attributes:
        requests: one per completion, those of one prompt next to each other.
        prompt_tokens: of all prompts, each counted once.
        parses_calls: whether the text may hold tool calls.
        forced_call: whether the client named the function to call.
        echoed_prompts: texts of the prompts where the completions begin with them.
    """

    requests: list[Request]
    prompt_tokens: int
    parses_calls: bool = False
    forced_call: bool = False
    echoed_prompts: tuple[str, ...] = ()


class ServedModel:
    """A language model behind the API.

    Args:
        language_model: with a tokenizer.
        config: of the server.

    Raises:
        ConfigError: the model has no tokenizer.
    """

    def __init__(self, language_model: LanguageModel, config: ServerConfig) -> None:
        if language_model.tokenizer is None:
            raise ConfigError(f"model {language_model.name} has no tokenizer; add tokenizer.json to its folder to serve it")
        self.language_model, self.config = language_model, config
        self.tokenizer: Tokenizer = language_model.tokenizer
        self.name = config.name or language_model.name
        self.created = int(time.time())
        self._compile = lru_cache(maxsize=64)(self._compile_once)

    @property
    def context(self) -> int:
        """Context length: tokens that prompt and completion may have together."""
        return self.language_model.config.max_positions

    def describe(self) -> dict[str, Any]:
        """OpenAI's model object, with the context length, decoding defaults of a diffusion model, and decoding options."""
        config = self.language_model.config
        defaults = SamplingParams(max_new_tokens=self.config.max_tokens).resolve(config)
        diffusion = {"block_size": defaults.block_size, "threshold": defaults.threshold}
        panels = {"Sampling", "Output", *(["Diffusion"] if self.language_model.is_diffusion else [])}
        panels |= {"Speculative"} if config.shifted else set()
        options = [
            option for option in SamplingParams.options().values() if option.panel in panels and "page" in option.surfaces
        ]
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "unmask",
            "max_model_len": self.context,
            "diffusion": diffusion if self.language_model.is_diffusion else None,
            "options": [
                option.to_json(None if option.name == "seed" else getattr(defaults, option.name)) for option in options
            ],
        }

    def check_name(self, name: str) -> None:
        """Raises: ApiError: another model."""
        if name != self.name:
            message = f"model {name[:80]!r} is not served here; use {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; none for a control token."""
        table = self._token_bytes
        return table[token] if table is not None else self.tokenizer.decode([token]).encode()

    def chat_ids(self, messages: Sequence[protocol.ChatMessage], body: protocol.ChatRequest | None = None) -> list[int]:
        """Token ids of a conversation and the header of its answer.

        Raises:
            ApiError: the model has no chat template, or it does not accept these messages.
        """
        if not self.tokenizer.has_chat_template:
            raise bad_request(f"model {self.name} has no chat template; use /v1/completions", "messages")
        functions, choice, _ = _tools(body)
        turns: list[Mapping[str, Any]] = [self._template_message(each) for each in messages]
        tools = None
        try:
            # Only tools need the tool format: a model whose format is unknown can still chat.
            if functions or any(each.tool_calls or each.role == "tool" for each in messages):
                turns, tools = self._format.messages(turns, functions, choice)
            return self.tokenizer.chat(turns, add_generation_prompt=True, tools=tools)
        except UnmaskError as error:
            raise bad_request(str(error), "messages") from error

    def chat(self, body: protocol.ChatRequest) -> PreparedRequests:
        """Engine requests of a chat completion body.

        Raises:
            ApiError: naming the field at fault.
        """
        self.check_name(body.model)
        functions, choice, parallel = _tools(body)
        ids = self.chat_ids(body.messages, body)
        calling = bool(functions) and choice.mode != "none"
        schema = _answer_schema(body.response_format)
        try:
            grammar = None if schema is None else self._compile("json_schema", json.dumps(schema))
        except RequestError as error:
            raise bad_request(str(error), "response_format.json_schema.schema") from error
        if calling:
            definitions = [each.model_dump() for each in functions]
            try:
                grammar = self._compile("tools", json.dumps([definitions, [choice.mode, choice.name], parallel, schema]))
            except RequestError as error:
                match = _FIELD.match(str(error))
                raise bad_request(str(error), "tools" if match is None else match[0]) from error
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        logprobs = None if not body.logprobs else body.top_logprobs or 0
        requests = self._requests(body, [ids], limit, self.config.max_tokens, logprobs, grammar)
        return PreparedRequests(requests, len(ids), calling, choice.name is not None)

    def completion(self, body: protocol.CompletionRequest) -> PreparedRequests:
        """Engine requests of a completion body.

        Raises:
            ApiError: naming the field at fault.
        """
        self.check_name(body.model)
        inputs: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if inputs and isinstance(inputs[0], int):
            inputs = [inputs]
        prompts = [self.plain_ids(prompt) if isinstance(prompt, str) else list(prompt) for prompt in inputs]
        echoed = inputs if body.echo else []
        texts = tuple(prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in echoed)
        requests = self._requests(body, prompts, body.max_tokens, 16, body.logprobs, None)
        return PreparedRequests(requests, sum(map(len, prompts)), echoed_prompts=texts)

    def infilling(self, body: protocol.InfillRequest) -> PreparedRequests:
        """Engine requests of an infill body, one per length that is tried.

        Raises:
            ApiError: naming the field at fault.
        """
        self.check_name(body.model)
        tokens = body.tokens if isinstance(body.tokens, int) else (body.tokens[0], body.tokens[1])
        try:
            parts = split_holes(body.text, body.hole)
            params = self._params(body)
            template = self.language_model.request((None,), params)  # a hole: not speculative
            requests = filling_requests(template, parts, tokens, self.tokenizer, whole=params.block_size is None)
            requests[-1].check(self.language_model.config)
        except UnmaskError as error:
            raise _refused(error, body, "text") from error
        return PreparedRequests(requests, sum(token is not None for token in requests[0].ids))

    def call_parser(self) -> CallParser:
        """A parser of the tool calls in one answer."""
        return self._format.parser()

    @cached_property
    def _token_bytes(self) -> tuple[bytes, ...] | None:
        try:
            return self.language_model.grammars.token_bytes
        except RequestError:
            return None  # The tokens are not byte strings: each is decoded on its own.

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of a plain text prompt."""
        try:
            return self.language_model.encode_prompt(text, chat=False)
        except UnmaskError as error:
            raise bad_request(str(error), "prompt") from error

    def _requests(
        self,
        body: protocol.ChatRequest | protocol.CompletionRequest,
        prompts: Sequence[Sequence[int]],
        limit: int | None,
        default_limit: int,
        logprobs: int | None,
        grammar: Grammar | None,
    ) -> list[Request]:
        requests = []
        for ids in prompts:
            room = self.context - len(ids)
            num_new = min(default_limit, room) if limit is None else limit
            if room < 1 or num_new > room:
                raise bad_request(
                    f"the prompt has {len(ids)} tokens and {max(num_new, 1)} new ones are requested, but the context of "
                    f"{self.name} holds {self.context}; shorten the prompt or request fewer",
                    "messages" if isinstance(body, protocol.ChatRequest) else "prompt",
                    "context_length_exceeded",
                )
            try:
                params = self._params(body, max_new_tokens=num_new, stop=body.stops, logprobs=logprobs)
                request = self.language_model.request(ids, params, grammar=grammar)
                request.check(self.language_model.config)
            except RequestError as error:
                raise _refused(error, body, "response_format") from error
            requests += request.samples(body.n or 1)
        return requests

    def _params(self, body: protocol._Sampling, **options: Any) -> SamplingParams:
        """The decoding options of a body. Without a seed, samples differ from call to call."""
        given = body.diffusion.model_dump(exclude_none=True, exclude={"watch"}) | options
        given |= body.model_dump(exclude_none=True, include=protocol.names_of("http"))
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], _MIN_TOP_P)
        given.setdefault("seed", secrets.randbits(62))
        given["logit_bias"] = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
        return SamplingParams(**given)

    def _template_message(self, message: protocol.ChatMessage) -> dict[str, Any]:
        """A message as chat templates read it: content as one text, a role they know."""
        fields: dict[str, Any] = {"content": None} | message.model_dump(exclude_none=True)
        if isinstance(message.content, list):
            fields["content"] = "\n".join(part.text for part in message.content)
        if message.role == "developer" and "developer" not in self.tokenizer.chat_template:
            fields["role"] = "system"
        return fields

    @cached_property
    def _format(self) -> ToolFormat:
        return tool_format(self.tokenizer)

    def _compile_once(self, kind: str, source: str) -> Grammar | None:
        grammars = self.language_model.grammars
        if kind == "json_schema":
            return grammars.json_schema(source)
        definitions, choice, parallel, answer = json.loads(source)
        functions = [protocol.FunctionSpec(**definition) for definition in definitions]
        return self._format.compile(grammars, functions, ToolChoice(*choice), parallel=parallel, answer=answer)


def _answer_schema(response_format: protocol.ResponseFormat | None) -> dict[str, Any] | None:
    """JSON schema of an answer without tool calls; None: any text."""
    if response_format is None or response_format.type == "text":
        return None
    schema = {"type": "object"} if response_format.json_schema is None else response_format.json_schema.schema_
    return schema if isinstance(schema, dict) else {} if schema else {"allOf": [False]}


def _tools(body: protocol.ChatRequest | None) -> tuple[list[protocol.FunctionSpec], ToolChoice, bool]:
    """The functions of a body, which of them must or may be called, and whether more than one call may be made."""
    if body is None or not body.tools:
        return [], ToolChoice("none"), False
    functions = [tool.function for tool in body.tools]
    tool_choice = body.tool_choice if body.tool_choice is not None else "auto"
    if isinstance(tool_choice, protocol.NamedTool):
        return functions, ToolChoice("required", tool_choice.function.name), False
    return functions, ToolChoice(tool_choice), body.parallel_tool_calls is not False


def _refused(error: UnmaskError, body: protocol._Sampling, default_field: str) -> ApiError:
    """The engine's error about an option as an API error; the message begins with the option's name."""
    name = str(error).partition(" ")[0]
    if name in protocol.Diffusion.model_fields:
        name = f"diffusion.{name}"
    elif name not in type(body).model_fields:
        name = default_field
    return bad_request(str(error), name)
