"""`Choice`: one completion as its client sees it: text, tool calls, log-probabilities and what each update adds to them.

Owns the state between updates. Streamed or not, a completion passes through here, so that both forms agree. Knows no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from unmask.data.detokenizer import IncrementalDetokenizer
from unmask.engine.engine import Update
from unmask.engine.request import Completion, DecodingStep, Request, TokenLogprob
from unmask.serve.protocol.messages import CalledFunction, ToolCall
from unmask.serve.served_model import PreparedRequests, ServedModel
from unmask.serve.tool_parser import CallArguments, CallStart, Content


@dataclass
class ChoiceDelta:
    """What an update adds to a choice. `tool_calls` are OpenAI's deltas of tool calls."""

    text: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: tuple[TokenLogprob, ...] = ()


class Choice:
    """One of OpenAI's `choices`.

    Attributes:
        text: handed out so far, tool calls left out.
        tool_calls: so far.
        logprobs: of the tokens handed out; an end-of-sequence token is left out, but for where the prompt is scored: clients
            that score prompts count the completion's tokens to leave them out.
        prompt_logprobs: of the prompt's tokens, None for the first, where they were asked for.
        num_tokens: final ones, end-of-sequence tokens counted.
        completion: set when the choice has ended.
    """

    def __init__(self, index: int, request: Request, prepared: PreparedRequests, model: ServedModel) -> None:
        self.index, self.request = index, request
        self.text = ""
        self.tool_calls: list[ToolCall] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: Sequence[TokenLogprob | None] | None = None
        self.completion: Completion | None = None
        self.num_tokens = 0
        self._unlisted = () if request.params.prompt_logprobs is not None else request.end_ids
        self._confidences: dict[int, float] = {}
        ids = request.ids
        self._begin = ids.index(None) if None in ids else len(ids)
        self._forced_call = prepared.forced_call
        self._model = model
        self._detokenizer = IncrementalDetokenizer(model.tokenizer, request.params.stop, after=request.prefix)
        self._parser = model.call_parser(prepared.callable_names) if prepared.callable_names else None

    def take(self, update: Update) -> ChoiceDelta:
        """Take in an update of the engine; what it adds."""
        self.num_tokens += len(update.new_ids)
        self.completion, self.prompt_logprobs = update.completion, update.prompt_logprobs
        if update.completion is None:
            text = self._detokenizer.push(update.new_ids)
        else:
            text = self._detokenizer.finish(update.completion.text_ids, update.completion.text)
        delta = ChoiceDelta(logprobs=tuple(e for e in update.new_logprobs if e.token not in self._unlisted))
        self.logprobs += delta.logprobs
        if self._parser is None:
            delta.text = text
        else:
            self._parse(text, delta)
        self.text += delta.text
        return delta

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's: a call that the client forced ends with `stop`, other calls with `tool_calls`."""
        if self.completion is None:
            return None
        if self.tool_calls and self.completion.finish_reason == "stop" and not self._forced_call:
            return "tool_calls"
        return self.completion.finish_reason

    def watch_event(self, step: DecodingStep) -> dict[str, Any]:
        """The state of the completion's tokens after a forward, from `start` (a position in the completion) to its end."""
        begin = self._begin
        first = max(begin - step.start, 0)
        tokens = []
        for i in range(first, min(len(step.tokens), begin + self.request.num_wanted - step.start)):
            token = step.tokens[i]
            if token in self.request.end_ids:
                break
            candidate = token if token is not None else step.guess[i]
            position = step.start + i - begin
            if step.guess[i] is not None:
                self._confidences[position] = round(step.confidence[i], 4)
            text = "" if candidate is None else self._model.token_bytes(candidate).decode(errors="replace")
            confidence = self._confidences.get(position)
            tokens.append({"text": text, "state": self._state(step, i, position), "confidence": confidence})
        return {
            "index": self.index,
            "start": step.start + first - begin,
            "committed": self.num_tokens,
            "forwards": step.forwards,
            "tokens": tokens,
        }

    def _state(self, step: DecodingStep, i: int, position: int) -> str:
        if step.tokens[i] is None:
            return "masked"
        if step.edited[i]:
            return "edited"
        return "committed" if position < self.num_tokens else "provisional"

    def _parse(self, text: str, delta: ChoiceDelta) -> None:
        assert self._parser is not None
        events = [*self._parser.push(text), *(self._parser.finish() if self.completion is not None else [])]
        for event in events:
            match event:
                case Content(text=content):
                    delta.text += content
                case CallStart(index=index, name=name):
                    function = CalledFunction(name=name, arguments="")
                    self.tool_calls.append(ToolCall(id=f"call_{secrets.token_hex(12)}", function=function))
                    delta.tool_calls.append({"index": index, **self.tool_calls[index].model_dump()})
                case CallArguments(index=index, text=arguments):
                    self.tool_calls[index].function.arguments += arguments
                    delta.tool_calls.append({"index": index, "function": {"arguments": arguments}})


def logprob_entry(model: ServedModel, entry: TokenLogprob) -> dict[str, Any]:
    """A token and its alternatives as OpenAI writes them."""
    alternatives = [_token_entry(model, token, logprob) for token, logprob in entry.alternatives]
    return {**_token_entry(model, entry.token, entry.logprob), "top_logprobs": alternatives}


def _token_entry(model: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    """A token as OpenAI writes it: its text, its bytes, its log-probability in nats."""
    spelling = model.token_bytes(token)
    return {"token": spelling.decode(errors="replace"), "bytes": list(spelling), "logprob": finite(logprob)}


def finite(logprob: float) -> float:
    """The log-probability, or OpenAI's -9999: JSON has no infinity."""
    return max(logprob, -9999.0)
