"""The application of the `unmask` program: its verbs.

Owns the application and `--version`. Each verb is in a file of its own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from unmask import __version__
from unmask.cli.console import Guarded, PanelCommand, show_warning

# The file of each verb, in the order of `--help`.
_VERBS: Mapping[str, str] = {
    "generate": "generate", "infill": "infill", "trace": "trace", "chat": "chat", "serve": "serve", "batch": "batch",
    "convert": "training", "sft": "training", "dpo": "training", "pack": "pack", "plan": "plan", "info": "info",
    "merge": "merge", "export": "export", "quantize": "quantize", "demo": "demo", "eval": "eval", "compare": "compare",
    "sweep": "sweep", "ceiling": "ceiling", "ngrams": "ngrams",
}  # fmt: skip
_RUNS_WITHOUT_ARGUMENTS = frozenset({"chat", "serve", "demo", "eval", "sweep"})


class Verbs(MutableMapping[str, Any]):
    """The commands by name; a verb's file is imported when its command is first taken."""

    def __init__(self, others: Mapping[str, Any]) -> None:
        self._loaded = dict(others)
        self._names = dict.fromkeys((*_VERBS, *others))

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded and name in self._names:
            self._loaded[name] = _load_verb(name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command
        self._names[name] = None

    def __delitem__(self, name: str) -> None:
        del self._names[name]
        self._loaded.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Program(Guarded):
    """The group of all verbs, each imported when it is run or its help is asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Verbs(self.commands)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the verbs."""
        return list(self.commands)


def _load_verb(name: str) -> TyperCommand:
    function = getattr(import_module(f"unmask.cli.{_VERBS[name]}"), "eval_" if name == "eval" else name)
    alone = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    alone.command(name, cls=PanelCommand, no_args_is_help=name not in _RUNS_WITHOUT_ARGUMENTS)(function)
    command = typer.main.get_command(alone)
    assert isinstance(command, TyperCommand)
    return command


app = typer.Typer(
    name="unmask",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    smollm2-135m-diffusion, smollm2-135m-joint and smollm2-135m-converted.
    """


def run() -> None:
    """Run the application."""
    for stream in (sys.stdout, sys.stderr):
        # For a character that the terminal cannot encode, print a question mark instead of failing.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    warnings.showwarning = show_warning
    app()
