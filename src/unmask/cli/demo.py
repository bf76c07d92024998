"""`unmask demo`: generation, a comparison and a short conversion in a few minutes.

Owns the order of the steps and the text between them. Each step runs the same code as its own verb.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.console import is_live, make_console, program
from unmask.cli.decoding import CONVERTED_MODEL, DIFFUSION_MODEL
from unmask.cli.info import find_config
from unmask.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.engine.generation import Generation
    from unmask.engine.llm import LanguageModel
    from unmask.engine.request import OnStep

AUTOREGRESSIVE_MODEL = "smollm2-135m"
QUESTIONS = (
    "What is the capital of France?",
    "Why do we need to sleep?",
    "Calculate 8 - 3 + 4. Work it out step by step and end with 'Answer: <number>'.",
)
ANSWER_TOKENS = 64
MARK = "MADE-BY-UNMASK-DEMO.txt"


def demo(
    minutes: Annotated[float, typer.Option(help="Minutes that the conversion may take.")] = 1.5,
    skip_conversion: Annotated[bool, typer.Option("--skip-conversion", help="Only generate and compare.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the conversion; replaced by every run.")] = Path("out/demo"),
) -> None:
    """Show generation, a comparison and a conversion in about three minutes.

    Answers three questions with the default model and settings, compares speed and text with the same weights decoded token by
    token, and converts an autoregressive model in a short training run.

    \b
    unmask demo
    unmask demo --minutes 10
    unmask demo --skip-conversion
    """
    if not 0 < minutes < float("inf"):
        raise ConfigError(f"--minutes is {minutes}; it must be positive")
    if not skip_conversion:
        find_config(AUTOREGRESSIVE_MODEL)  # missing: it is said at once
        _check_replaceable(out)

    console = make_console()
    model = _open(console)
    if model is not None:
        _show(console, model)
    if not skip_conversion:
        _convert(console, out, minutes)
    if model is None:
        typer.echo(f"error: the demo is not complete: '{DIFFUSION_MODEL}' is missing", err=True)
        raise typer.Exit(1)
    _say(console, f"Generate:  {program()} generate 'How do plants grow?' --watch")
    console.print(f"Chat with it in a browser:  {program()} serve   then open http://127.0.0.1:8000/", soft_wrap=True)


def _open(console: Console) -> LanguageModel | None:
    """The speculative model as every verb opens it, ready to be timed; None where it is missing."""
    import unmask

    _say(console, f"Loading {DIFFUSION_MODEL} (unpacked into a cache the first time)")
    try:
        model = unmask.load(DIFFUSION_MODEL)
    except CheckpointError as error:
        console.print(f"Continuing without diffusion answers: {' '.join(str(error).splitlines())}", soft_wrap=True)
        return None
    model.backend()
    return model


def _show(console: Console, model: LanguageModel) -> None:
    """Answer the questions live, then compare with decoding token by token."""
    from rich.text import Text

    from unmask.cli.demo_comparison import ROUNDS, compare, print_comparisons
    from unmask.cli.watch import MASKED_GLYPH, STYLES, show

    if is_live(console):
        states = (("accepted", STYLES["accepted"]), ("candidate", STYLES["candidate"]), (MASKED_GLYPH, STYLES["masked"]))
        console.print(Text.assemble(states[0], ", committed, ", states[1], ", ", states[2], " masked"))
    for question in QUESTIONS:

        def ask(on_step: OnStep, question: str = question) -> Generation:
            return model.generate(question, max_new_tokens=ANSWER_TOKENS, on_step=on_step)

        _say(console, f"> {question}")
        show(console, model, model.encode_prompt(question), ANSWER_TOKENS, ask)
    precision = "the weights as they are" if model.quantize == "none" else f"{model.quantize} weights"
    _say(
        console,
        f"Side by side: speculative and token by token, {precision} on both sides, {ROUNDS} answers each ...",
    )
    print_comparisons(console, model, compare(model, QUESTIONS, ANSWER_TOKENS))


def _convert(console: Console, out: Path, minutes: float) -> None:
    import unmask
    from unmask.cli.demo_conversion import PROMPTS, plan_conversion, run_conversion, terminal_plot, write_answers

    _say(console, f"Converting {AUTOREGRESSIVE_MODEL} to block diffusion, in about {minutes:g} min")
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).write_text(
        "Made by `unmask demo`, whose next run replaces this whole folder. Keep no files of your own in it.\n"
    )
    answers = out / "answers.jsonl"
    autoregressive = unmask.load(AUTOREGRESSIVE_MODEL)
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
