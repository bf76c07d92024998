"""Console output, exit codes and the choice of a device, shared by all verbs.

Owns how errors end the program and how costs are printed. Knows no verb. Printed strings are never read as rich markup, because
a model may write anything.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from unmask.cli.startup import raise_on_interrupt
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import (
    ConfigError,
    LostRanksError,
    RequestError,
    RoomError,
    UnmaskError,
    UnmaskNote,
    UnmaskWarning,
    error_of_user,
)

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HEAD_START = 2.0
"""Seconds."""


class Guarded(TyperGroup):
    """The group of all verbs: turns errors of the user, the disk and the memory into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; any other error is a bug and keeps its traceback."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            found = error_of_user(error)
            if found is None:
                raise
            fail(found)


class PanelCommand(TyperCommand):
    """A command whose help groups its options under the headings of their panels, as plain text."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command, which Ctrl-C interrupts from now on."""
        raise_on_interrupt()
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, those without a panel first."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Model": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            panel = parameter.rich_help_panel if isinstance(parameter, TyperOption) else None
            if record is not None:
                name = "Arguments" if isinstance(parameter, TyperArgument) else panel or "Options"
                sections.setdefault(name, []).append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def fail(error: UnmaskError) -> NoReturn:
    """Print an error as one line on standard error and exit with its code; of torchrun's ranks one prints, and once."""
    from unmask.train.parallel.fatal import is_first_print, record_fatal

    if not isinstance(error, LostRanksError):
        record_fatal(error.exit_code)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The first rank of this machine prints it; torchrun would end that one as soon as this one has gone.
        time.sleep(_HEAD_START)
        raise typer.Exit(error.exit_code)
    if not isinstance(error, LostRanksError) and not is_first_print():
        raise typer.Exit(error.exit_code)
    text = str(error)
    if isinstance(error, RequestError):
        text = with_flags(text)
    elif isinstance(error, RoomError):
        text = re.sub(r"\b(dtype|quantize)(?= (?:float|bfloat|int)\d)", _flag, text)
        text = text.replace("num_tokens, or fewer max_new_tokens", "--cache-tokens, or a lower --max-new-tokens")
    typer.echo(f"error: {' '.join(text.splitlines())}", err=True)
    if isinstance(error, LostRanksError):
        os._exit(error.exit_code)  # A thread may wait for those that are gone.
    raise typer.Exit(error.exit_code)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    """Print our warnings as one line; hide those of libraries, which concern developers."""
    if issubclass(category, (UnmaskWarning, UnmaskNote)):
        typer.echo(f"note: {message}", err=True)


def is_main_rank() -> bool:
    """Whether this process is the one that reports: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def with_flags(message: str) -> str:
    """An error of the library as the command line spells it: `top_k is 0` becomes `--top-k is 0`."""
    names = SamplingParams.options()
    plain = "|".join(names)
    compound = "|".join(name for name in names if "_" in name)
    # An option whose name is an everyday word is one only where the message begins with it, or with a list that ends in it.
    first = re.match(rf"(?:(?:{plain})(?: and |\b))*", message)
    end = 0 if first is None else first.end()
    spelled = [re.sub(rf"\b(?:{names})\b", _flag, part) for names, part in ((plain, message[:end]), (compound, message[end:]))]
    return "".join(spelled).replace("chat=False", "--raw")


def _flag(match: re.Match[str]) -> str:
    return f"--{match[0].replace('_', '-')}"


def make_console(*, stderr: bool = False) -> Console:
    """A console on standard output or error that prints strings as they are."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def visible(text: str) -> str:
    """Text for a terminal: control characters, which could move the cursor or worse, become replacement characters."""
    return _CONTROL.sub("\ufffd", text)


def program() -> str:
    """The command that starts this program: its name where that is on the path, else its file."""
    if shutil.which("unmask") is not None or Path(sys.argv[0]).name != "unmask":
        return "unmask"
    return os.path.relpath(sys.argv[0])


def try_command(folder: Path) -> str:
    """A command line that generates with the model in a folder."""
    return shlex.join([program(), "generate", "What is the capital of France?", "--model", str(folder), "--watch"])


def is_live(console: Console) -> bool:
    """Whether the console is a terminal that can redraw lines (FORCE_COLOR alone does not make one)."""
    return console.is_interactive and console.file.isatty()


def cost_line(tokens: int | None, forwards: int | None, seconds: float | None = None) -> str:
    """One line on what an answer cost, as far as it is known: tokens, forwards, tokens per forward, seconds, tokens/s."""
    parts = []
    if tokens is not None:
        per_forward = (
            "" if forwards is None else f" in {forwards} forwards ({tokens / max(forwards, 1):.2f} tokens per forward)"
        )
        parts.append(f"{tokens} tokens{per_forward}")
    if seconds is not None:
        parts.append(f"{seconds:.1f} s" + ("" if tokens is None else f" ({tokens / max(seconds, 1e-9):.1f} tokens/s)"))
    return ", ".join(parts)


def pick_device(device: str) -> str:
    """The device to compute on; "auto" is CUDA where there is one.

    Raises:
        ConfigError: no such device, or not on this machine.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device '{device}' is unknown; use auto, cpu or cuda") from error
    if parsed.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{device}' is not supported; use auto, cpu or cuda")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{device}' is not there: {torch.cuda.device_count()} CUDA devices found; use cpu")
    return device
