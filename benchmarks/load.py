"""D7: many requests at once, drafting against decoding the same weights token by token, by turns, in process.

    python benchmarks/load.py [--model smollm2-135m] [--clients 1 4 16 64] [--pairs 4] [--json]

At each level so many everyday prompts are answered together, one after another where fewer than 12 are; the time for the
prompts is included, nothing is cached. Sides:

- plain: autoregressive, no drafts. What the others are compared with;
- auto: the model itself, which drafts what pays;
- always: the model itself, told that more tokens cost a forward nothing, so that it drafts all it can.

They take turns there and back (A B B A): a machine that gets slower meanwhile slows both alike. Each such pair of turns gives
one ratio to plain's tokens/s. Printed by number of clients: tokens/s of all together, the mean of the ratios with its 95%
interval (Student's t), tokens per forward of a request, and the share of texts that are plain's. Ratios of one side to itself
differ by some percent too: a target inside the interval is neither met nor missed. The whole takes some five minutes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import Figure, arguments, figure, print_json, results_path, write_results
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
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Of the 95% interval, by degrees of freedom from 1 on."""
LOG = Console(stderr=True, width=120)


@dataclass(frozen=True)
class Run:
    """All requests of a level answered once."""

    tokens: int
    forwards: int
    seconds: float
    ids: tuple[tuple[int, ...], ...]


class Loaded:
    """A side with an engine for many requests.

    Args:
        side: model and options.
        clients: most requests at once.
        always: more tokens cost a forward nothing; else costs are learnt, and kept from level to level.
    """

    def __init__(self, side: Side, clients: int, *, always: bool) -> None:
        self.side = side
        costs = CostTable() if always else None
        drafting = DraftStatistics(side.model.backend().kernels, costs=costs, ngrams=side.ngrams)
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
    best = list(sides.values())[-1]  # with all that the model drafts from
    side_of = {"plain": sides["plain"], "auto": best, "always": best}
    loaded = {name: Loaded(side_of[name], clients, always=name == "always") for name in options.sides}
    chosen = [prompts[i % len(prompts)] for i in range(max(clients, options.prompts))]
    runs: dict[str, list[Run]] = {name: [] for name in loaded}
    for each in loaded.values():
        each.run(chosen, 8)  # so that nobody pays for warming up, or for learning what forwards cost
    for _ in range(options.pairs):
        for name in (*loaded, *reversed(loaded)):
            runs[name].append(loaded[name].run(chosen, options.max_new_tokens))
    plain = runs["plain"]
    return {name: {**compared(each, plain), "tokens_per_second": speed(each)} for name, each in runs.items()}


def compared(runs: Sequence[Run], plain: Sequence[Run]) -> dict[str, Any]:
    """A side against plain: the ratio of each pair of turns, their mean and what it is uncertain by."""
    ratios = [speed(runs[i : i + 2]) / speed(plain[i : i + 2]) for i in range(0, len(runs), 2)]
    return {
        "ratio": statistics.mean(ratios),
        "uncertainty": half_interval(ratios),
        "ratios": ratios,
        "tokens_per_forward": sum(run.tokens for run in runs) / sum(run.forwards for run in runs),
        "identical": statistics.mean(a == b for a, b in zip(runs[0].ids, plain[0].ids, strict=True)),
    }


def speed(runs: Sequence[Run]) -> float:
    """Tokens/s over all of these."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of a mean; None for one value."""
    if len(values) < 2:
        return None
    student = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    return student * statistics.stdev(values) / math.sqrt(len(values))


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="autoregressive, or one that drafts for its own parent")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--sides", nargs="+", choices=("plain", "auto", "always"), default=["plain", "auto"])
    parser.add_argument("--pairs", type=int, default=4, help="turns of each side, there and back")
    parser.add_argument("--prompts", type=int, default=12, help="least number of prompts at each level")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, help="[default: all cores]")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU: beside other processes, with --threads 1")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    options = parser.parse_args(argv)
    if options.smoke:
        options.pairs, options.prompts, options.max_new_tokens, options.clients = 2, 2, 4, [1, 4]
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
    figures: dict[str, Figure] = {}
    for clients, rows in found.items():
        for name, row in rows.items():
            if name != "plain":
                figures[f"{clients}_{name}"] = figure(row["ratio"], TARGET if name == "auto" else None)
                figures[f"{clients}_{name}_uncertainty"] = figure(row["uncertainty"] or 0.0)
    content = {"figures": figures, "clients": found, "threads": torch.get_num_threads()}
    write_results(results_path(options.results, "load"), content)
    if options.json:
        print_json(figures)


def show(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One line per level and side."""
    table = Table("clients", "side", "tokens/s", "ratio", "of pairs", "tokens/forward", "identical")
    for clients, rows in found.items():
        for name, row in rows.items():
            doubt = "" if row["uncertainty"] is None else f" ± {row['uncertainty']:.2f}"
            spread = f"{min(row['ratios']):.2f}-{max(row['ratios']):.2f}"
            numbers = (
                f"{row['tokens_per_second']:.0f}",
                f"{row['ratio']:.2f}x{doubt}",
                spread,
                f"{row['tokens_per_forward']:.2f}",
            )
            table.add_row(clients, name, *numbers, f"{row['identical']:.0%}")
    LOG.print(table)


if __name__ == "__main__":
    main()
