"""The application of the `unmask` program: its verbs.

Owns the application and `--version`. Each verb is in a file of its own.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from unmask import __version__
from unmask.cli.chat import chat
from unmask.cli.compare import compare
from unmask.cli.console import Guarded, PanelCommand
from unmask.cli.demo import demo
from unmask.cli.eval import eval_
from unmask.cli.export import export
from unmask.cli.generate import generate
from unmask.cli.infill import infill
from unmask.cli.info import info
from unmask.cli.merge import merge
from unmask.cli.serve import serve
from unmask.cli.sweep import sweep
from unmask.cli.trace import trace
from unmask.cli.training import convert, dpo, sft
from unmask.errors import UnmaskWarning

app = typer.Typer(
    name="unmask",
    cls=Guarded,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (generate, infill, trace, chat, serve, convert, sft, dpo, info, merge, export, demo):
    app.command(cls=PanelCommand, no_args_is_help=verb not in (chat, serve, demo))(verb)
for named, verb in (("eval", eval_), ("compare", compare), ("sweep", sweep)):
    app.command(named, cls=PanelCommand, no_args_is_help=verb is compare)(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unmask {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Convert autoregressive language models to block diffusion; generate, serve and evaluate.

    \b
    See a demo:       unmask demo
    Generate:         unmask generate "What is the capital of France?" --watch
    Infill:           unmask infill "The capital of ___ is Paris."
    Serve:            unmask serve      (OpenAI API and a chat page)
    Convert a model:  unmask convert --model smollm2-135m --data answers.jsonl --out out/mine
    Fine-tune it:     unmask sft --model out/mine --data chats.jsonl --out out/chat

    Models are folders in the Hugging Face layout, Hugging Face ids, or one of the embedded smollm2-135m,
    smollm2-135m-diffusion and smollm2-135m-converted.
    """


def run() -> None:
    """Run the application."""
    for stream in (sys.stdout, sys.stderr):
        # For a character that the terminal cannot encode, print a question mark instead of failing.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    warnings.showwarning = _show_warning
    app()


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    """Print our warnings as one line; hide those of libraries, which concern developers."""
    if issubclass(category, UnmaskWarning):
        typer.echo(f"note: {message}", err=True)
