"""`MessageWriter`: one message of Anthropic's API, as an object and as a stream of events.

Owns their form. Both are written from the same parts, so that they agree.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from unmask.serve.api.answer_parts import AnswerWriter, Part, PartEvent
from unmask.serve.choice import Choice
from unmask.serve.event_stream import Event
from unmask.serve.exchange import Exchange
from unmask.serve.protocol.anthropic import MessagesRequest
from unmask.serve.served_model import PreparedRequests, ServedModel


class MessageWriter(AnswerWriter):
    """One message.

    Args:
        body: of the request.
        model: that answers.
        prepared: the engine request.
    """

    def __init__(self, body: MessagesRequest, model: ServedModel, prepared: PreparedRequests) -> None:
        self._max_tokens = body.max_tokens
        self.answer: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(prepared.prompt_tokens),
        }

    def begin(self) -> Iterator[Event]:
        """The first events."""
        yield {"type": "message_start", "message": {**self.answer, "content": []}}
        yield {"type": "ping"}

    def grow(self, event: PartEvent) -> Iterator[Event]:
        """Events of a content block, which is one part."""
        index, is_text = event.part.index, event.part.call is None
        if event.kind == "begin":
            block = {"type": "text", "text": ""} if is_text else _tool_use(event.part, {})
            yield {"type": "content_block_start", "index": index, "content_block": block}
        elif event.kind == "delta":
            delta = {"type": "text_delta", "text": event.text}
            call_delta = {"type": "input_json_delta", "partial_json": event.text}
            yield {"type": "content_block_delta", "index": index, "delta": delta if is_text else call_delta}
        else:
            text = event.part.text
            block = {"type": "text", "text": text} if is_text else _tool_use(event.part, partial_arguments(text))
            self.answer["content"].append(block)
            yield {"type": "content_block_stop", "index": index}

    def end(self, choice: Choice, exchange: Exchange) -> Iterator[Event]:
        """The last events."""
        assert choice.completion is not None
        stop = choice.completion.stop
        if choice.completion.finish_reason == "length":
            is_whole = len(choice.completion.ids) == self._max_tokens
            reason = "max_tokens" if is_whole else "model_context_window_exceeded"
        elif stop is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if choice.tool_calls else "end_turn"
        ending = {"stop_reason": reason, "stop_sequence": stop}
        tokens = exchange.tokens
        usage = _usage(tokens.prompt, tokens.cached, tokens.completion)
        self.answer |= {**ending, "usage": usage, "diffusion": exchange.costs(exchange.choices)}
        yield {"type": "message_delta", "delta": ending, "usage": usage, "diffusion": self.answer["diffusion"]}
        yield {"type": "message_stop"}


def _tool_use(part: Part, arguments: Any) -> dict[str, Any]:
    assert part.call is not None
    return {"type": "tool_use", "id": part.call.id, "name": part.call.function.name, "input": arguments}


def partial_arguments(text: str) -> Any:
    """Arguments of a call, which an answer that has reached its limit leaves unfinished."""
    try:
        return from_json(text, allow_partial=True)
    except ValueError:
        return {}


def _usage(prompt_tokens: int, cached: int = 0, completion: int = 0) -> dict[str, int]:
    return {
        "input_tokens": prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": completion,
    }
