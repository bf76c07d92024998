"""Training speed: our step against the plain trainer's (`plain_trainer.py`), same rows, same masks, same gradient.

    python benchmarks/train_step.py [--model smollm2-135m] [--rows 1] [--repeats 5] [--dtype float32] [--threads N]

Three batches: `cpt`, plain text in complementary pairs at block size 32; `sft`, chat answers, packed; `stable`, the same text
as full-sequence diffusion. For each it prints

- T1: how many times faster our step is, taking turns (A B A B ...), wall clock and CPU time; a step is the gradient of the
  batch, clipping and the optimiser. Beforehand both gradients are compared in float32.
- T2: share of our step's CPU time spent in matrix products.
- T3: peak memory of two steps, in a process of its own, over what the loaded model takes.

The plain trainer reads `[x_t | x_0]` in every phase; in `stable` no query ever looks at the clean half, so there is a second
one that leaves it out. Writes benchmarks/results/train_step_DATE.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plain_trainer
import torch
from common import arguments, results_path, write_results
from floors import machine
from rich.console import Console
from torch import nn
from torch.profiler import ProfilerActivity, profile

from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.models.families.registry import stored_tensors
from unmask.models.weights.hub import resolve
from unmask.train.loop import Components, Trainer, accumulate
from unmask.train.objectives.denoise import DenoiseSection
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.run import build_components

ROOT = Path(__file__).parent.parent
ANSWERS = ROOT / "scripts" / "embedded" / "answers.jsonl"
TEXT = {"kind": "text", "path": str(ROOT / "docs" / "*.md"), "supervise": "all"}
CHAT = {"kind": "jsonl", "path": str(ANSWERS)}
RATE = 1e-6
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_grouped_mm", "aten::mkldnn_linear")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
BATCHES = ("cpt", "sft", "stable")
MEASURED = ("model", "rows", "row_length", "repeats", "dtype", "threads", "batches")
"""Options that a measurement depends on."""


def recipe(batch: str, options: argparse.Namespace, dtype: str) -> Recipe:
    """One phase at one block size; SFT with the report's bandwidth."""
    block_size = None if batch == "stable" else 32
    sft = {"bandwidth": [0.3, 0.8], "sampling": "bernoulli"}
    return parse_recipe(
        {
            "model": options.model,
            "decode_block_size": 32,
            "data": {
                "row_length": options.row_length,
                "validation_rows": 0,
                "sources": [CHAT if batch == "sft" else TEXT],
            },
            "schedule": {"stable": 1.0} if block_size is None else {"decay": [{"block_size": block_size, "share": 1.0}]},
            "objective": {"kind": "denoise", "complementary": True, "mask_noise_steps": 0, **(sft if batch == "sft" else {})},
            "train": {
                "tokens": 1_000_000,
                "batch_rows": options.rows,
                "micro_rows": options.rows,
                "compute_dtype": dtype,
                "device": "cpu",
            },
        },
        f"the {batch} benchmark",
    )


@dataclass(frozen=True)
class Case:
    """A batch and the model of ours that trains on it."""

    components: Components
    rows: PackedRows
    phase: Phase

    @classmethod
    def build(cls, batch: str, options: argparse.Namespace, dtype: str) -> Case:
        components = build_components(recipe(batch, options, dtype))
        return cls(components, components.packer.next_rows(options.rows), components.recipe.blocks.phases[0])

    def ours(self) -> float:
        """Add our gradient; returns the loss."""
        return float(accumulate(self.components.objective, self.rows, self.phase, 0)["loss"])

    def plain(self, network: nn.Module, dtype: str, *, clean_copy: bool = True) -> float:
        """Add the plain trainer's gradient; returns the loss."""
        section, setting = self.components.recipe.objective, self.components.objective.setting
        assert isinstance(section, DenoiseSection)
        corruption = section.corruption(setting, self.phase, complementary=section.complementary)
        precision = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        return plain_trainer.accumulate(network, self.rows, corruption, setting.train.seed, precision, clean_copy=clean_copy)


@dataclass(frozen=True)
class Step:
    """A training step in its two halves."""

    gradient: Callable[[], float]
    update: Callable[[], None]

    def __call__(self) -> None:
        self.gradient()
        self.update()


def our_step(case: Case) -> Step:
    """What the trainer does in a step."""
    optimizer = Trainer(case.components, Path()).optimizer

    def update() -> None:
        optimizer.clip(1.0)
        optimizer.step(RATE)

    return Step(case.ours, update)


def plain_step(case: Case, network: nn.Module, dtype: str) -> Step:
    """What a plain trainer does in a step."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def update() -> None:
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Step(lambda: case.plain(network, dtype), update)


def gradient_difference(case: Case, network: nn.Module) -> dict[str, float]:
    """Norm of the difference of both float32 gradients, in norms of the plain one; and both losses."""
    loss, plain = case.ours(), case.plain(network, "float32")
    ours = dict(case.components.model.named_parameters())
    difference = total = 0.0
    for name, stored in stored_tensors(case.components.model.config).items():
        mine, theirs = ours[stored.parameter].grad, network.get_parameter(name).grad
        assert mine is not None
        assert theirs is not None
        difference += float((mine[stored.index].view_as(theirs) - theirs).square().sum())
        total += float(theirs.square().sum())
    for module in (case.components.model, network):
        module.zero_grad(set_to_none=True)
    return {"loss": loss, "plain_loss": plain, "relative_gradient_difference": (difference / total) ** 0.5}


def in_turn(ways: Mapping[str, Callable[[], None]], repeats: int, console: Console, label: str) -> dict[str, Any]:
    """Every way once to warm up, then `repeats` times in turn; seconds of each by the wall clock and of CPU time."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    with console.status(label) as status:
        for turn in range(repeats + 1):
            for name, way in ways.items():
                status.update(f"{label}: turn {turn} of {repeats}, {name}")
                started = time.perf_counter(), time.process_time()
                way()
                if turn:
                    wall[name].append(time.perf_counter() - started[0])
                    cpu[name].append(time.process_time() - started[1])
    first = next(iter(ways))
    return {
        name: {
            "wall": wall[name],
            "cpu": cpu[name],
            "wall_ratio": statistics.median(a / b for a, b in zip(wall[name], wall[first], strict=True)),
            "cpu_ratio": statistics.median(a / b for a, b in zip(cpu[name], cpu[first], strict=True)),
        }
        for name in ways
    }


