"""Weak scaling of training on a CPU: tokens/s of two processes of one thread over those of one process of one thread.

    python benchmarks/scaling.py [--model smollm2-135m] [--rows 1] [--steps 4] [--repeats 3] [--layout data_replicate=2]

Every process has the same number of rows of a step. Both ways take turns (A B A B ...), each in fresh processes, which train
one step to warm up and then `--steps` that are timed, whole: gradient, sums over processes, clipping, optimiser. The machine
must be quiet, and have a core for each process. Writes benchmarks/results/scaling_DATE.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import arguments, figure, print_json, results_path, write_results
from floors import machine
from rich.console import Console
from train_step import recipe

from unmask.train.loop import Trainer
from unmask.train.parallel.dims import ParallelDims, parse_layout
from unmask.train.parallel.launch import Launcher
from unmask.train.parallel.start import num_ranks, open_world
from unmask.train.recipe import Recipe
from unmask.train.run import build_components

TARGET = 1.7
"""T4."""


def divided(options: argparse.Namespace, dims: ParallelDims) -> Recipe:
    """Continued pre-training with `--rows` rows for each data rank."""
    whole = recipe("cpt", options, options.dtype)
    train = whole.train.model_copy(update={"batch_rows": options.rows * dims.data, "micro_rows": options.rows})
    parallel = whole.parallel.model_copy(update=vars(dims))
    return whole.model_copy(update={"train": train, "parallel": parallel})


def tokens_per_second(should_stop: Callable[[], bool], plan: Recipe, steps: int) -> float:
    """In each process: train, and time all steps but the first."""
    torch.set_num_threads(1)
    with (
        open_world(plan.parallel.dims(num_ranks()), plan.parallel.timeout, "cpu", plan.model_dump_json()) as world,
        tempfile.TemporaryDirectory() as folder,
    ):
        trainer = Trainer(build_components(plan, world), Path(folder))
        trainer.train_step()
        before, started = trainer.tokens, time.perf_counter()
        for _ in range(steps):
            trainer.train_step()
        return (trainer.tokens - before) / (time.perf_counter() - started)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=1, help="of a step, for each process")
    parser.add_argument("--row-length", type=int, default=384)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layout", default="data_replicate=2", help="of the processes, as of unmask plan")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.smoke:
        options.row_length, options.steps, options.repeats = 64, 1, 1
    layouts = {"one": ParallelDims(), "several": parse_layout(options.layout)}
    # The launcher's processes inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console(width=160, quiet=options.json)
    found: dict[str, list[float]] = {name: [] for name in layouts}
    for turn in range(options.repeats):
        for name, dims in layouts.items():
            with tempfile.TemporaryDirectory() as logs, console.status(f"turn {turn + 1} of {options.repeats}: {name}"):
                launcher = Launcher(dims.size, max_restarts=0, logs=Path(logs))
                found[name].append(launcher.run(tokens_per_second, divided(options, dims), options.steps))
        console.print(
            f"{found['one'][-1]:8.1f} tokens/s of one process, {found['several'][-1]:8.1f} of {layouts['several'].size} "
            f"({options.layout}): {found['several'][-1] / found['one'][-1]:.2f}x",
            highlight=False,
        )
    ratio = statistics.median(b / a for a, b in zip(found["one"], found["several"], strict=True))
    figures = {"T4 weak scaling": figure(round(ratio, 3), TARGET)}
    console.print(f"T4 {ratio:.2f}x, target {TARGET}x", highlight=False)
    path = results_path(options.results, "scaling")
    settings = {name: value for name, value in vars(options).items() if name not in ("results", "json", "smoke")}
    write_results(path, {"machine": machine(), "options": settings, "tokens_per_second": found, "figures": figures})
    if options.json:
        print_json(figures)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
