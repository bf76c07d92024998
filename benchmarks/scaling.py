"""Weak scaling of training on a CPU: tokens/s of two processes of one thread over those of one process of one thread.

    python benchmarks/scaling.py [--model smollm2-135m] [--rows 4] [--micro-rows 1] [--row-length 384] [--turns 1]

Every process trains on `--rows` rows of a step, in micro-batches of `--micro-rows`, whose gradients add up before they are
summed over the processes. The processes stay the same, and take turns:

- one: the first one trains alone, the others wait and compute nothing;
- apart: all train, each a model of its own, and sum nothing: what the machine's cores and memory can give at most;
- several: all train one model (`--layout`), and sum its gradients.

A turn is a whole step: gradient, sums, clipping, optimiser. Also printed: what a sum of as many gradients takes by itself, and
CPU time. A recipe's step has more rows (32), of which the same sum is a smaller share. The machine must be quiet, and have a
core for each process. Writes benchmarks/results/scaling_DATE.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import arguments, figure, print_json, results_path, write_results
from floors import machine
from rich.console import Console
from train_step import recipe

from unmask.models.arch.transformer import Transformer
from unmask.train.loop import Trainer, accumulate
from unmask.train.parallel.dims import ParallelDims, parse_layout
from unmask.train.parallel.launch import Launcher
from unmask.train.parallel.start import num_ranks, open_world
from unmask.train.parallel.world import World
from unmask.train.recipe import Recipe
from unmask.train.run import build_components

TARGET = 1.7
"""T4."""
WAYS = ("one", "apart", "several")


def divided(options: argparse.Namespace, dims: ParallelDims) -> Recipe:
    """Continued pre-training with `--rows` rows for each data rank."""
    whole = recipe("cpt", options, options.dtype)
    train = whole.train.model_copy(update={"batch_rows": options.rows * dims.data, "micro_rows": options.micro_rows})
    parallel = whole.parallel.model_copy(update=vars(dims))
    return whole.model_copy(update={"train": train, "parallel": parallel})


def measure(should_stop: Callable[[], bool], plans: dict[str, Recipe], folder: Path, turns: int) -> list[dict[str, Any]]:
    """In each process: take turns; tokens/s of all processes together, and CPU seconds of this one, for each turn."""
    torch.set_num_threads(1)
    plan = plans["several"]
    with open_world(plan.parallel.dims(num_ranks()), plan.parallel.timeout, "cpu", plan.model_dump_json()) as world:
        alone = _trainer(plans["one"], folder / f"one-{world.rank}", World.single())
        together = _trainer(plan, folder / f"several-{world.rank}", world)
        return [_turn(world, alone, together) for _ in range(turns)]


def _trainer(plan: Recipe, folder: Path, world: World) -> Trainer:
    """A trainer that has taken a short step: its memory is allocated, the optimiser's too."""
    trainer = Trainer(build_components(plan, world), folder)
    components, train = trainer.components, trainer.train
    setting = components.objective.setting
    rows = components.packer.next_rows(train.batch_rows, setting.share(train.batch_rows))
    accumulate(components.objective, rows.rows(0, train.micro_rows), trainer.schedule.phases[0], 0)
    trainer.optimizer.clip(train.clip_norm)
    trainer.optimizer.step(0.0)
    return trainer


def _turn(world: World, alone: Trainer, together: Trainer) -> dict[str, Any]:
    turn: dict[str, Any] = {}
    for way in WAYS:
        trainer, works = together if way == "several" else alone, way != "one" or world.is_main
        world.gather_all(None)
        tokens, cpu, started = trainer.tokens, os.times(), time.perf_counter()
        if works:
            trainer.train_step()
        seconds, cpu_after = time.perf_counter() - started, os.times()
        rate = (trainer.tokens - tokens) / seconds
        # Of one model, every rank counts all tokens.
        rates = world.gather_all(rate)
        turn[way] = {
            "tokens_per_second": rate if way == "several" else sum(rates),
            "seconds": seconds,
            "user_seconds": cpu_after.user - cpu.user,
            "system_seconds": cpu_after.system - cpu.system,
        }
    turn["sum_seconds"] = _sum_seconds(together.components.model, world)
    return turn


def _sum_seconds(model: Transformer, world: World) -> float:
    """Seconds of a sum over the data ranks of as many numbers as the model has parameters, block by block."""
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
    sizes = [*blocks, model.num_parameters() - sum(blocks)]
    gradients = [torch.ones(size) for size in sizes]
    world.gather_all(None)
    started = time.perf_counter()
    for gradient in gradients:
        dist.all_reduce(gradient, group=world.group("data"))
    return time.perf_counter() - started


def report(console: Console, turns: list[dict[str, Any]], options: argparse.Namespace, dims: ParallelDims) -> dict[str, Any]:
    """Print the turns; the figures."""

    def median(way: str, key: str) -> float:
        values: list[float] = [turn[way][key] for turn in turns]
        return statistics.median(values)

    def ratio(way: str, of: str = "one") -> float:
        ratios: list[float] = [turn[way]["tokens_per_second"] / turn[of]["tokens_per_second"] for turn in turns]
        return statistics.median(ratios)

    for way in WAYS:
        console.print(
            f"{way:<8} {median(way, 'tokens_per_second'):7.1f} tokens/s {ratio(way):5.2f}x  a step"
            f" {median(way, 'seconds'):6.1f} s, CPU {median(way, 'user_seconds'):6.1f} s, system"
            f" {median(way, 'system_seconds'):4.1f} s",
            highlight=False,
        )
    sum_seconds = statistics.median(turn["sum_seconds"] for turn in turns)
    share = statistics.median(turn["sum_seconds"] / turn["several"]["seconds"] for turn in turns)
    console.print(
        f"{dims.size} processes ({options.layout}), {options.rows} rows of {options.row_length} each, micro-batches of "
        f"{options.micro_rows}; a sum of the gradients takes {sum_seconds:.2f} s, {share:.1%} of a step; one model against "
        f"{dims.size} apart: {ratio('several', 'apart'):.2f}x",
        highlight=False,
    )
    console.print(f"T4 {ratio('several'):.2f}x, target {TARGET}x", highlight=False)
    return {
        "T4 weak scaling": figure(round(ratio("several"), 3), TARGET),
        "apart over one": round(ratio("apart"), 3),
        "several over apart": round(ratio("several", "apart"), 3),
        "share of a sum": round(share, 4),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=4, help="of a step, for each process")
    parser.add_argument("--micro-rows", type=int, default=1, help="of a micro-batch")
    parser.add_argument("--row-length", type=int, default=384)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layout", default="data_replicate=2", help="of the processes, as of unmask plan")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rows, options.micro_rows, options.row_length, options.turns = 2, 1, 32, 1
    dims = parse_layout(options.layout)
    # The launcher's processes inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console(width=160, quiet=options.json)
    plans = {"one": divided(options, ParallelDims()), "several": divided(options, dims)}
    with tempfile.TemporaryDirectory() as folder, console.status(f"{options.turns} turns of {', '.join(WAYS)}"):
        launcher = Launcher(dims.size, max_restarts=0, logs=Path(folder) / "logs")
        turns = launcher.run(measure, plans, Path(folder), options.turns)
    figures = report(console, turns, options, dims)
    path = results_path(options.results, "scaling")
    settings = {name: value for name, value in vars(options).items() if name not in ("results", "json", "smoke")}
    write_results(path, {"machine": machine(), "options": settings, "turns": turns, "figures": figures})
    if options.json:
        print_json(figures)
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
