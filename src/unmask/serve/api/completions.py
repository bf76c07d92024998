"""/v1/completions: plain text, continued.

Owns the form of the responses and of the stream.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
_Entry = tuple[int, TokenLogprob | None]
"""A token, and its log-probability: None for the first token of a prompt."""


@router.post("/v1/completions", responses=ERROR_RESPONSES, response_class=JSONResponse)
async def post_completions(http: HttpRequest, body: CompletionRequest, state: StateWithRoom) -> Response:
    """Continue texts."""
    state = state.named(body.model)
    prepared = await prepare(state, http, body, prepare_completion)
    return await respond(state, http, body, _TextForm(state.model, prepared, with_logprobs=body.logprobs is not None))


class _Characters:
    """Counts the characters of tokens that come one after the other."""

    def __init__(self) -> None:
        self._decode = getincrementaldecoder("utf-8")("replace").decode
        self._count = 0

    def take(self, spelling: bytes) -> int:
        """Where the token of these bytes begins."""
        start = self._count
        self._count += len(self._decode(spelling))
        return start


@dataclass(frozen=True)
class _TextForm(ResponseForm):
    _characters: dict[int, _Characters] = field(default_factory=lambda: defaultdict(_Characters))
    """By choice; each of its tokens is written once."""

    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def choice(self, choice: Choice) -> dict[str, Any]:
        return self._piece(choice, self._echo(choice) + choice.text, self._entries(choice))

    def chunks(self, choice: Choice, delta: ChoiceDelta, *, is_first: bool) -> Iterator[dict[str, Any]]:
        text = self._echo(choice) + delta.text if is_first else delta.text
        if text or delta.logprobs or choice.completion is not None:
            entries = self._entries(choice) if is_first else [(entry.token, entry) for entry in delta.logprobs]
            yield self._piece(choice, text, entries)

    def _entries(self, choice: Choice) -> list[_Entry]:
        """Tokens so far, those of a scored prompt among them."""
        prompt = zip(choice.request.ids, choice.prompt_logprobs or (), strict=False)
        return [*((token or 0, entry) for token, entry in prompt), *((entry.token, entry) for entry in choice.logprobs)]

    def _echo(self, choice: Choice) -> str:
        """The prompt's text if the client asked for it (`echo`)."""
        texts = self.prepared.echoed_prompts
        return texts[choice.index * len(texts) // len(self.prepared.requests)] if texts else ""

    def _piece(self, choice: Choice, text: str, entries: Sequence[_Entry]) -> dict[str, Any]:
        logprobs = self._logprobs(choice, entries) if self.with_logprobs else None
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, choice: Choice, entries: Sequence[_Entry]) -> dict[str, Any]:
        """The completions API's four lists of the next tokens; `text_offset` counts characters of the text, prompt included."""
        characters = self._characters[choice.index]
        return {
            "tokens": [self._name(token) for token, _ in entries],
            "token_logprobs": [None if entry is None else finite(entry.logprob) for _, entry in entries],
            "top_logprobs": [None if entry is None else self._alternatives(entry) for _, entry in entries],
            "text_offset": [characters.take(self.model.token_bytes(token)) for token, _ in entries],
        }

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """Log-probabilities by name; of tokens of one name, the likeliest."""
        named: dict[str, float] = {}
        for token, value in entry.alternatives:
            named.setdefault(self._name(token), finite(value))
        return named

    def _name(self, token: int) -> str:
        """A token's text; one that is part of a character is named by its bytes, as in OpenAI's API: these names are keys."""
        spelling = self.model.token_bytes(token)
        text = spelling.decode(errors="replace")
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling) if "\ufffd" in text else text