def product_share(step: Callable[[], None]) -> dict[str, float]:
    """Shares of a step's CPU time: linear layers' products, attention (its softmax included), everything else."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    linear = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)
    attention = sum(event.self_cpu_time_total for event in events if event.key.startswith(ATTENTION))
    return {"linear": linear / total, "attention": attention / total, "products": (linear + attention) / total}


def peak_memory(way: str, batch: str, options: argparse.Namespace) -> None:
    """Take two steps in this process; prints MiB over the loaded model: of a gradient, and of whole steps."""
    case = Case.build(batch, options, options.dtype)
    # Our model stays in the plain trainer's process: what counts comes on top of what is loaded.
    step = our_step(case)
    if way == "plain":
        step = plain_step(case, plain_trainer.load_network(resolve(options.model)), options.dtype)
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak so far, of loading, does not count.
    step.gradient()
    of_gradient = resident("VmHWM")
    step.update()
    step()
    print(json.dumps({"gradient_mib": of_gradient - loaded, "step_mib": resident("VmHWM") - loaded}))


def resident(which: str) -> float:
    """MiB of this process, now (VmRSS) or at most (VmHWM). Not getrusage's, which a process inherits from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 2**10


def memory_of(way: str, batch: str, options: argparse.Namespace) -> dict[str, float]:
    """`peak_memory` in a process of its own."""
    values = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items() if name in MEASURED]
    command = [sys.executable, __file__, *values, f"--memory={way}:{batch}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} {batch}: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def timed(batch: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures of one batch but memory."""
    case = Case.build(batch, options, "float32")
    network = plain_trainer.load_network(resolve(options.model))
    with console.status(f"{batch}: comparing gradients"):
        check = gradient_difference(case, network)
    if options.dtype != "float32":
        case = Case.build(batch, options, options.dtype)
    ways = {"ours": our_step(case), "plain": plain_step(case, network, options.dtype)}
    if case.phase.block_size is None:
        shorter = replace(ways["plain"], gradient=lambda: case.plain(network, options.dtype, clean_copy=False))
        ways["plain, no clean half"] = shorter
    times = in_turn(ways, options.repeats, console, batch)
    rows = {"rows": case.rows.num_rows, "tokens": case.rows.num_tokens, "maskable": case.rows.num_maskable}
    return {"batch": rows, "check": check, "times": times, "shares": product_share(ways["ours"])}


def measure(batch: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures of one batch."""
    figures = timed(batch, options, console)
    gc.collect()  # Both models and their optimisers, before other processes take as much.
    with console.status(f"{batch}: peak memory"):
        memory = {way: memory_of(way, batch, options) for way in ("ours", "plain")}
    return {**figures, "memory": memory}


def report(console: Console, batch: str, figures: dict[str, Any]) -> None:
    rows, check, times, memory = (figures[name] for name in ("batch", "check", "times", "memory"))
    console.print(
        f"\n{batch}: {rows['rows']} rows, {rows['tokens']} tokens, {rows['maskable']} of them maskable; "
        f"loss {check['loss']:.4f} and {check['plain_loss']:.4f}, "
        f"gradients differ by {check['relative_gradient_difference']:.1e}"
    )
    for name, row in times.items():
        spread = f"{min(row['wall']):.1f}-{max(row['wall']):.1f}"
        cpu = f"{statistics.median(row['cpu']):6.1f} s CPU ({min(row['cpu']):.1f}-{max(row['cpu']):.1f})"
        ratio = "" if name == "ours" else f"   T1 {row['wall_ratio']:.2f}x wall, {row['cpu_ratio']:.2f}x CPU"
        console.print(f"  {name:<22}{statistics.median(row['wall']):6.1f} s ({spread}) {cpu}{ratio}", highlight=False)
    shares = figures["shares"]
    console.print(
        f"  T2 {shares['products']:.0%} of our step in products ({shares['linear']:.0%} linear layers and head, "
        f"{shares['attention']:.0%} attention)"
    )
    ours, plain = memory["ours"], memory["plain"]
    console.print(
        f"  T3 {ours['step_mib'] / plain['step_mib']:.2f}x: {ours['step_mib']:.0f} of {plain['step_mib']:.0f} MiB; without "
        f"optimiser {ours['gradient_mib'] / plain['gradient_mib']:.2f}x: {ours['gradient_mib']:.0f} of "
        f"{plain['gradient_mib']:.0f} MiB"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--row-length", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", default=",".join(BATCHES))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.smoke:
        options.row_length, options.repeats = 64, 1
    torch.set_num_threads(options.threads)
    if options.memory:
        way, batch = options.memory.split(":")
        peak_memory(way, batch, options)
        return
    console = Console(width=160)
    console.print(json.dumps(machine()), f"dtype {options.dtype}", highlight=False)
    results = {}
    for batch in options.batches.split(","):
        results[batch] = measure(batch, options, console)
        report(console, batch, results[batch])
    settings = {name: value for name, value in vars(options).items() if name in MEASURED}
    path = results_path(options.results, "train_step")
    write_results(path, {"machine": machine(), "options": settings, "results": results})
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
