"""The live view of decoding: the answer while it is denoised, redrawn in a terminal or printed block by block.

Owns what is shown of each step. Knows no model beyond its tokenizer and its end-of-sequence ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from unmask.cli.console import cost_line, is_live, visible
from unmask.data.detokenizer import DecodePiece, decode_whole_characters
from unmask.engine.generation import Generation
from unmask.engine.llm import LanguageModel
from unmask.engine.request import DecodingStep, OnStep

TokenState = Literal["committed", "accepted", "edited", "candidate", "masked"]
"""`accepted` and `edited`: by the last forward; `candidate`: undecided, the model's likeliest token is shown."""
MASKED_GLYPH = "░"
STYLES: dict[TokenState, str] = {
    "committed": "",
    "accepted": "bold green",
    "edited": "bold underline yellow",
    "candidate": "dim italic",
    "masked": "dim",
}


@dataclass(frozen=True)
class TextRun:
    """Text of neighbouring tokens in the same state."""

    text: str
    state: TokenState


class Transcript:
    """The answer so far: finished blocks and the state of the current block.

    Args:
        decode: text of token ids.
        eos_ids: tokens that end the answer.
        max_tokens: of the answer.
    """

    def __init__(self, decode: DecodePiece, eos_ids: Sequence[int], max_tokens: int) -> None:
        self._decode, self._eos_ids, self._max_tokens = decode, frozenset(eos_ids), max_tokens
        self._finished_ids: list[int] = []
        self._step: DecodingStep | None = None

    def observe(self, step: DecodingStep) -> None:
        """Take in the next step; positions before its first one are finished."""
        if self._step is not None:
            self._finished_ids += self._decided(step.start - self._step.start)
        self._step = step

    @property
    def forwards(self) -> int:
        """Forwards of the model so far."""
        return 0 if self._step is None else self._step.forwards

    @property
    def num_decided(self) -> int:
        """Tokens that will not change any more."""
        return min(len(self._finished_ids) + len(self._decided()), self._max_tokens)

    @property
    def block_is_finished(self) -> bool:
        """Whether every token of the current block is decided."""
        return self._step is not None and None not in self._step.tokens

    def finished_text(self) -> str:
        """Text of all finished blocks, without part of a character at its end."""
        ids = self._finished_ids + (self._decided() if self.block_is_finished else [])
        before_end = list(itertools.takewhile(lambda token: token not in self._eos_ids, ids))
        return decode_whole_characters(self._decode, before_end[: self._max_tokens])

    def runs(self) -> list[TextRun]:
        """The whole answer so far, in order."""
        if self._step is None:
            return []
        states: list[tuple[int | None, TokenState]] = [(token, "committed") for token in self._finished_ids]
        step = self._step
        positions = zip(step.tokens, step.guess, step.accepted, step.edited, strict=True)
        states += [self._state(*position) for fixed, position in zip(step.fixed, positions, strict=True) if not fixed]
        ends = [number for number, (token, state) in enumerate(states) if token in self._eos_ids and state != "candidate"]
        if ends:  # later tokens will not be part of the answer
            states = states[: ends[0] + 1]
        elif self.block_is_finished:
            states += [(None, "masked")] * len(step.tokens)
        return self._spell(states[: self._max_tokens])

    def _decided(self, count: int | None = None) -> list[int]:
        """The decided tokens at the first `count` positions of the current step, those of the prompt left out."""
        if self._step is None:
            return []
        pairs = zip(self._step.fixed[:count], self._step.tokens[:count], strict=True)
        return [token for fixed, token in pairs if not fixed and token is not None]

    def _state(self, token: int | None, guess: int | None, accepted: bool, edited: bool) -> tuple[int | None, TokenState]:
        """What is shown of a position. A candidate without text (a control token) is a mask: the block keeps its length."""
        if token is not None:
            return token, "edited" if edited else "accepted" if accepted else "committed"
        return (None, "masked") if guess is None or not self._decode([guess]) else (guess, "candidate")

    def _spell(self, states: list[tuple[int | None, TokenState]]) -> list[TextRun]:
        """Text of every run, decoded after the runs before it: on its own, a token may lose its space."""
        runs: list[TextRun] = []
        ids: list[int] = []
        for state, group in itertools.groupby(states, key=lambda entry: entry[1]):
            tokens = [token for token, _ in group]
            if state == "masked":
                runs.append(TextRun(MASKED_GLYPH * len(tokens), state))
                continue
            before = decode_whole_characters(self._decode, ids)
            ids += [token for token in tokens if token is not None]
            whole = self._decode(ids)
            text = whole[len(before) :] if whole.startswith(before) else self._decode(ids[-len(tokens) :])
            if text:
                runs.append(TextRun(text, state))
        return runs


def show(
    console: Console, model: LanguageModel, prompt: Sequence[int], max_tokens: int, generate: Callable[[OnStep], Generation]
) -> Generation:
    """Run `generate` and show its progress: redrawn live in a terminal, otherwise each block when it is finished.

    Args:
        console: where to show it.
        model: for its tokenizer and end-of-sequence ids.
        prompt: ids that the answer follows.
        max_tokens: that `generate` makes at most.
        generate: decodes, calling its argument after every step.

    Returns:
        What `generate` returns.
    """

    def decode(ids: Sequence[int]) -> str:
        assert model.tokenizer is not None, "generate() refuses a model without a tokenizer before its first step"
        return model.tokenizer.decode(ids, after=prompt)

    transcript = Transcript(decode, model.eos_ids, max_tokens)
    if is_live(console):
        return _show_live(console, transcript, generate)
    return _show_blocks(console, transcript, generate)


def costs(generation: Generation) -> str:
    """One line on what an answer cost."""
    return cost_line(generation.completion_tokens, generation.forwards, generation.seconds)


def _show_live(console: Console, transcript: Transcript, generate: Callable[[OnStep], Generation]) -> Generation:
    # Without the refresh thread of rich, which would draw half-updated states and take time from decoding.
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def on_step(step: DecodingStep) -> None:
            transcript.observe(step)
            live.update(_frame(console, transcript), refresh=True)

        generation = generate(on_step)
        live.update(Group(Text(visible(generation.text)), Text(costs(generation), style="dim")), refresh=True)
    return generation


def _frame(console: Console, transcript: Transcript) -> Group:
    """The last lines of the answer that fit the terminal, and the counts so far."""
    text = Text()
    for run in transcript.runs():
        text.append(visible(run.text), style=STYLES[run.state])
    lines = text.wrap(console, console.width)[-max(1, console.height - 2) :]
    return Group(*lines, Text(cost_line(transcript.num_decided, transcript.forwards), style="dim"))


def _show_blocks(console: Console, transcript: Transcript, generate: Callable[[OnStep], Generation]) -> Generation:
    printed = ""

    def on_step(step: DecodingStep) -> None:
        nonlocal printed
        transcript.observe(step)
        text = transcript.finished_text()
        if transcript.block_is_finished and text.startswith(printed):
            _write(console, text[len(printed) :])
            printed = text

    generation = generate(on_step)
    rest = generation.text[len(printed) :] if generation.text.startswith(printed) else f"\n{generation.text}"
    _write(console, f"{rest}\n")
    return generation


def _write(console: Console, text: str) -> None:
    """Write unchanged, without wrapping."""
    console.file.write(text)
    console.file.flush()
