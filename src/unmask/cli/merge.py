"""`unmask merge`: average the weights of several checkpoints into one model.

Owns the options. The averaging and the choice of the best are `train.merge`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli.console import make_console, try_command
from unmask.errors import ConfigError


def merge(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the merged model.")],
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Model folders to average.", show_default=False)
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Take the best checkpoints of this run instead.")] = None,
    top_k: Annotated[int | None, typer.Option(help="How many of them: those with the lowest validation loss.")] = None,
) -> None:
    """Average the weights of several checkpoints.

    \b
    unmask merge out/a out/b out/c --out out/merged
    unmask merge --run out/mine --top-k 3 --out out/merged
    """
    if (run is None) == (not folders):
        raise ConfigError("name either model folders or --run with --top-k, and not both")
    if (run is None) != (top_k is None):
        raise ConfigError("--run and --top-k belong together: give both or neither")

    from unmask.cli.progress import counting
    from unmask.train import merge as merging

    chosen = folders or []
    if run is not None and top_k is not None:
        chosen = merging.top_k(run, top_k)
    console = make_console()
    with counting(console, "merging") as on_progress:
        merged = merging.merge_checkpoints(chosen, out, on_progress=on_progress)
    for folder in chosen:
        console.print(f"averaged {folder}", soft_wrap=True)
    console.print(f"model    {merged}", soft_wrap=True)
    console.print(f"try it   {try_command(merged)}", soft_wrap=True)
