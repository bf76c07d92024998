"""`ServedModel`: a language model behind the API, and `PreparedRequests`: the engine requests of one body.

Owns defaults and limits. `prepare_chat` and `prepare_text` lay prompts out. Knows neither HTTP responses nor the worker.
Thread-safe.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from unmask.data.tokenizer import Tokenizer
from unmask.engine.grammar import Grammar
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Request, distinct_samples
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError, RequestError, UnmaskError
from unmask.serve.config import ServerConfig
from unmask.serve.errors import ApiError, bad_request
from unmask.serve.protocol.fields import Diffusion, GeneratingRequest, Sampling, names_of
from unmask.serve.protocol.messages import FunctionSpec
from unmask.serve.protocol.structured import Constraint
from unmask.serve.tool_parser import CallParser
from unmask.serve.tools import ToolChoice, ToolFormat, tool_format

_MIN_TOP_P = 1e-9
"""OpenAI accepts 0 as well: the likeliest token."""


@dataclass(frozen=True)
class PreparedRequests:
    """The engine requests of one body.

    Attributes:
        requests: one per completion, those of one prompt next to each other.
        prompt_tokens: of all prompts, each counted once.
        callable_names: of the functions that the text may call.
        forced_call: whether the client named the function to call.
        best_of: completions per prompt, of which the `n` best are the answer; None: all are.
        echoed_prompts: texts of the prompts where the completions begin with them.
    """

    requests: list[Request]
    prompt_tokens: int
    callable_names: tuple[str, ...] = ()
    forced_call: bool = False
    best_of: int | None = None
    echoed_prompts: tuple[str, ...] = ()


class ServedModel:
    """A language model behind the API.

    Args:
        language_model: with a tokenizer.
        config: of the server.
        parent: the model without its adapter, where it has one.

    Raises:
        ConfigError: the model has no tokenizer.
    """

    def __init__(self, language_model: LanguageModel, config: ServerConfig, *, parent: ServedModel | None = None) -> None:
        if language_model.tokenizer is None:
            raise ConfigError(f"model {language_model.name} has no tokenizer; add tokenizer.json to its folder to serve it")
        self.language_model, self.config = language_model, config
        self.tokenizer: Tokenizer = language_model.tokenizer
        self.parent, adapter = parent, language_model.adapter
        self.names = tuple(dict.fromkeys(config.names or (language_model.name,)))
        if parent is not None and adapter is not None:
            self.names = (*(f"{name}:{adapter.name}" for name in parent.names), adapter.name)
        self.name = self.names[0]
        self.created = int(time.time())
        self.compile = lru_cache(maxsize=64)(partial(_compile, language_model))

    @property
    def context(self) -> int:
        """Context length: tokens that prompt and completion may have together."""
        return self.language_model.config.max_positions

    def describe(self, name: str) -> dict[str, Any]:
        """OpenAI's model object of a name, with context length, decoding defaults of a diffusion model, and options."""
        config = self.language_model.config
        defaults = SamplingParams(max_new_tokens=self.config.max_tokens).resolve(config)
        diffusion = {"block_size": defaults.block_size, "threshold": defaults.threshold}
        capabilities = self.language_model.capabilities
        options = [each for each in SamplingParams.options().values() if "page" in each.surfaces and capabilities.takes(each)]
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "unmask",
            "root": self.name,
            "parent": None if self.parent is None else self.parent.name,
            "max_model_len": self.context,
            "capabilities": asdict(capabilities),
            "diffusion": diffusion if capabilities.diffusion else None,
            "options": [
                option.to_json(None if option.name == "seed" else getattr(defaults, option.name)) for option in options
            ],
        }

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; none for a control token."""
        table = self._token_bytes
        return table[token] if table is not None else self.tokenizer.decode([token]).encode()

    def call_parser(self, names: Sequence[str]) -> CallParser:
        """A parser of the calls of these functions in one answer."""
        return self.tool_format.parser(names)

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

    def probe(self, priority: int) -> Request:
        """A request for one token, to see whether the engine works."""
        return self.language_model.request([0], SamplingParams(max_new_tokens=1), priority=priority)

    def requests(
        self,
        body: GeneratingRequest,
        prompts: Sequence[Sequence[int]],
        limit: int | None,
        default_limit: int,
        *,
        field: str,
        samples: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> list[Request]:
        """Engine requests of prompts, `n` for each.

        Args:
            body: with the decoding options.
            prompts: token ids.
            limit: new tokens that the client wants at most.
            default_limit: without a `limit`, if the context leaves so much room.
            field: of the body that holds the prompt, to be named in errors.
            samples: per prompt, if not `n`.
            logprobs: alternatives to report per token; None: no log-probabilities.
            prompt_logprobs: likewise, of the prompt.
            grammar: that every completion follows.

        Raises:
            ApiError: naming the field at fault.
        """
        requests, wanted = [], {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        for ids in prompts:
            room = self.context - len(ids)
            num_new = max(min(default_limit, room), 1) if limit is None else limit
            if num_new > room:
                # The words of OpenAI's error, by which frameworks recognise it.
                raise bad_request(
                    f"This model's maximum context length is {self.context} tokens. However, you requested "
                    f"{len(ids) + num_new} tokens ({len(ids)} in the {field}, {num_new} in the completion); "
                    "shorten the prompt, or request fewer new tokens",
                    field,
                    "context_length_exceeded",
                )
            try:
                params = self.params(body, max_new_tokens=num_new, stop=body.stops, **wanted)
                request = self.language_model.request(ids, params, grammar=grammar)
                request.check(self.language_model.config)
            except RequestError as error:
                raise refused(error, body, "response_format") from error
            requests += [request] * (samples or body.n or 1)
        return distinct_samples(requests)

    def params(self, body: Sampling, **options: Any) -> SamplingParams:
        """The decoding options of a body. Without a seed, samples differ from call to call."""
        given = body.diffusion.model_dump(exclude_none=True, exclude={"watch"}) | options
        given |= body.model_dump(exclude_none=True, include=names_of("http"))
        if isinstance(body, GeneratingRequest) and body.min_tokens is not None:
            given.setdefault("min_new_tokens", body.min_tokens)
        if "top_p" in given:
            given["top_p"] = max(given["top_p"], _MIN_TOP_P)
        given.setdefault("seed", secrets.randbits(62))
        given["logit_bias"] = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
        return SamplingParams(**given)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model reads function definitions and writes calls."""
        return tool_format(self.tokenizer)

    def grammar(self, constraint: Constraint | None) -> Grammar | None:
        """The grammar of a body's constraint.

        Raises:
            ApiError: it is wrong, or not supported.
        """
        if constraint is None:
            return None
        try:
            return self.compile(constraint.kind, constraint.source)
        except RequestError as error:
            raise bad_request(f"{constraint.field}: {error}", constraint.field) from error


