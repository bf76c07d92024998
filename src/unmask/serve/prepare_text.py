"""Plain texts as engine requests: prompts to continue, and texts with holes.

Owns what these bodies mean. Knows no HTTP.
"""

from __future__ import annotations

from typing import Any

from unmask.engine.infill import filling_requests, split_holes
from unmask.errors import UnmaskError
from unmask.serve.protocol.text import CompletionRequest, InfillRequest
from unmask.serve.served_model import PreparedRequests, ServedModel, refused


def prepare_completion(model: ServedModel, body: CompletionRequest) -> PreparedRequests:
    """Engine requests of a completion body.

    Raises:
        ApiError: naming the field at fault.
    """
    model.check_name(body.model)
    inputs: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if inputs and isinstance(inputs[0], int):
        inputs = [inputs]
    prompts = [model.plain_ids(prompt) if isinstance(prompt, str) else list(prompt) for prompt in inputs]
    echoed = inputs if body.echo else []
    texts = tuple(prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt) for prompt in echoed)
    requests = model.requests(body, prompts, body.max_tokens, 16, field="prompt", logprobs=body.logprobs)
    return PreparedRequests(requests, sum(map(len, prompts)), echoed_prompts=texts)


def prepare_infill(model: ServedModel, body: InfillRequest) -> PreparedRequests:
    """Engine requests of an infill body, one per length that is tried.

    Raises:
        ApiError: naming the field at fault.
    """
    model.check_name(body.model)
    tokens = body.tokens if isinstance(body.tokens, int) else (body.tokens[0], body.tokens[1])
    try:
        parts = split_holes(body.text, body.hole)
        params = model.params(body)
        template = model.language_model.request((None,), params)  # a hole: not speculative
        requests = filling_requests(template, parts, tokens, model.tokenizer, whole=params.block_size is None)
        requests[-1].check(model.language_model.config)
    except UnmaskError as error:
        raise refused(error, body, "text") from error
    return PreparedRequests(requests, sum(token is not None for token in requests[0].ids))
