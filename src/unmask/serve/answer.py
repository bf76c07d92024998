"""One completion as its client sees it: what is new of its text, its calls, its log-probabilities.

Owns the state between updates. Streamed or not, an answer goes through here, so both say the same. Knows no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from unmask.engine.engine import Update
from unmask.engine.request import Completion, Request, Step, TokenLogprob
from unmask.serve.served import Prepared, ServedModel
from unmask.serve.text import TextStream
from unmask.serve.tool_parser import CallArguments, CallStart, Content

State = Literal["masked", "provisional", "committed", "edited"]
_LEAST_LOGPROB = -9999.0
"""JSON has no infinity."""


@dataclass
class Call:
    """A tool call so far; `arguments` is JSON text."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def to_json(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class News:
    """What an update brought. `calls` are OpenAI's deltas of tool calls."""

    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: tuple[TokenLogprob, ...] = ()


class Answer:
    """One choice.

    Attributes:
        text: what its client has been told so far, tool calls left out.
        calls: tool calls so far.
        logprobs: of the tokens handed out, end-of-sequence left out.
        completion: set when it has ended.
    """

    def __init__(self, index: int, request: Request, prepared: Prepared, model: ServedModel) -> None:
        self.index, self.request = index, request
        self.text = ""
        self.calls: list[Call] = []
        self.logprobs: list[TokenLogprob] = []
        self.completion: Completion | None = None
        self.num_final = 0
        self._confidences: dict[int, float] = {}
        ids = request.ids
        self._begin = ids.index(None) if None in ids else len(ids)
        self._forced_call = prepared.forced_call
        self._model = model
        self._stream = TextStream(model.tokenizer, request.stop)
        self._parser = model.parser() if prepared.parses_calls else None

    def take(self, update: Update) -> News:
        """What an update brought."""
        self.num_final += len(update.new_ids)
        self.completion = update.completion
        over = update.completion is not None
        text = self._stream.push(update.new_ids) if update.completion is None else self._stream.finish(update.completion)
        news = News(logprobs=tuple(e for e in update.new_logprobs if e.token not in self.request.eos_ids))
        self.logprobs += news.logprobs
        if self._parser is None:
            news.text = text
        else:
            self._parse(text, over, news)
        self.text += news.text
        return news

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's: a forced call ends with stop, others with tool_calls."""
        if self.completion is None:
            return None
        if self.calls and self.completion.finish_reason == "stop" and not self._forced_call:
            return "tool_calls"
        return self.completion.finish_reason

    def watched(self, step: Step) -> dict[str, Any]:
        """What a forward saw of the completion, by place in it, up to its end."""
        begin = self._begin
        first = max(begin - step.start, 0)
        tokens = []
        for i in range(first, min(len(step.tokens), begin + self.request.num_wanted - step.start)):
            token = step.tokens[i]
            if token in self.request.eos_ids:
                break
            shown = token if token is not None else step.guess[i]
            place = step.start + i - begin
            if step.guess[i] is not None:
                self._confidences[place] = round(step.confidence[i], 4)
            text = "" if shown is None else self._model.spell(shown).decode(errors="replace")
            confidence = self._confidences.get(place)
            tokens.append({"text": text, "state": self._state(step, i, place), "confidence": confidence})
        start = step.start + first - begin
        return {
            "index": self.index,
            "start": start,
            "committed": self.num_final,
            "forwards": step.forwards,
            "tokens": tokens,
        }

    def _state(self, step: Step, i: int, place: int) -> State:
        if step.tokens[i] is None:
            return "masked"
        if step.edited[i]:
            return "edited"
        return "committed" if place < self.num_final else "provisional"

    def _parse(self, text: str, over: bool, news: News) -> None:
        assert self._parser is not None
        events = [*self._parser.push(text), *(self._parser.finish() if over else [])]
        for event in events:
            match event:
                case Content(text=content):
                    news.text += content
                case CallStart(index=index, name=name):
                    self.calls.append(Call(name))
                    news.calls.append({"index": index, **self.calls[index].to_json()})
                case CallArguments(index=index, text=part):
                    self.calls[index].arguments += part
                    news.calls.append({"index": index, "function": {"arguments": part}})


def costs(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Ours beside OpenAI's usage: what the completions cost, summed."""
    done = [answer.completion for answer in answers if answer.completion is not None]
    tokens, forwards = sum(len(each.ids) for each in done), sum(each.forwards for each in done)
    return {
        "forwards": forwards,
        "tokens_per_forward": round(tokens / max(forwards, 1), 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-6), 2),
        "seconds": round(seconds, 4),
        "cached_tokens": sum(each.costs.cached_tokens for each in done),
        "edits": sum(each.costs.edits for each in done),
    }


def usage(answers: Sequence[Answer], prompt_tokens: int) -> dict[str, Any]:
    """OpenAI's usage: each prompt counted once, ends of text counted as tokens."""
    done = [answer.completion for answer in answers if answer.completion is not None]
    tokens = sum(len(each.ids) for each in done)
    # Later samples of a prompt also find what its first one has just computed.
    cached: dict[tuple[int | None, ...], int] = {}
    for answer in answers:
        if answer.completion is not None:
            found = answer.completion.costs.cached_tokens
            cached[answer.request.ids] = min(found, cached.get(answer.request.ids, found))
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": min(sum(cached.values()), prompt_tokens)},
    }


def token_entry(model: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    """A token as OpenAI writes it: its text, its bytes, its log-probability in nats."""
    spelled = model.spell(token)
    return {
        "token": spelled.decode(errors="replace"),
        "bytes": list(spelled),
        "logprob": max(logprob, _LEAST_LOGPROB),
    }
