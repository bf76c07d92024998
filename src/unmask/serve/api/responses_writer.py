"""`ResponseWriter`: one response of OpenAI's Responses API, as an object and as a stream of events.

Owns their form. Both are written from the same parts, so that they agree.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from unmask.engine.request import TokenLogprob
from unmask.serve.api.answer_parts import AnswerWriter, Part, PartEvent
from unmask.serve.choice import Choice, logprob_entry
from unmask.serve.errors import ApiError, bad_request
from unmask.serve.event_stream import Event
from unmask.serve.exchange import Exchange
from unmask.serve.protocol.responses import ResponsesRequest
from unmask.serve.served_model import PreparedRequests, ServedModel

_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponseWriter(AnswerWriter):
    """One response.

    Args:
        body: of the request.
        model: that answers.
        prepared: the engine request.
        keep: called with the whole response before its last event is sent, as the next request may refer to it.

    Raises:
        ApiError: a field that the response repeats cannot be sent back.
    """

    def __init__(
        self, body: ResponsesRequest, model: ServedModel, prepared: PreparedRequests, keep: Callable[[Event], None]
    ) -> None:
        self._model, self._keep = model, keep
        self._num_events = 0
        params = prepared.requests[0].params
        text = {} if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
        self.answer: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(24)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "model": model.name,
            "output": [],
            "usage": None,
            "max_output_tokens": body.max_output_tokens,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store is not False,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_logprobs": body.top_logprobs or 0,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": "auto" if body.tool_choice is None else body.model_dump(include={"tool_choice"})["tool_choice"],
            "tools": [tool.model_dump() for tool in body.tools or []],
            "truncation": body.truncation or "disabled",
            "metadata": body.metadata or {},
            "user": body.user,
            "background": False,
        }
        for name, value in self.answer.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise bad_request(f"{name} holds half a surrogate pair; remove or repair it", name) from error

    def begin(self) -> Iterator[Event]:
        """The first events."""
        yield self._event("response.created", response=dict(self.answer))
        yield self._event("response.in_progress", response=dict(self.answer))

    def grow(self, event: PartEvent) -> Iterator[Event]:
        """Events of an output item, which is one part."""
        part = event.part
        if event.kind == "begin":
            item = self._item(part, status="in_progress")
            self.answer["output"].append(item)
            yield self._event("response.output_item.added", output_index=part.index, item=item)
        place = {"item_id": self.answer["output"][part.index]["id"], "output_index": part.index}
        yield from (
            self._text_events(event, {**place, "content_index": 0}) if part.call is None else self._call_events(event, place)
        )
        if event.kind == "end":
            item = self._item(part, id_=place["item_id"], status="completed" if part.is_complete else "incomplete")
            self.answer["output"][part.index] = item
            yield self._event("response.output_item.done", output_index=part.index, item=item)

    def end(self, choice: Choice, exchange: Exchange) -> Iterator[Event]:
        """The last events. An answer without a word has an empty message."""
        assert choice.completion is not None
        is_whole = choice.completion.finish_reason == "stop"
        if not self.answer["output"]:
            part = Part(0, is_complete=is_whole)
            yield from self.grow(PartEvent("begin", part))
            yield from self.grow(PartEvent("end", part))
        tokens = exchange.tokens
        self.answer |= {
            "status": "completed" if is_whole else "incomplete",
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": tokens.prompt,
                "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
                "output_tokens": tokens.completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": tokens.prompt + tokens.completion,
            },
            "diffusion": exchange.costs(exchange.choices),
        }
        self._keep(self.answer)
        yield self._event(f"response.{self.answer['status']}", response=self.answer)

    def failed(self, error: ApiError) -> dict[str, Any]:
        """The event that ends a stream with an error."""
        self.answer |= {
            "status": "failed",
            "error": {"code": _ERROR_CODES.get(error.status, "server_error"), "message": str(error)},
        }
        return self._event("response.failed", response=self.answer)

    def _text_events(self, event: PartEvent, place: dict[str, Any]) -> Iterator[Event]:
        part = event.part
        if event.kind == "begin":
            yield self._event("response.content_part.added", **place, part=self._content("", []))
        elif event.kind == "delta":
            logprobs = self._logprobs(event.logprobs)
            yield self._event("response.output_text.delta", **place, delta=event.text, logprobs=logprobs)
        else:
            content = self._content(part.text, part.logprobs)
            yield self._event("response.output_text.done", **place, text=part.text, logprobs=content["logprobs"])
            yield self._event("response.content_part.done", **place, part=content)

    def _call_events(self, event: PartEvent, place: dict[str, Any]) -> Iterator[Event]:
        assert event.part.call is not None
        if event.kind == "delta":
            yield self._event("response.function_call_arguments.delta", **place, delta=event.text)
        elif event.kind == "end":
            name = event.part.call.function.name
            yield self._event("response.function_call_arguments.done", **place, name=name, arguments=event.part.text)

    def _item(self, part: Part, *, status: str, id_: str | None = None) -> dict[str, Any]:
        if part.call is None:
            content = [] if status == "in_progress" else [self._content(part.text, part.logprobs)]
            id_ = id_ or f"msg_{secrets.token_hex(24)}"
            return {"id": id_, "type": "message", "status": status, "role": "assistant", "content": content}
        return {
            "id": id_ or f"fc_{secrets.token_hex(24)}",
            "type": "function_call",
            "status": status,
            "call_id": part.call.id,
            "name": part.call.function.name,
            "arguments": "" if status == "in_progress" else part.text,
        }

    def _content(self, text: str, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs(logprobs)}

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
        return [logprob_entry(self._model, entry) for entry in entries]

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **fields}
