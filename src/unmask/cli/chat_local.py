"""`LocalResponder`: `unmask chat` with the engine in this process.

Owns the engine during the whole session, and what Ctrl-C does to it. Knows no command and no prompt line.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console

from unmask.cli.chat_session import ChatReply, EndReason, Write
from unmask.cli.interrupt import stop_on_interrupt
from unmask.cli.watch import show
from unmask.data.chat import Message
from unmask.data.detokenizer import IncrementalDetokenizer
from unmask.engine.generation import Generation
from unmask.engine.llm import LanguageModel
from unmask.engine.request import Completion, OnStep, Request
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import RequestError

MAX_NEW_TOKENS = 512


class LocalResponder:
    """Makes replies with one engine, whose KV cache keeps the conversation between them.

    Args:
        model: with a tokenizer that has a chat template.
        console: where to show the denoising live; None: the text is written as it becomes final.
        interruptible: Ctrl-C ends the reply, not the program.
    """

    def __init__(self, model: LanguageModel, console: Console | None, *, interruptible: bool) -> None:
        if model.tokenizer is None or not model.tokenizer.has_chat_template:
            raise RequestError(f"model {model.name} has no chat template; use unmask generate with plain text")
        self._model, self._tokenizer, self._console = model, model.tokenizer, console
        self._interruptible = interruptible
        self._engine = model.engine()
        self.about = f"{model.name}, context of {model.config.max_positions} tokens"

    def check(self, params: SamplingParams) -> None:
        self._request((), params, 0).check(self._model.config)

    def reply(self, messages: Sequence[Message], params: SamplingParams, attempt: int, write: Write) -> ChatReply:
        ids = self._tokenizer.chat(messages, add_generation_prompt=True)
        request = self._request(ids, params, attempt)
        progress = _Progress(self._model, ids)
        interrupts = (signal.SIGINT,) if self._interruptible else ()
        try:
            with stop_on_interrupt(interrupts, notice=b"") as should_stop:
                decode = partial(self._decode, request, progress, should_stop)
                if self._console is None:
                    decode(write, None)
                else:
                    show(self._console, self._model, ids, request.params.max_new_tokens, partial(decode, None))
        except KeyboardInterrupt:
            # The second Ctrl-C interrupts anywhere, so the engine's state may be inconsistent.
            self._engine = self._model.engine()
            if not self._interruptible:
                raise
        is_full = request.params.max_new_tokens < _limit(params)
        return progress.reply(is_full=is_full, shown_live=self._console is not None)

    def _request(self, ids: Sequence[int], params: SamplingParams, attempt: int) -> Request:
        """A request for `max_new_tokens`, or as many as the context has room for."""
        context = self._model.config.max_positions
        if len(ids) >= context:
            raise RequestError(
                f"the conversation has {len(ids)} tokens and the context holds {context}: no room for an answer; "
                "send a shorter message, or /reset and then /retry (/save first)"
            )
        return self._model.request(ids, params, sample=attempt, max_new_tokens=min(_limit(params), context - len(ids)))

    def _decode(
        self,
        request: Request,
        progress: _Progress,
        should_stop: Callable[[], bool],
        write: Write | None,
        on_step: OnStep | None,
    ) -> Generation:
        with contextlib.closing(self._engine.stream(request, watch=on_step is not None)) as updates:  # type: ignore[type-var]
            for update in updates:
                text = progress.take(update.new_ids, update.completion)
                if write is not None and text:
                    write(text)
                if on_step is not None and update.step is not None:
                    on_step(update.step)
                if should_stop():
                    break
        return progress.generation()


def _limit(params: SamplingParams) -> int:
    return MAX_NEW_TOKENS if params.max_new_tokens is None else params.max_new_tokens


class _Progress:
    """The state of a growing reply."""

    def __init__(self, model: LanguageModel, prompt: Sequence[int]) -> None:
        assert model.tokenizer is not None, "a LocalResponder refuses models without one"
        self._detokenizer = IncrementalDetokenizer(model.tokenizer, after=prompt)
        self._prompt_tokens, self._started = len(prompt), time.perf_counter()
        self._completion, self._is_over, self._text = Completion((), "length", 0), False, ""

    def take(self, new_ids: Sequence[int], completion: Completion | None) -> str:
        """Take in an update of the engine; the text that becomes final with it."""
        text = self._detokenizer.push(new_ids)
        if completion is not None:
            self._completion, self._is_over = completion, True
            text += self._detokenizer.finish(completion.text_ids, completion.text)
        else:
            so_far = self._completion
            self._completion = Completion(so_far.ids + tuple(new_ids), "length", so_far.forwards + 1)
        self._text += text
        return text

    def generation(self) -> Generation:
        """The reply for the live view."""
        seconds = time.perf_counter() - self._started
        return Generation.from_completion(replace(self._completion, text=self._text), self._prompt_tokens, seconds=seconds)

    def reply(self, *, is_full: bool, shown_live: bool) -> ChatReply:
        """The reply for the session; `is_full`: the context, not `max_new_tokens`, limits its length."""
        end: EndReason = self._completion.finish_reason if self._is_over else "interrupted"
        return ChatReply(
            text=self._text,
            end="context" if end == "length" and is_full else end,
            seconds=time.perf_counter() - self._started,
            tokens=len(self._completion.ids),
            forwards=self._completion.forwards,
            cached_tokens=self._completion.costs.cached_tokens if self._is_over else None,
            prompt_tokens=self._prompt_tokens,
            shown_live=shown_live,
        )
