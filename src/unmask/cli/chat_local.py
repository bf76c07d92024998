"""`unmask chat` with the engine in this process.

Owns the engine over all turns, and what Ctrl-C does to it. Knows no command and no prompt line.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from rich.console import Console

from unmask.cli.chat_session import Answer, End, Message, Write
from unmask.cli.watch import show
from unmask.data.detokenizer import IncrementalDetokenizer
from unmask.engine.llm import Generation, LanguageModel
from unmask.engine.request import Completion, OnStep, Request
from unmask.errors import RequestError

MAX_NEW_TOKENS = 512


class LocalAnswerer:
    """One engine for all turns: what was said before is in its cache.

    Args:
        model: with a tokenizer that has a chat template.
        console: where to show the blocks at work; None: the text is written as it becomes final.
        interruptible: Ctrl-C ends the answer, not the program.
    """

    def __init__(self, model: LanguageModel, console: Console | None, *, interruptible: bool) -> None:
        if model.tokenizer is None or not model.tokenizer.has_chat_template:
            raise RequestError(f"model {model.name} has no chat template; continue a text with unmask generate --raw")
        self._model, self._tokenizer, self._console = model, model.tokenizer, console
        self._interruptible = interruptible
        self._engine = model.engine()
        self.about = f"{model.name}, context of {model.config.max_positions} tokens"

    def check(self, options: Mapping[str, Any]) -> None:
        self._request((), options, 0).check(self._model.config)

    def answer(self, messages: Sequence[Message], options: Mapping[str, Any], attempt: int, write: Write) -> Answer:
        ids = self._tokenizer.chat(messages, add_generation_prompt=True)
        request = self._request(ids, options, attempt)
        progress = _Progress(self._model, len(ids))
        stop = _StopSign()
        try:
            with stop.installed() if self._interruptible else contextlib.nullcontext():
                if self._console is None:
                    self._decode(request, progress, stop, write)
                else:
                    self._decode_in_view(self._console, request, progress, stop)
        except KeyboardInterrupt:
            # The second one may have come in the middle of anything: the engine is not to be trusted.
            self._engine = self._model.engine()
            if not self._interruptible:
                raise
        is_full = request.params.max_new_tokens < options.get("max_new_tokens", MAX_NEW_TOKENS)
        return progress.answer(is_full=is_full, drawn=self._console is not None)

    def _request(self, ids: Sequence[int], options: Mapping[str, Any], attempt: int) -> Request:
        """As many tokens as wanted, or as the context has room for."""
        wanted, context = {"max_new_tokens": MAX_NEW_TOKENS, **options}, self._model.config.max_positions
        if len(ids) >= context:
            raise RequestError(
                f"the conversation is {len(ids)} tokens and the context {context}: no room for an answer; "
                "ask something shorter, or /reset and then /retry (/save keeps what was said)"
            )
        wanted["max_new_tokens"] = min(wanted["max_new_tokens"], context - len(ids))
        return self._model.request(ids, sample=attempt, **wanted)

    def _decode(
        self, request: Request, progress: _Progress, stop: _StopSign, write: Write | None, on_step: OnStep | None = None
    ) -> None:
        with contextlib.closing(self._engine.stream(request, watch=on_step is not None)) as updates:  # type: ignore[type-var]
            for update in updates:
                text = progress.take(update.new_ids, update.completion)
                if write is not None and text:
                    write(text)
                if on_step is not None and update.step is not None:
                    on_step(update.step)
                if stop.requested and update.completion is None:
                    return

    def _decode_in_view(self, console: Console, request: Request, progress: _Progress, stop: _StopSign) -> None:
        def generate(on_step: OnStep) -> Generation:
            self._decode(request, progress, stop, None, on_step)
            return progress.generation()

        show(console, self._model, request.params.max_new_tokens, generate)


class _Progress:
    """An answer as it grows."""

    def __init__(self, model: LanguageModel, prompt_tokens: int) -> None:
        assert model.tokenizer is not None, "a LocalAnswerer refuses models without one"
        self._stream, self._prompt_tokens, self._started = (
            IncrementalDetokenizer(model.tokenizer),
            prompt_tokens,
            time.perf_counter(),
        )
        self._completion, self._is_over, self._text = Completion((), "length", 0), False, ""

    def take(self, new_ids: Sequence[int], completion: Completion | None) -> str:
        """What can be shown after one more forward."""
        text = self._stream.push(new_ids)
        if completion is not None:
            self._completion, self._is_over = completion, True
            text += self._stream.finish(completion.ids)
        else:
            so_far = self._completion
            self._completion = Completion(so_far.ids + tuple(new_ids), "length", so_far.forwards + 1)
        self._text += text
        return text

    def generation(self) -> Generation:
        """As the live view wants it."""
        count, forwards, seconds = len(self._completion.ids), self._completion.forwards, time.perf_counter() - self._started
        return Generation(
            text=self._text,
            ids=self._completion.ids,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=count,
            finish_reason=self._completion.finish_reason,
            forwards=forwards,
            tokens_per_forward=count / max(forwards, 1),
            seconds=seconds,
            tokens_per_second=count / seconds,
            costs=self._completion.costs,
        )

    def answer(self, *, is_full: bool, drawn: bool) -> Answer:
        """As the conversation wants it; `is_full`: the context, not the user, has set the budget."""
        end: End = self._completion.finish_reason if self._is_over else "interrupted"
        return Answer(
            text=self._text,
            end="context" if end == "length" and is_full else end,
            seconds=time.perf_counter() - self._started,
            tokens=len(self._completion.ids),
            forwards=self._completion.forwards,
            cached_tokens=self._completion.costs.cached_tokens if self._is_over else None,
            prompt_tokens=self._prompt_tokens,
            drawn=drawn,
        )


class _StopSign:
    """While installed, the first Ctrl-C asks for an end between two forwards, and the second means at once."""

    requested = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.default_int_handler)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        earlier = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, earlier)
