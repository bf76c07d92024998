"""Plain texts as engine requests: prompts to continue, and texts with holes.

Owns what these bodies mean. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unmask.engine.fim import FimTokens
from unmask.engine.infill import fill_between, filling_requests, split_holes
from unmask.engine.request import Request, distinct_samples
from unmask.errors import UnmaskError
from unmask.serve.errors import bad_request
from unmask.serve.protocol.text import CompletionRequest, InfillRequest
from unmask.serve.served_model import PreparedRequests, ServedModel, refused

DEFAULT_TOKENS = 16
"""Of a completion without `max_tokens`, as OpenAI."""


def prepare_completion(
    model: ServedModel, body: CompletionRequest, *, default_tokens: int = DEFAULT_TOKENS
) -> PreparedRequests:
    """Engine requests of a completion body.

    Args:
        model: the served one.
        body: of /v1/completions, or of another API in its form.
        default_tokens: without `max_tokens`, where the model can end earlier.

    Raises:
        ApiError: naming the field at fault.
    """
    inputs: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if inputs and isinstance(inputs[0], int):
        inputs = [inputs]
    if body.suffix:
        requests = _filling(model, body, inputs, body.suffix, default_tokens)
        return PreparedRequests(requests, _num_given(requests), echoed_prompts=_echoed(model, body, inputs))
    prompts = [model.plain_ids(prompt) if isinstance(prompt, str) else list(prompt) for prompt in inputs]
    best_of = body.best_of if (body.best_of or 1) > (body.n or 1) else None
    requests = model.requests(
        body,
        prompts,
        body.max_tokens,
        default_tokens,
        field="prompt",
        samples=best_of,
        logprobs=0 if best_of is not None and body.logprobs is None else body.logprobs,
        prompt_logprobs=body.logprobs if body.scores_prompt else None,
        grammar=model.grammar(body.constraint),
    )
    echoed = _echoed(model, body, inputs)
    return PreparedRequests(requests, sum(map(len, prompts)), best_of=best_of, echoed_prompts=echoed)


def _echoed(model: ServedModel, body: CompletionRequest, prompts: Sequence[str | list[int]]) -> tuple[str, ...]:
    """Texts of the prompts where the client wants them before the completions."""
    return tuple(each if isinstance(each, str) else model.tokenizer.decode(each) for each in prompts if body.echo)


def _filling(
    model: ServedModel, body: CompletionRequest, prompts: Sequence[str | list[int]], suffix: str, default_tokens: int
) -> list[Request]:
    """Engine requests for the text between each prompt and a suffix."""
    tokenizer, language_model = model.tokenizer, model.language_model
    fim = FimTokens.of(tokenizer)
    try:
        beginnings = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        after = tokenizer.encode(suffix, after=[None])
        if language_model.capabilities.infill:
            tokens = body.max_tokens or DEFAULT_TOKENS
            template = language_model.request((None,), model.params(body, stop=body.stops, logprobs=body.logprobs))
            requests = [fill_between(template, each, tokens, after, tokenizer, model.context) for each in beginnings]
            for request in requests:
                request.check(language_model.config)
            return distinct_samples(request for request in requests for _ in range(body.n or 1))
        if fim is not None:
            filled = [fim.prompt(tokenizer.prefix_ids, each, after) for each in beginnings]
            requests = model.requests(body, filled, body.max_tokens, default_tokens, field="suffix", logprobs=body.logprobs)
            return [replace(each, eos_ids=each.eos_ids | fim.ends) for each in requests]
    except UnmaskError as error:
        raise refused(error, body, "suffix") from error
    raise bad_request(
        f"suffix: {model.name} predicts from left to right, and its tokenizer has no control tokens to fill in the middle; "
        "leave it out, or serve a diffusion model that is not shifted",
        "suffix",
    )


def _num_given(requests: Sequence[Request]) -> int:
    """Tokens that are not to be decided, of all prompts, each counted once."""
    return sum(token is not None for ids in {request.ids for request in requests} for token in ids)


def prepare_infill(model: ServedModel, body: InfillRequest) -> PreparedRequests:
    """Engine requests of an infill body, one per length that is tried.

    Raises:
        ApiError: naming the field at fault.
    """
    tokens = body.tokens if isinstance(body.tokens, int) else (body.tokens[0], body.tokens[1])
    try:
        parts = split_holes(body.text, body.hole)
        params = model.params(body)
        template = model.language_model.request((None,), params)  # a hole: not speculative
        requests = filling_requests(template, parts, tokens, model.tokenizer, whole=params.block_size is None)
        requests[-1].check(model.language_model.config)
    except UnmaskError as error:
        raise refused(error, body, "text") from error
    return PreparedRequests(requests, _num_given(requests[:1]))
