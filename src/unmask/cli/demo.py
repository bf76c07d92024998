"""`unmask demo`: the whole story in a few minutes.

Owns the order of the acts and what is said between them. Each act is done by the same code as its own verb.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.console import is_live, make_console, program, visible
from unmask.cli.decoding import CONVERTED_MODEL, DIFFUSION_MODEL
from unmask.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.engine.llm import Generation, LanguageModel
    from unmask.engine.request import OnStep

AUTOREGRESSIVE_MODEL = "smollm2-135m"
QUESTIONS = (
    "What is the capital of France?",
    "Why do we need to sleep?",
    "Calculate 8 - 3 + 4. Work it out step by step and end with 'Answer: <number>'.",
)
ANSWER_TOKENS = 64
MARK = "MADE-BY-UNMASK-DEMO.txt"


@dataclass(frozen=True)
class _Round:
    """One question and what each model made of it."""

    question: str
    autoregressive: Generation
    diffusion: Generation | None


def demo(
    minutes: Annotated[float, typer.Option(help="How long the conversion may take.")] = 2.0,
    skip_conversion: Annotated[bool, typer.Option("--skip-conversion", help="Only answer and compare.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the conversion; replaced at every run.")] = Path("out/demo"),
) -> None:
    """See everything work, in a few minutes.

    Answers three questions by denoising, compares with the autoregressive model, and converts that one from the start.

    \b
    unmask demo
    unmask demo --minutes 10
    unmask demo --skip-conversion
    """
    if not 0 < minutes < float("inf"):
        raise ConfigError(f"--minutes is {minutes}; it must be positive")
    if not skip_conversion:
        _check_replaceable(out)

    import unmask

    console = make_console()
    _say(console, f"Getting {AUTOREGRESSIVE_MODEL} and {DIFFUSION_MODEL}: unpacked the first time, then kept in a cache.")
    autoregressive = unmask.load(AUTOREGRESSIVE_MODEL)
    diffusion = _load_diffusion(console)
    rounds = _answer(console, autoregressive, diffusion)
    _say(console, "Side by side")
    _print_table(console, rounds)
    if not skip_conversion:
        _convert(console, autoregressive, out, minutes)
    if diffusion is None:
        typer.echo(f"error: the demo is not complete: '{DIFFUSION_MODEL}' is missing", err=True)
        raise typer.Exit(1)
    _say(console, f"Ask it something:  {program()} generate 'How do plants grow?' --watch")
    console.print(f"Chat with it in a browser:  {program()} serve   then open http://127.0.0.1:8000/", soft_wrap=True)


def _load_diffusion(console: Console) -> LanguageModel | None:
    """The embedded diffusion model; where it is missing, say so and go on without."""
    import unmask

    try:
        return unmask.load(DIFFUSION_MODEL)
    except CheckpointError as error:
        console.print(f"Going on without diffusion answers: {' '.join(str(error).splitlines())}", soft_wrap=True)
        return None


def _answer(console: Console, autoregressive: LanguageModel, diffusion: LanguageModel | None) -> list[_Round]:
    """Show the answers as they form, then let the autoregressive model answer the same for comparison."""
    for model in (autoregressive, diffusion):
        if model is not None:
            model.generate(QUESTIONS[0], max_new_tokens=1)  # so that no answer pays for warming up
    if diffusion is not None and is_live(console):
        console.print(_legend())
    shown = autoregressive if diffusion is None else diffusion
    first = [_watch(console, shown, question) for question in QUESTIONS]
    if diffusion is None:
        return [_Round(question, answer, None) for question, answer in zip(QUESTIONS, first, strict=True)]
    _say(console, f"The same from {AUTOREGRESSIVE_MODEL}, one token at a time, unseen ...")
    second = [autoregressive.generate(question, max_new_tokens=ANSWER_TOKENS) for question in QUESTIONS]
    return [_Round(*three) for three in zip(QUESTIONS, second, first, strict=True)]


def _watch(console: Console, model: LanguageModel, question: str) -> Generation:
    from unmask.cli.watch import show

    def generate(on_step: OnStep) -> Generation:
        return model.generate(question, max_new_tokens=ANSWER_TOKENS, on_step=on_step)

    _say(console, f"> {question}")
    return show(console, model, ANSWER_TOKENS, generate)


def _print_table(console: Console, rounds: Sequence[_Round]) -> None:
    """Both models' figures and answers in neighbouring columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, width=min(console.width, 120))
    table.add_column("", max_width=20)
    table.add_column("autoregressive", ratio=1)
    if rounds[0].diffusion is not None:
        table.add_column("diffusion", ratio=1)
    for entry in rounds:
        pair = [entry.autoregressive] if entry.diffusion is None else [entry.autoregressive, entry.diffusion]
        table.add_row(Text(entry.question, style="bold"), *(Text(visible(answer.text.strip())) for answer in pair))
        table.add_row("tokens/s\ntokens per forward\nforwards", *(_figures(answer) for answer in pair))
    console.print(table)


def _figures(answer: Generation) -> str:
    return f"{answer.tokens_per_second:.1f}\n{answer.tokens_per_forward:.2f}\n{answer.forwards}"


def _convert(console: Console, autoregressive: LanguageModel, out: Path, minutes: float) -> None:
    from unmask.cli.demo_conversion import PROMPTS, plan_conversion, run_conversion, terminal_plot, write_answers

    _say(console, f"Now the conversion: {AUTOREGRESSIVE_MODEL} to block diffusion, in about {minutes:g} min")
    _replace(out)
    answers = out / "answers.jsonl"
    num_tokens = write_answers(autoregressive, answers)
    own = f"{len(PROMPTS)} answers of its own ({num_tokens} tokens) in {answers}"
    console.print(f"data     {own}, and generated sums", soft_wrap=True)
    recipe = plan_conversion(autoregressive.name, answers, 60 * minutes)
    phases = [phase.block_size for phase in recipe.blocks.phases]
    console.print(f"plan     {recipe.train.tokens:,} tokens at block sizes {', '.join(map(str, phases))}", soft_wrap=True)
    result = run_conversion(console, recipe, out / "conversion", 60 * minutes)
    plot = terminal_plot(out / "conversion" / "metrics.jsonl", min(console.width, 100))
    if plot:
        console.print(plot)
    console.print(f"plot     {result.plot}", soft_wrap=True)
    console.print(f"model    {result.folder}", soft_wrap=True)
    console.print(
        f"After {result.tokens:,} tokens it can only babble; {CONVERTED_MODEL} was trained the same way for longer.",
        soft_wrap=True,
    )


def _check_replaceable(out: Path) -> None:
    """Only a folder that an earlier demo made may be replaced."""
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} was not made by a demo, so it is not replaced; move it away or choose another --out")


def _replace(out: Path) -> None:
    _check_replaceable(out)
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text("Made by `unmask demo`, whose next run replaces this whole folder. Keep nothing of yours in it.\n")


def _legend() -> object:
    from rich.text import Text

    from unmask.cli.watch import MASKED_GLYPH, STYLES

    return Text.assemble(
        ("just accepted", STYLES["accepted"]), ", committed, ", ("a guess", STYLES["candidate"]),
        ", ", (MASKED_GLYPH, STYLES["masked"]), " still masked",
    )  # fmt: skip


def _say(console: Console, line: str) -> None:
    console.print()
    console.print(line, style="bold", soft_wrap=True)
