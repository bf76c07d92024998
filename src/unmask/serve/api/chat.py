"""/v1/chat/completions: OpenAI's chat completion objects.

Owns the form of the response and of its stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.engine.request import TokenLogprob
from unmask.serve.api.choices import ResponseForm, respond
from unmask.serve.choice import Choice, ChoiceDelta, logprob_entry
from unmask.serve.errors import ERROR_RESPONSES
from unmask.serve.exchange import StateWithRoom, prepare
from unmask.serve.prepare_chat import prepare_chat
from unmask.serve.protocol.chat import ChatRequest

router = APIRouter()


@router.post("/v1/chat/completions", responses=ERROR_RESPONSES, response_class=JSONResponse)
async def post_chat(http: HttpRequest, body: ChatRequest, state: StateWithRoom) -> Response:
    """Answer a conversation."""
    state = state.named(body.model)
    prepared = await prepare(state, http, body, prepare_chat)
    return await respond(state, http, body, _ChatForm(state.model, prepared, with_logprobs=bool(body.logprobs)))


class _ChatForm(ResponseForm):
    id_prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, choice: Choice) -> dict[str, Any]:
        calls = [call.model_dump() for call in choice.tool_calls]
        content = choice.text if choice.text or not calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
        }

    def chunks(self, choice: Choice, delta: ChoiceDelta, *, is_first: bool) -> Iterator[dict[str, Any]]:
        def chunk(fields: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
            reason = None if fields else choice.finish_reason
            return {"index": choice.index, "delta": fields, "logprobs": logprobs, "finish_reason": reason}

        if is_first:
            yield chunk({"role": "assistant", "content": ""})
        # Log-probabilities go with text, even if it is empty.
        if delta.text or delta.logprobs:
            yield chunk({"content": delta.text}, self._logprobs(delta.logprobs))
        for call in delta.tool_calls:
            yield chunk({"tool_calls": [call]})
        if choice.completion is not None:
            yield chunk({})

    def _logprobs(self, entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        return {"content": [logprob_entry(self.model, entry) for entry in entries], "refusal": None}
