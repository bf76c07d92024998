"""What is shown of decoding: a transcript of states, in a terminal and without one."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

import unmask
from helpers import TtyStream
from unmask.cli.console import is_live
from unmask.cli.watch import MASKED_GLYPH, TextRun, Transcript, show
from unmask.engine.generation import Generation
from unmask.engine.request import DecodingStep

EOS = 0


def spell(ids: Sequence[int]) -> str:
    """Token 1 is "a", 2 is "b", ...; 0 is a control token; 30 and 31 together are one character."""
    text = "".join(chr(96 + token) for token in ids if token != EOS)
    return text.replace(chr(126) + chr(127), "é").replace(chr(126), "\ufffd").replace(chr(127), "\ufffd")


def step(
    tokens: str, guess: str = "", accepted: str = "", edited: str = "", *, start: int = 0, fixed: int = 0, forwards: int = 1
) -> DecodingStep:
    """A step from letters: "." is undecided, "$" end of text; `accepted` and `edited` hold "x" where something was; the
    first `fixed` tokens are the prompt's."""

    def ids(text: str) -> tuple[int | None, ...]:
        return tuple(None if char == "." else EOS if char == "$" else ord(char) - 96 for char in text.ljust(len(tokens), "."))

    taken, replaced = (tuple(char == "x" for char in marks.ljust(len(tokens))) for marks in (accepted, edited))
    given = tuple(i < fixed for i in range(len(tokens)))
    return DecodingStep(start, given, ids(tokens), ids(guess), (0.5,) * len(tokens), taken, replaced, forwards)


def transcript(budget: int = 100) -> Transcript:
    return Transcript(spell, (EOS,), budget)


def runs(one: Transcript) -> list[tuple[str, str]]:
    return [(run.text, run.state) for run in one.runs()]


def test_nothing_before_the_first_step() -> None:
    one = transcript()
    assert (one.runs(), one.num_decided, one.forwards, one.finished_text()) == ([], 0, 0, "")


def test_every_state_is_shown() -> None:
    one = transcript()
    one.observe(step("a.c..", guess="..cd.", accepted="..x"))
    expected = [("a", "committed"), (MASKED_GLYPH, "masked"), ("c", "accepted"), ("d", "candidate"), (MASKED_GLYPH, "masked")]
    assert runs(one) == expected
    assert (one.num_decided, one.finished_text(), one.block_is_finished) == (2, "", False)


def test_neighbours_of_one_state_are_one_run() -> None:
    one = transcript()
    one.observe(step("abc.", accepted="xxx"))
    assert one.runs() == [TextRun("abc", "accepted"), TextRun(MASKED_GLYPH, "masked")]


def test_prompt_tokens_in_the_first_block_are_not_shown() -> None:
    one = transcript()
    one.observe(step("abc.", fixed=2))
    assert runs(one) == [("c", "committed"), (MASKED_GLYPH, "masked")]
    assert one.num_decided == 1


def test_a_finished_block_is_followed_by_a_masked_one() -> None:
    one = transcript()
    one.observe(step("ab", accepted=" x", forwards=3))
    assert runs(one) == [("a", "committed"), ("b", "accepted"), (MASKED_GLYPH * 2, "masked")]
    assert (one.finished_text(), one.forwards) == ("ab", 3)
    one.observe(step("c.", accepted="x", start=2))
    assert runs(one) == [("ab", "committed"), ("c", "accepted"), (MASKED_GLYPH, "masked")]
    assert (one.finished_text(), one.num_decided) == ("ab", 3)


def test_nothing_is_shown_past_the_end_of_text() -> None:
    one = transcript()
    one.observe(step("a$c."))
    assert runs(one) == [("a", "committed")]
    one.observe(step("a$cd"))
    assert runs(one) == [("a", "committed")]
    assert one.finished_text() == "a"


def test_a_replaced_token_shows_and_a_window_slides() -> None:
    one = transcript()
    one.observe(step("abcd", edited=" x"))
    assert runs(one)[:3] == [("a", "committed"), ("b", "edited"), ("cd", "committed")]
    one.observe(step("cdef", start=2, fixed=0))
    assert runs(one)[0] == ("abcdef", "committed")
    assert one.num_decided == 6


def test_a_guessed_end_of_text_hides_nothing() -> None:
    one = transcript()
    one.observe(step("a.c", guess=".$."))
    assert runs(one) == [("a", "committed"), (MASKED_GLYPH, "masked"), ("c", "committed")]


def test_nothing_is_shown_past_the_budget() -> None:
    one = transcript(budget=3)
    one.observe(step("abcd"))
    assert runs(one) == [("abc", "committed")]
    assert (one.finished_text(), one.num_decided) == ("abc", 3)


def test_a_character_split_between_states_is_not_lost() -> None:
    one = transcript()
    one.observe(step("a~\x7f", accepted="  x"))
    assert "".join(text for text, state in runs(one) if state != "masked").replace("\ufffd", "") == "aé"


def test_finished_text_waits_for_the_rest_of_a_character() -> None:
    one = transcript()
    one.observe(step("a~"))
    assert one.finished_text() == "a"
    one.observe(step("\x7fb", start=2))
    assert one.finished_text() == "aéb"


def _console(file: io.StringIO, **options: object) -> Console:
    return Console(file=file, markup=False, force_terminal=True, width=60, height=10, **options)  # type: ignore[arg-type]


def test_only_a_real_terminal_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    assert is_live(_console(TtyStream()))
    assert not is_live(_console(io.StringIO()))
    assert not is_live(Console(file=TtyStream(), force_terminal=False))
    monkeypatch.setenv("TERM", "dumb")
    assert not is_live(_console(TtyStream()))


@pytest.fixture
def answer(diffusion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Generation, str]]:
    """Answer a prompt under `show`, ids spelled as numbers; gives the generation and all that was written."""
    monkeypatch.setattr(
        "unmask.data.tokenizer.Tokenizer.decode", lambda self, ids, after=(): "".join(f"{token} " for token in ids)
    )
    model = unmask.load(diffusion_folder, dtype="float32")

    def run(file: io.StringIO) -> tuple[Generation, str]:
        generate = partial(model.generate, "Hello", max_new_tokens=20)
        shown = show(_console(file), model, model.encode_prompt("Hello"), 20, lambda on_step: generate(on_step=on_step))
        return shown, file.getvalue()

    return run


def test_live_view_draws_every_step_and_leaves_the_answer(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    generation, written = answer(TtyStream())
    assert written.count("tokens per forward") > generation.forwards
    assert MASKED_GLYPH in written
    assert "\x1b[1;32m" in written
    last = written[written.rindex("\x1b[2K") :]
    assert MASKED_GLYPH not in last
    assert f"{generation.completion_tokens} tokens in {generation.forwards} forwards" in last


def test_live_view_lets_no_control_character_through(answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("unmask.data.tokenizer.Tokenizer.decode", lambda self, ids, after=(): "\x1b[2J\x07 \x9b1m" * len(ids))
    _, written = answer(TtyStream())
    assert "\x1b[2J" not in written
    assert not {"\x07", "\x9b"} & set(written)
    assert "\ufffd[2J" in written


def test_blocks_are_written_as_they_finish(answer) -> None:
    writes: list[str] = []

    class Recorder(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return super().write(text)

    generation, written = answer(Recorder())
    assert written == generation.text + "\n"
    assert [text.count(" ") for text in writes if text.strip()] == [3, 8, 8, 1], "the first block begins with 5 prompt tokens"
