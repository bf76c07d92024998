"""D7: many requests at once, drafting against decoding the same weights token by token, by turns, in process.

    python benchmarks/load.py [--model smollm2-135m-diffusion] [--clients 1 4 16 64] [--rounds 2] [--json]

At each level so many different everyday prompts are answered together; the time for the prompts is included, nothing is cached.
Sides:

- plain: autoregressive, no drafts. What the others are compared with;
- auto: the model itself, which drafts what pays;
- always: the model itself, told that more tokens cost a forward nothing, so that it drafts all it can.

Printed by number of clients: tokens/s of all together, their ratio to plain's (of the medians over rounds, and the least and
greatest of a round), tokens per forward of a request, and the share of texts that are plain's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import arguments, figure, print_json, results_path, write_results
from everyday import Side, clock_of, read_prompts, sides_of
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import unmask
from unmask.engine.costs import CostTable
from unmask.engine.draft_statistics import DraftStatistics
from unmask.engine.engine import Engine
from unmask.engine.request import Completion

TARGET = 0.97
LOG = Console(stderr=True, width=120)


@dataclass(frozen=True)
class Run:
    """All requests of a level answered once."""

    tokens: int
    forwards: int
    seconds: float
    ids: tuple[tuple[int, ...], ...]

    @property
    def speed(self) -> float:
        """Tokens/s of all together."""
        return self.tokens / self.seconds


class Loaded:
    """A side with an engine for many requests.

    Args:
        side: model and options.
        clients: most requests at once.
        always: more tokens cost a forward nothing; else costs are learnt, and kept from level to level.
    """

    def __init__(self, side: Side, clients: int, *, always: bool) -> None:
        self.side = side
        drafting = DraftStatistics(side.model.backend().kernels, costs=CostTable() if always else None)
        self.engine: Engine = side.model.engine(max_num_seqs=clients, prefix_cache=False, drafting=drafting)

    def run(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Run:
        """Answer them all."""
        side = self.side
        requests = [side.model.request((*side.start, *ids), max_new_tokens=max_new_tokens, **side.options) for ids in prompts]
        started = side.clock()
        completions: list[Completion] = self.engine.run(requests)
        seconds = side.clock() - started
        ids = tuple(completion.ids for completion in completions)
        return Run(sum(map(len, ids)), sum(completion.forwards for completion in completions), seconds, ids)


def measure(sides: dict[str, Side], prompts: list[list[int]], clients: int, options: Any) -> dict[str, dict[str, Any]]:
    """Every side at one level, by turns."""
    side_of = {"plain": sides["plain"], "auto": sides["speculative"], "always": sides["speculative"]}
    loaded = {name: Loaded(side_of[name], clients, always=name == "always") for name in options.sides}
    chosen = [prompts[i % len(prompts)] for i in range(clients)]
    runs: dict[str, list[Run]] = {name: [] for name in loaded}
    for each in loaded.values():
        each.run(chosen, 8)  # so that nobody pays for warming up, or for learning what forwards cost
    for number in range(options.rounds):
        for name in list(loaded) if number % 2 == 0 else list(reversed(loaded)):
            runs[name].append(loaded[name].run(chosen, options.max_new_tokens))
    medians = {name: statistics.median(run.speed for run in each) for name, each in runs.items()}
    return {
        name: {
            "tokens_per_second": medians[name],
            "ratio": medians[name] / medians["plain"],
            "ratios": [run.speed / plain.speed for run, plain in zip(each, runs["plain"], strict=True)],
            "tokens_per_forward": sum(run.tokens for run in each) / sum(run.forwards for run in each),
            "identical": sum(a == b for a, b in zip(each[0].ids, runs["plain"][0].ids, strict=True)) / clients,
        }
        for name, each in runs.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-diffusion", help="a model that drafts for its own parent")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--sides", nargs="+", choices=("plain", "auto", "always"), default=["plain", "auto", "always"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, help="[default: all cores]")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU: beside other processes, with --threads 1")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    options = parser.parse_args(argv)
    if options.smoke:
        options.rounds, options.max_new_tokens, options.clients = 1, 4, [1, 4]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.sides = list(dict.fromkeys(["plain", *options.sides]))
    model = unmask.load(options.model, quantize="auto")
    sides = sides_of(model, clock_of(options))
    prompts = [model.encode_chat(prompt.messages) for prompt in read_prompts()]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    with Progress(console=LOG, transient=True) as progress:
        for clients in progress.track(options.clients, description="clients"):
            found[str(clients)] = measure(sides, prompts, clients, options)
    show(found)
    figures = {
        f"{clients}_{name}": figure(row["ratio"], TARGET)
        for clients, rows in found.items()
        for name, row in rows.items()
        if name == "auto"
    }
    content = {"figures": figures, "clients": found, "threads": torch.get_num_threads()}
    write_results(results_path(options.results, "load"), content)
    if options.json:
        print_json(figures)


def show(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One line per level and side."""
    table = Table("clients", "side", "tokens/s", "ratio", "of rounds", "tokens/forward", "identical")
    for clients, rows in found.items():
        for name, row in rows.items():
            spread = f"{min(row['ratios']):.2f}-{max(row['ratios']):.2f}"
            numbers = (f"{row['tokens_per_second']:.0f}", f"{row['ratio']:.2f}x", spread, f"{row['tokens_per_forward']:.2f}")
            table.add_row(clients, name, *numbers, f"{row['identical']:.0%}")
    LOG.print(table)


if __name__ == "__main__":
    main()
