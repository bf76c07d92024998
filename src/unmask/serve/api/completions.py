"""/v1/completions: plain text, continued.

Owns the form of the responses and of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from unmask.engine.request import TokenLogprob
from unmask.serve.api.choices import ResponseForm, respond
from unmask.serve.choice import Choice, ChoiceDelta, finite
from unmask.serve.errors import ERROR_RESPONSES
from unmask.serve.exchange import StateWithRoom, prepare
from unmask.serve.prepare_text import prepare_completion
from unmask.serve.protocol.text import CompletionRequest

router = APIRouter()


@router.post("/v1/completions", responses=ERROR_RESPONSES, response_class=JSONResponse)
async def post_completions(http: HttpRequest, body: CompletionRequest, state: StateWithRoom) -> Response:
    """Continue texts."""
    prepared = await prepare(state, http, body, prepare_completion)
    return await respond(state, http, body, _TextForm(state.model, prepared, with_logprobs=body.logprobs is not None))


class _TextForm(ResponseForm):
    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, choice: Choice) -> dict[str, Any]:
        return self._piece(choice, self._echo(choice) + choice.text, choice.logprobs)

    def chunks(self, choice: Choice, delta: ChoiceDelta, *, is_first: bool) -> Iterator[dict[str, Any]]:
        text = self._echo(choice) + delta.text if is_first else delta.text
        if text or delta.logprobs or choice.completion is not None:
            yield self._piece(choice, text, delta.logprobs)

    def _echo(self, choice: Choice) -> str:
        """The prompt's text if the client asked for it (`echo`)."""
        texts = self.prepared.echoed_prompts
        return texts[choice.index * len(texts) // len(self.prepared.requests)] if texts else ""

    def _piece(self, choice: Choice, text: str, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        logprobs = self._logprobs(choice, entries) if self.with_logprobs else None
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The completions API's four lists of the last tokens; `text_offset` counts characters of the completion."""
        lengths = (len(self.model.token_bytes(entry.token).decode(errors="replace")) for entry in choice.logprobs)
        offsets = list(accumulate(lengths, initial=0))
        return {
            "tokens": [self._name(entry.token) for entry in entries],
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [{self._name(token): finite(value) for token, value in entry.alternatives} for entry in entries],
            "text_offset": offsets[len(choice.logprobs) - len(entries) : -1],
        }

    def _name(self, token: int) -> str:
        """A token's text; one that is part of a character is named by its bytes, as in OpenAI's API: these names are keys."""
        spelling = self.model.token_bytes(token)
        text = spelling.decode(errors="replace")
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling) if "\ufffd" in text else text
