"""`unmask demo`: generation, a comparison and a short conversion in a few minutes.

Owns the order of the steps and the text between them. Each step runs the same code as its own verb.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.console import is_live, make_console, program, visible
from unmask.cli.decoding import CONVERTED_MODEL, DIFFUSION_MODEL
from unmask.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.engine.generation import Generation
    from unmask.engine.llm import LanguageModel

AUTOREGRESSIVE_MODEL = "smollm2-135m"
QUESTIONS = (
    "What is the capital of France?",
    "Why do we need to sleep?",
    "Calculate 8 - 3 + 4. Work it out step by step and end with 'Answer: <number>'.",
)
ANSWER_TOKENS = 64
MARK = "MADE-BY-UNMASK-DEMO.txt"


def demo(
    minutes: Annotated[float, typer.Option(help="Minutes that the conversion may take.")] = 2.0,
    skip_conversion: Annotated[bool, typer.Option("--skip-conversion", help="Only generate and compare.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the conversion; replaced by every run.")] = Path("out/demo"),
) -> None:
    """Show generation, a comparison and a conversion in a few minutes.

    Answers three questions with the diffusion model, compares speed and text with the autoregressive model, and converts the
    autoregressive model in a short training run.

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
    _say(console, f"Loading {AUTOREGRESSIVE_MODEL} and {DIFFUSION_MODEL} (unpacked into a cache the first time)")
    models = {"autoregressive": unmask.load(AUTOREGRESSIVE_MODEL)}
    try:
        models["diffusion"] = unmask.load(DIFFUSION_MODEL)
    except CheckpointError as error:
        console.print(f"Continuing without diffusion answers: {' '.join(str(error).splitlines())}", soft_wrap=True)
    answers = _answer(console, models)
    _say(console, "Side by side")
    _print_table(console, answers)
    if not skip_conversion:
        _convert(console, models["autoregressive"], out, minutes)
    if "diffusion" not in models:
        typer.echo(f"error: the demo is not complete: '{DIFFUSION_MODEL}' is missing", err=True)
        raise typer.Exit(1)
    _say(console, f"Generate:  {program()} generate 'How do plants grow?' --watch")
    console.print(f"Chat with it in a browser:  {program()} serve   then open http://127.0.0.1:8000/", soft_wrap=True)


def _answer(console: Console, models: Mapping[str, LanguageModel]) -> dict[str, list[Generation]]:
    """Show how the last model answers the questions, then let the others answer for comparison."""
    from rich.text import Text

    from unmask.cli.watch import MASKED_GLYPH, STYLES

    for model in models.values():
        model.generate(QUESTIONS[0], max_new_tokens=1)  # warm-up, so that the first answer is not slower
    *others, (shown_name, shown) = models.items()
    if shown_name == "diffusion" and is_live(console):
        states = (("accepted", STYLES["accepted"]), ("candidate", STYLES["candidate"]), (MASKED_GLYPH, STYLES["masked"]))
        console.print(Text.assemble(states[0], ", committed, ", states[1], ", ", states[2], " masked"))
    shown_answers = [_watch(console, shown, question) for question in QUESTIONS]
    answers = {}
    for name, model in others:
        _say(console, f"The same questions to {AUTOREGRESSIVE_MODEL}, one token per forward, not shown live ...")
        answers[name] = [model.generate(question, max_new_tokens=ANSWER_TOKENS) for question in QUESTIONS]
    return {**answers, shown_name: shown_answers}


def _watch(console: Console, model: LanguageModel, question: str) -> Generation:
    from unmask.cli.watch import show

    _say(console, f"> {question}")
    ask = partial(model.generate, question, max_new_tokens=ANSWER_TOKENS)
    return show(console, model, model.encode_prompt(question), ANSWER_TOKENS, lambda on_step: ask(on_step=on_step))


def _print_table(console: Console, answers: Mapping[str, Sequence[Generation]]) -> None:
    """The models' answers and speeds in neighbouring columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, width=min(console.width, 120))
    table.add_column("", max_width=20)
    for name in answers:
        table.add_column(name, ratio=1)
    for question, *row in zip(QUESTIONS, *answers.values(), strict=True):
        table.add_row(Text(question, style="bold"), *(Text(visible(answer.text.strip())) for answer in row))
        figures = (f"{each.tokens_per_second:.1f}\n{each.tokens_per_forward:.2f}\n{each.forwards}" for each in row)
        table.add_row("tokens/s\ntokens per forward\nforwards", *figures)
    console.print(table)


def _convert(console: Console, autoregressive: LanguageModel, out: Path, minutes: float) -> None:
    from unmask.cli.demo_conversion import PROMPTS, plan_conversion, run_conversion, terminal_plot, write_answers

    _say(console, f"Converting {AUTOREGRESSIVE_MODEL} to block diffusion, in about {minutes:g} min")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text(
        "Made by `unmask demo`, whose next run replaces this whole folder. Keep no files of your own in it.\n"
    )
    answers = out / "answers.jsonl"
    num_tokens = write_answers(autoregressive, answers)
    own = f"{len(PROMPTS)} answers of the model itself ({num_tokens} tokens) in {answers}"
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
        f"After {result.tokens:,} tokens its text is still poor; {CONVERTED_MODEL} was trained the same way for longer.",
        soft_wrap=True,
    )


def _check_replaceable(out: Path) -> None:
    """Raises: ConfigError: the folder was not made by an earlier demo."""
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} was not made by a demo, so it is not replaced; move it away or choose another --out")


def _say(console: Console, line: str) -> None:
    console.print()
    console.print(line, style="bold", soft_wrap=True)
