"""Watching a model decode: the answer as it forms, in a terminal or as plain blocks.

Owns what is shown of each step. Knows no model beyond its tokenizer and its end-of-text ids.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from unmask.cli.console import is_live, visible
from unmask.engine.llm import Generation, LanguageModel
from unmask.engine.request import OnStep, Step

Kind = Literal["committed", "accepted", "edited", "provisional", "masked"]
MASKED_GLYPH = "░"
STYLES: dict[Kind, str] = {
    "committed": "",
    "accepted": "bold green",
    "edited": "bold underline yellow",
    "provisional": "dim italic",
    "masked": "dim",
}
_BROKEN = "\ufffd"
"""What a tokenizer gives for the first half of a character."""


@dataclass(frozen=True)
class Piece:
    """A stretch of the answer whose tokens are in the same state."""

    text: str
    kind: Kind


class Transcript:
    """The answer so far: finished blocks and the state of the current one.

    Args:
        decode: text of token ids.
        eos_ids: tokens that end the answer.
        budget: most tokens of the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], eos_ids: Sequence[int], budget: int) -> None:
        self._decode, self._eos_ids, self._budget = decode, frozenset(eos_ids), budget
        self._done: list[int] = []
        self._step: Step | None = None

    def observe(self, step: Step) -> None:
        """Take in the next step; what lies before its first position is closed."""
        if self._step is not None:
            self._done += self._decided()[: self._num_open(range(self._step.start, step.start))]
        self._step = step

    @property
    def forwards(self) -> int:
        """Calls of the model so far."""
        return 0 if self._step is None else self._step.forwards

    @property
    def num_decided(self) -> int:
        """Tokens that will not change any more."""
        return min(len(self._done) + len(self._decided()), self._budget)

    @property
    def block_is_finished(self) -> bool:
        """Whether nothing of the current block is open."""
        return self._step is not None and None not in self._step.tokens

    def finished_text(self) -> str:
        """Text of every finished block, held back where it ends within a character."""
        ids = self._done + (self._decided() if self.block_is_finished else [])
        return self._decode(self._cut(ids)).rstrip(_BROKEN)

    def pieces(self) -> list[Piece]:
        """The whole answer so far, in order."""
        if self._step is None:
            return []
        states: list[tuple[int | None, Kind]] = [(token, "committed") for token in self._done]
        step = self._step
        places = zip(step.tokens, step.guess, step.accepted, step.edited, strict=True)
        states += [_state(*place) for fixed, place in zip(step.fixed, places, strict=True) if not fixed]
        states = self._until_end(states)
        ended = states and states[-1][0] in self._eos_ids
        if self.block_is_finished and not ended:
            states += [(None, "masked")] * len(step.tokens)
        return self._spell(states[: self._budget])

    def _decided(self) -> list[int]:
        if self._step is None:
            return []
        pairs = zip(self._step.fixed, self._step.tokens, strict=True)
        return [token for fixed, token in pairs if not fixed and token is not None]

    def _num_open(self, positions: range) -> int:
        """How many of these positions of the current step are not the prompt's."""
        return 0 if self._step is None else sum(not fixed for fixed in self._step.fixed[: len(positions)])

    def _cut(self, ids: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(ids) if token in self._eos_ids]
        return ids[: ends[0] if ends else None][: self._budget]

    def _until_end(self, states: list[tuple[int | None, Kind]]) -> list[tuple[int | None, Kind]]:
        """What follows a decided end-of-text token will not be part of the answer."""
        for place, (token, kind) in enumerate(states):
            if token in self._eos_ids and kind != "provisional":
                return states[: place + 1]
        return states

    def _spell(self, states: list[tuple[int | None, Kind]]) -> list[Piece]:
        """Text of every run, decoded after all that stands before it: a token alone may lose its space."""
        states = [self._silenced(*state) for state in states]
        pieces: list[Piece] = []
        ids: list[int] = []
        for kind, group in itertools.groupby(states, key=lambda state: state[1]):
            run = [token for token, _ in group]
            if kind == "masked":
                pieces.append(Piece(MASKED_GLYPH * len(run), kind))
                continue
            before = self._decode(ids).rstrip(_BROKEN)
            ids += [token for token in run if token is not None]
            whole = self._decode(ids)
            text = whole[len(before) :] if whole.startswith(before) else self._decode(ids[-len(run) :])
            if text:
                pieces.append(Piece(text, kind))
        return pieces

    def _silenced(self, token: int | None, kind: Kind) -> tuple[int | None, Kind]:
        """A guess at a control token has no text: it looks like a mask, so that the block keeps its length."""
        if kind == "provisional" and token is not None and not self._decode([token]):
            return None, "masked"
        return token, kind


def show(console: Console, model: LanguageModel, budget: int, generate: Callable[[OnStep], Generation]) -> Generation:
    """Run `generate` and show it at work: live in a terminal, otherwise each block when it is finished.

    Args:
        console: where to show it.
        model: for its tokenizer and end-of-text ids.
        budget: most tokens that `generate` makes.
        generate: decodes, calling what it is given after every step.

    Returns:
        What `generate` returns.
    """

    def decode(ids: Sequence[int]) -> str:
        assert model.tokenizer is not None, "generate() refuses a model without a tokenizer before its first step"
        return model.tokenizer.decode(ids)

    transcript = Transcript(decode, model.config.eos_ids, budget)
    if is_live(console):
        return _show_live(console, transcript, generate)
    return _show_blocks(console, transcript, generate)


def costs(generation: Generation) -> str:
    """One line on what an answer cost."""
    return (
        f"{generation.completion_tokens} tokens in {generation.forwards} forwards "
        f"({generation.tokens_per_forward:.2f} tokens per forward), "
        f"{generation.seconds:.1f} s ({generation.tokens_per_second:.1f} tokens/s)"
    )


def _show_live(console: Console, transcript: Transcript, generate: Callable[[OnStep], Generation]) -> Generation:
    # Redrawn by hand: a background thread would draw half-updated states and cost time between steps.
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def on_step(step: Step) -> None:
            transcript.observe(step)
            live.update(_frame(console, transcript), refresh=True)

        generation = generate(on_step)
        live.update(Group(Text(visible(generation.text)), Text(costs(generation), style="dim")), refresh=True)
    return generation


def _frame(console: Console, transcript: Transcript) -> Group:
    """The lines of the answer that fit the terminal, the newest ones, and the counts so far."""
    text = Text()
    for piece in transcript.pieces():
        text.append(visible(piece.text), style=STYLES[piece.kind])
    lines = text.wrap(console, console.width)[-max(1, console.height - 2) :]
    tokens, forwards = transcript.num_decided, transcript.forwards
    footer = f"{tokens} tokens in {forwards} forwards ({tokens / max(forwards, 1):.2f} tokens per forward)"
    return Group(*lines, Text(footer, style="dim"))


def _show_blocks(console: Console, transcript: Transcript, generate: Callable[[OnStep], Generation]) -> Generation:
    printed = ""

    def on_step(step: Step) -> None:
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
    """As it is: no wrapping to a width that nobody has."""
    console.file.write(text)
    console.file.flush()


def _state(token: int | None, guess: int | None, accepted: bool, edited: bool) -> tuple[int | None, Kind]:
    if token is not None:
        return token, "edited" if edited else "accepted" if accepted else "committed"
    return (None, "masked") if guess is None else (guess, "provisional")
