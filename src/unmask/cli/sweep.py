"""`unmask sweep`: score against tokens per forward over thresholds and block sizes.

Owns the options, the grid and the table. Every point is a run of its own, kept in a folder.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli import decoding as options
from unmask.cli import evaluation
from unmask.cli.console import make_console
from unmask.cli.tables import print_table
from unmask.engine.sampling_params import SamplingParams
from unmask.errors import ConfigError, RequestError


def sweep(
    model: options.Model = options.DIFFUSION_MODEL,
    suite: evaluation.SuiteName = None,
    tasks: evaluation.TaskNames = None,
    limit: evaluation.Limit = None,
    split: evaluation.SplitName = "test",
    thresholds: Annotated[str, typer.Option(help="Separated by commas.")] = "0.5,0.7,0.9,0.95",
    block_sizes: Annotated[str | None, typer.Option(help="Separated by commas. [default: the model's]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the plot.")] = Path("out/sweep"),
    batch: evaluation.Batch = 1,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = "auto",
) -> None:
    """Plot score against speed over thresholds and block sizes.

    \b
    unmask sweep --suite mini-5 --limit 30
    unmask sweep --model out/mine --tasks mini-5/math --thresholds 0.5,0.8,0.95 --block-sizes 8,16,32

    A killed sweep continues when started again. Writes frontier.png, sweep.md and sweep.json.
    """
    from unmask.eval.report import draw_frontier, markdown_table
    from unmask.eval.runner import EvalSettings
    from unmask.files import atomic_write, atomic_write_json, bytes_writer

    values = evaluation.numbers(thresholds, "--thresholds", float)
    sizes = None if block_sizes is None else evaluation.numbers(block_sizes, "--block-sizes", int)
    for option, choices in (("block_size", sizes or []), ("threshold", values)):
        for value in choices:
            SamplingParams().replace(**{option: value})  # refused before the first point is measured
    selection = evaluation.select_tasks(suite, tasks)
    if selection.harness:
        raise ConfigError(f"{selection.harness[0]} is a task of lm-eval, which is not swept; use our own tasks")
    console = make_console()
    language_model = evaluation.open_model(model, dtype=dtype, device=device, quantize=quantize)
    if not language_model.is_diffusion:
        raise RequestError(f"model {model} is autoregressive and has neither a threshold nor blocks; sweep a diffusion model")
    points: list[dict[str, Any]] = []
    for size, value in itertools.product(sizes or [language_model.config.block_size or 32], values):
        folder = out / f"block-{size}-threshold-{value:g}"
        settings = EvalSettings(split, SamplingParams(block_size=size, threshold=value), batch)
        results = evaluation.answer(console, language_model, selection.own, folder, limit, settings)
        points.append({"block_size": size, "threshold": value, **_point(results)})
    rows = [_cells(point) for point in points]
    draw_frontier(points, out / "frontier.png", f"{model}: {suite or tasks}")
    atomic_write_json(
        out / "sweep.json", {"model": model, "suite": suite, "tasks": tasks, "split": split, "limit": limit, "points": points}
    )
    atomic_write(out / "sweep.md", bytes_writer(f"{markdown_table(HEAD, rows)}\n\n![Frontier](frontier.png)\n".encode()))
    print_table(console, HEAD, rows)
    console.print(f"plot     {out / 'frontier.png'}", soft_wrap=True)


HEAD = ("block size", "threshold", "score", "tokens per forward", "tokens/s")


def _point(results: dict[str, Any]) -> dict[str, float]:
    """Mean score over tasks, and speed over all of their answers."""
    tasks = list(results["tasks"].values())
    tokens, forwards, seconds = (sum(task["speed"][name] for task in tasks) for name in ("tokens", "forwards", "seconds"))
    return {
        "score": sum(task["score"] for task in tasks) / len(tasks),
        "items": sum(task["items"] for task in tasks),
        "tokens_per_forward": tokens / max(forwards, 1),
        "tokens_per_second": tokens / max(seconds, 1e-9),
    }


def _cells(point: dict[str, Any]) -> tuple[str, ...]:
    speeds = (f"{point['tokens_per_forward']:.2f}", f"{point['tokens_per_second']:.0f}")
    return (str(point["block_size"]), f"{point['threshold']:g}", f"{100 * point['score']:.1f}", *speeds)
