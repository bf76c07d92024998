"""What every verb shares: how it prints, and how an error ends the program.

Owns the consoles, the exit codes and the choice of a device. Knows no verb. Printed strings are never read as rich markup: a
model may write anything.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from unmask.errors import ConfigError, TrainingError, UnmaskError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class Guarded(TyperGroup):
    """The group of all verbs: turns what a user, the disk or the memory did wrong into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; what is not listed here is our own bug and keeps its traceback."""
        try:
            return super().invoke(ctx)
        except UnmaskError as error:
            fail(error)
        except OSError as error:
            if error.errno is None or error.errno == errno.EPIPE:
                raise
            fail(_system_error(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in _OUT_OF_MEMORY):
                raise
            fail(TrainingError("out of memory; use a smaller model, --dtype bfloat16, or a lower train.micro_rows"))


def fail(error: UnmaskError) -> NoReturn:
    """Print an error as one line on standard error and leave with its exit code."""
    typer.echo(f"error: {' '.join(str(error).splitlines())}", err=True)
    raise typer.Exit(error.exit_code)


def make_console(*, stderr: bool = False) -> Console:
    """A console on standard output or error that prints strings as they are."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def visible(text: str) -> str:
    """Text for a terminal: a control character in it, which could move the cursor or worse, becomes a replacement mark."""
    return _CONTROL.sub("\ufffd", text)


def program() -> str:
    """How the user can start this program again: by its name where that is on the path, else where it lies."""
    if shutil.which("unmask") is not None or Path(sys.argv[0]).name != "unmask":
        return "unmask"
    return os.path.relpath(sys.argv[0])


def try_command(folder: Path) -> str:
    """A command line that talks to the model in a folder."""
    return shlex.join([program(), "generate", "What is the capital of France?", "--model", str(folder), "--watch"])


def is_live(console: Console) -> bool:
    """Whether somebody watches: a real terminal that can redraw lines (FORCE_COLOR alone does not make one)."""
    return console.is_interactive and console.file.isatty()


def pick_device(device: str) -> str:
    """The device to compute on; "auto" is CUDA where there is one.

    Raises:
        ConfigError: no such device, or not on this machine.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device '{device}' is unknown; use auto, cpu or cuda") from error
    if wanted.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{device}' is not supported; use auto, cpu or cuda")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{device}' is not there: {torch.cuda.device_count()} CUDA devices found; use --device cpu")
    return device


def _system_error(error: OSError) -> TrainingError:
    where = "" if error.filename is None else f"{error.filename}: "
    if error.errno in _DISK_FULL:
        return TrainingError(f"{where}no space left on the disk; free some and run the command again")
    return TrainingError(f"{where}{error.strerror or error}; check the path and its permissions")
