"""Speed beside a busy process, one that keeps a core: how many times slower than alone.

    python benchmarks/contention.py [--model smollm2-135m-diffusion] [--rounds 5] [--works decode,train] [--json]

S2: each work alone and beside `while True: pass`, by turns; the median of the ratios. Target: 2.2, for

- `decode`: one answer with the 8-bit kernels;
- `decode_eager`: one answer with the weights as they are, in PyTorch;
- `train`: a step of SFT on one row, as `unmask train` takes it.

Threads wait as the command line has them wait (`unmask.cli.main.limit_spinning`), so PyTorch is imported after that. On a
machine that does other things meanwhile the figures mean little.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from common import arguments, figure, print_json, results_path, write_results
from rich.console import Console

from unmask.cli.main import limit_spinning

LOG = Console(stderr=True)
TARGET = 2.2
WORKS = ("decode", "decode_eager", "train")


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that computes on one core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)  # until it runs, and the scheduler has found it a core
        yield
    finally:
        process.kill()
        process.wait()


def decode(options: Namespace, weights: str, tokens: int) -> Callable[[], Any]:
    """Writes an answer of so many tokens."""
    import unmask

    model = unmask.load(options.model, quantize=weights)
    ids = model.encode_prompt("Describe a day at the sea.")
    return lambda: model.complete(ids, max_new_tokens=tokens, ignore_eos=True)


def train(options: Namespace) -> Callable[[], Any]:
    """Takes a training step."""
    from train_step import Case, our_step

    return our_step(Case.build("sft", Namespace(model=options.model, rows=1, row_length=options.row_length), "float32"))


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Seconds of the work alone and beside a busy process, by turns."""
    work()
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(seconds(work))
        with busy_process():
            beside.append(seconds(work))
    ratios = [b / a for a, b in zip(alone, beside, strict=True)]
    return {"value": statistics.median(ratios), "ratios": ratios, "alone": alone, "beside": beside}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-diffusion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--row-length", type=int, default=256, help="tokens of the training step's row")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rounds, options.row_length = 1, 64
    limit_spinning()
    from floors import machine

    long, short = (2, 2) if options.smoke else (128, 24)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "decode": lambda: decode(options, "int8", long),
        "decode_eager": lambda: decode(options, "none", short),
        "train": lambda: train(options),
    }
    found: dict[str, dict[str, Any]] = {}
    for name in options.works.split(","):
        found[name] = row = measure(makers[name](), options.rounds)
        LOG.print(
            f"S2 {name}: {row['value']:.2f}x slower beside a busy process ({min(row['ratios']):.2f}-{max(row['ratios']):.2f}), "
            f"{statistics.median(row['alone']):.2f} s alone; target {TARGET}x"
        )
    write_results(results_path(options.results, "contention"), {"machine": machine(), "works": found})
    if options.json:
        print_json({name: figure(row["value"], TARGET, higher_is_better=False) for name, row in found.items()})


if __name__ == "__main__":
    main()