def _compile(language_model: LanguageModel, kind: str, source: str) -> Grammar | None:
    """A grammar of a model's tokens. No method: an object that holds its own cached method is not freed when it is let go."""
    grammars = language_model.grammars
    match kind:
        case "json_schema":
            return grammars.json_schema(source)
        case "regex":
            return grammars.regex(source)
        case "grammar":
            return grammars.lark(_lark(source))
        case "choice":
            return grammars.lark("start: " + " | ".join(json.dumps(text) for text in json.loads(source)))
    definitions, choice, parallel, answer = json.loads(source)
    functions = [FunctionSpec(**definition) for definition in definitions]
    assert language_model.tokenizer is not None
    form = tool_format(language_model.tokenizer)
    return form.compile(grammars, functions, ToolChoice(*choice), parallel=parallel, answer=answer)


def _lark(grammar: str) -> str:
    """A grammar in llguidance's Lark; one in llama.cpp's GBNF is translated."""
    if "::=" not in grammar:
        return grammar
    try:
        return str(gbnf_to_lark(grammar))
    except (GbnfToLarkError, RecursionError) as error:
        raise RequestError(f"GBNF grammar: {error}; correct it, or write it in Lark") from error


def refused(error: UnmaskError, body: Sampling, default_field: str) -> ApiError:
    """The engine's error about an option as an API error; the message begins with the option's name."""
    name = str(error).partition(" ")[0]
    if name == "min_new_tokens" and isinstance(body, GeneratingRequest) and body.min_tokens is not None:
        name = "min_tokens"
    elif name in Diffusion.model_fields:
        name = f"diffusion.{name}"
    elif name not in type(body).model_fields:
        name = default_field
    return bad_request(str(error), name)
