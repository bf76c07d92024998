"""`unmask merge`: average the weights of several checkpoints, or add one model's fine-tuning to another.

Owns the options. The arithmetic and the choice of the best are `train.merge`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from unmask.cli.console import make_console, try_command
from unmask.errors import ConfigError


def merge(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the merged model.")],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]...", help="Models to average; with --plus: the one to add to.", show_default=False),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Take the best checkpoints of this run instead.")] = None,
    top_k: Annotated[int | None, typer.Option(help="How many of them: those with the lowest validation loss.")] = None,
    plus: Annotated[str | None, typer.Option(help="Add what this fine-tuned model learned ...")] = None,
    minus: Annotated[str | None, typer.Option(help="... since this base, which FOLDER descends from, too.")] = None,
    scale: Annotated[float, typer.Option(help="How much of that difference.")] = 1.0,
) -> None:
    """Average the weights of several checkpoints, or give a converted model what its parent was fine-tuned for.

    The difference of two autoregressive models, fine-tuned less base, carries much of the fine-tuning over to a diffusion model
    converted from the base, without any training; a little more training settles it.

    \b
    unmask merge out/a out/b out/c --out out/merged
    unmask merge --run out/mine --top-k 3 --out out/merged
    unmask merge out/converted --plus out/tuned --minus smollm2-135m --out out/both
    """
    if plus is not None or minus is not None:
        _add(out, folders or [], plus, minus, scale, averaging=run is not None or top_k is not None)
        return
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
    _point_at(console, merged)


def _add(out: Path, folders: list[Path], plus: str | None, minus: str | None, scale: float, *, averaging: bool) -> None:
    if plus is None or minus is None:
        raise ConfigError("--plus and --minus belong together: the fine-tuned model, and the base it was fine-tuned from")
    if len(folders) != 1 or averaging:
        raise ConfigError(f"--plus takes one model to add to and neither --run nor --top-k; {len(folders)} models are named")
    from unmask.cli.progress import counting
    from unmask.models.weights.hub import resolve
    from unmask.train import merge as merging

    console = make_console()
    if not folders[0].is_dir():
        raise ConfigError(f"{folders[0]} is not a folder; give that of a model")
    tuned, base = resolve(plus), resolve(minus)
    with counting(console, "adding") as on_progress:
        merged = merging.add_difference(folders[0], tuned, base, out, scale=scale, on_progress=on_progress)
    console.print(f"added    {scale:g} x ({plus} - {minus}) to {folders[0]}", soft_wrap=True)
    _point_at(console, merged)


def _point_at(console: Console, merged: Path) -> None:
    console.print(f"model    {merged}", soft_wrap=True)
    console.print(f"try it   {try_command(merged)}", soft_wrap=True)
