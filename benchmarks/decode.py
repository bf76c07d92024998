"""Decoding speed: PERFORMANCE targets D2-D6, each against its floor or its rival, measured in turn in one process.

    python benchmarks/decode.py [--quick] [--json] [--only D3,D5] [--threads 2]

D2  diffusion against the same engine decoding the autoregressive parent, each at its best precision and, for diffusion,
    block size and threshold among those that score within 2 points of its best; structured answers (JSON by a schema, both
    sides with the same grammar) and short facts. Tokens/s, tokens per forward with every forward counted, and the score.
    What the grammar itself gives: the same prompts without it.
D3  one denoising forward against max(bytes of weights / bandwidth, operations / rate), measured in the same run.
D4  the engine against decoding without a cache, the same tokens: the reference in float32, and the 8-bit kernels.
D5  eight requests at once against one after the other, the same tokens.
D6  reading a prompt of 2,048 tokens against the floor, attention's operations included.

Texts of D2 are in the result file: speed means nothing without them. Writes benchmarks/results/.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import arguments, results_path, write_results
from floors import Machine, machine, seconds_of
from rich.console import Console
from rich.table import Table
from tasks import Task, extraction, facts

import unmask
from unmask.engine.backends.base import Backend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, Request
from unmask.models.arch.config import ModelConfig

WEIGHTS = ("float32", "int8", "int4")
FREE = ", without grammar"
LOG = Console(stderr=True)


def load(name: str, weights: str) -> LanguageModel:
    model = unmask.load(name, dtype="float32", quantize=None if weights == "float32" else weights)
    model.backend()
    return model


def measure_d2(names: tuple[str, str], quick: bool, smoke: bool) -> dict[str, Any]:
    """Speed at equal or better score, structured and free."""
    count = 1 if smoke else 4 if quick else 8
    suites = {"structured": extraction(count), "facts": facts(count)}
    sides: dict[str, tuple[LanguageModel, dict[str, Any]]] = {}
    for kind in ("int8",) if quick else WEIGHTS:
        sides[f"AR {kind}"] = (load(names[0], kind), {})
        child = load(names[1], kind)
        # With other weights a forward costs more here: one row is enough to see it.
        sizes = (8, 16) if kind == "int8" and not quick else (8,)
        bars = (0.95, 0.6) if kind == "int8" else (0.6,)
        for size, bar in itertools.product(sizes, bars):
            sides[f"diffusion {kind}, block {size}, threshold {bar}"] = (child, {"block_size": size, "threshold": bar})
    length = 4 if smoke else 64
    ways = {name: way(model, max_new_tokens=length, **options) for name, (model, options) in sides.items()}
    found: dict[str, Any] = {"target": 2.1, "suites": {}}
    plain = [name for name in sides if name == "AR int8" or name.startswith("diffusion int8, block 8")]
    free = {f"{name}{FREE}": way(sides[name][0], free=True, max_new_tokens=length, **sides[name][1]) for name in plain}
    for suite, tasks in suites.items():
        rows = in_turn(ways | (free if suite == "structured" else {}), tasks, 1 if smoke else 3 if quick else 5)
        formed = {name: row for name, row in rows.items() if not name.endswith(FREE)}
        autoregressive = best({n: r for n, r in formed.items() if n.startswith("AR")})
        diffusion = best({n: r for n, r in formed.items() if n.startswith("diffusion")})
        ratios = [a / d for a, d in zip(rows[autoregressive]["seconds"], rows[diffusion]["seconds"], strict=True)]
        share = rows[diffusion]["tokens"] / rows[autoregressive]["tokens"]
        found["suites"][suite] = {
            "ratio": statistics.median(ratios) * share, "autoregressive": autoregressive, "diffusion": diffusion, "ways": rows,
            "answers_per_second_ratio": statistics.median(ratios),
        }  # fmt: skip
        print_d2(suite, rows, autoregressive, diffusion, found["suites"][suite]["ratio"])
    found["value"] = found["suites"]["structured"]["ratio"]
    return found


def way(model: LanguageModel, *, free: bool = False, max_new_tokens: int = 64, **options: Any) -> Callable[[Task], Any]:
    """How to answer a task; `free`: without the grammar of its answer."""

    def answer(task: Task) -> Any:
        return model.generate(task.prompt, max_new_tokens=max_new_tokens, json_schema=None if free else task.schema, **options)

    return answer


def in_turn(ways: dict[str, Callable[[Task], Any]], tasks: list[Task], repeats: int) -> dict[str, dict[str, Any]]:
    """Every way answers all tasks, the ways in turn, after one answer to warm up."""
    rows: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in ways}
    for answer in ways.values():
        answer(tasks[0])
    for _ in range(repeats):
        for name, answer in ways.items():
            answers = [answer(task) for task in tasks]
            row = rows[name]
            # A grammar may leave nothing to decide: then there is no forward, and no time is spent on one.
            row["seconds"].append(max(sum(each.seconds for each in answers), 1e-9))
            row["tokens"] = sum(each.completion_tokens for each in answers)
            row["forwards"] = sum(each.forwards for each in answers)
            row["score"] = 100 * statistics.mean(t.score(a.text) for t, a in zip(tasks, answers, strict=True))
            row["texts"] = [each.text for each in answers]
    for row in rows.values():
        row["tokens_per_second"] = row["tokens"] / statistics.median(row["seconds"])
        row["tokens_per_forward"] = row["tokens"] / max(row["forwards"], 1)
    return rows


def best(rows: dict[str, dict[str, Any]]) -> str:
    """The fastest way whose score is within 2 points of the best of its side."""
    top = max(row["score"] for row in rows.values())
    good = {name: row for name, row in rows.items() if row["score"] >= top - 2}
    return max(good, key=lambda name: good[name]["tokens_per_second"])


def print_d2(suite: str, rows: dict[str, Any], autoregressive: str, diffusion: str, ratio: float) -> None:
    table = Table(title=f"D2 {suite}: {ratio:.2f}x (target 2.1x)")
    for column in ("", "tokens/s", "tokens per forward", "score", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in rows.items():
        chosen = name in (autoregressive, diffusion)
        seconds = f"{statistics.median(row['seconds']):.2f} ({min(row['seconds']):.2f}-{max(row['seconds']):.2f})"
        cells = (f"{row['tokens_per_second']:.1f}", f"{row['tokens_per_forward']:.2f}", f"{row['score']:.0f}", seconds)
        table.add_row(f"{name} *" if chosen else name, *cells)
    LOG.print(table)


def one_forward(backend: Backend, rows: int, context: int) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """A forward of `rows` rows after `context` cached tokens, and its hidden states."""
    config = backend.config
    kv_cache = backend.new_kv_cache(1, context + rows).normal_()
    tokens = torch.randint(0, config.vocab_size, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = Batch.build([SequenceSlice(tokens, context, [0], rows)], context + rows, backend.device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return backend.forward(batch, kv_cache)

    return run, run()


def measure_d3(name: str, floors: Machine, quick: bool, smoke: bool) -> dict[str, Any]:
    """A denoising forward with its head, over rows and weights; and what a step is made of."""
    table = Table(title="D3: one denoising forward, context 256 (ms; target 1.5x the floor)")
    for column in ("weights", "rows", "layers", "attention", "head", "sum", "floor", "ratio"):
        table.add_column(column, justify="right")
    rows_of = {}
    size = load(name, "float32").config.block_size or 32
    counts = {1, size} if smoke else {1, 8, 16, 32, 64, size}
    for weights in ("int8",) if quick else WEIGHTS:
        backend = load(name, weights).backend()
        for rows in sorted(counts):
            run, hidden = one_forward(backend, rows, 32 if smoke else 256)
            bare, _ = one_forward(backend, rows, 0)
            mask_id = backend.config.mask_id
            head = partial(backend.greedy, hidden, mask_id)
            works = (run, bare, torch.inference_mode()(head))
            rounds = [one_round(floors, works, backend.config, weights, rows) for _ in range(1 if smoke else 9)]
            figures = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
            rows_of[f"{weights}, {rows}"] = figures
            cells = (f"{1e3 * figures[key]:.1f}" for key in ("layers", "attention", "head", "sum", "floor"))
            table.add_row(weights, str(rows), *cells, f"{figures['ratio']:.2f}")
    LOG.print(table)
    at_block = [figures["ratio"] for key, figures in rows_of.items() if key.endswith(f", {size}")]
    python = measure_python(load(name, "int8"))
    LOG.print(f"A step of a request beside the model (sampling, bookkeeping, Python): {1e3 * python:.2f} ms")
    return {"value": min(at_block), "target": 1.5, "rows": rows_of, "python_seconds": python}


def one_round(
    floors: Machine, works: tuple[Callable[[], Any], ...], config: ModelConfig, weights: str, rows: int
) -> dict[str, float]:
    """A forward with and without context, its head, and the floor, one after the other."""
    floors.measure()
    layers, without, top = (min(seconds_of(work, 2, warm=False)) for work in works)
    floor = floors.floor(config, weights, rows, rows)
    return {
        "layers": layers, "attention": max(layers - without, 0.0), "head": top, "sum": layers + top, "floor": floor,
        "ratio": (layers + top) / floor,
    }  # fmt: skip


def measure_python(model: LanguageModel) -> float:
    """Seconds a step spends outside forward and head."""
    backend = model.backend()
    spent = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = call(*arguments)
            spent[0] += time.perf_counter() - started
            return result

        return inner

    engine = Engine(Timed(backend, timed))
    request = model.request(model.encode_prompt("List five fruits."), max_new_tokens=64, eos_id=())
    engine.add(request)
    started, steps = time.perf_counter(), 0
    while engine.has_work:
        engine.step()
        steps += 1
    return (time.perf_counter() - started - spent[0]) / steps


class Timed:
    """A backend whose calls are timed."""

    def __init__(self, backend: Backend, timed: Callable[..., Any]) -> None:
        self.config, self.device, self.dtype = backend.config, backend.device, backend.dtype
        self.new_kv_cache, self.prefill_chunk = backend.new_kv_cache, backend.prefill_chunk
        self.forward, self.logits, self.greedy = timed(backend.forward), timed(backend.logits), timed(backend.greedy)


def measure_d4(name: str, quick: bool, smoke: bool) -> dict[str, Any]:
    """The engine against decoding without a cache: the reference in float32, and the 8-bit kernels without theirs."""
    count, runs = (8, 1) if smoke else (96, 1) if quick else (512, 3)
    found: dict[str, Any] = {"target": 10.0, "tokens": count}
    for weights in ("float32", "int8"):
        model = load(name, weights)
        ids = tuple(model.encode_prompt("Write a long story about the sea."))
        request = model.request(ids, max_new_tokens=count, eos_id=(), steps=2)
        engine = Engine(model.backend(), prefix_cache=False)
        cached = seconds_of(partial(engine.run, [request]), runs)
        started = time.perf_counter()
        if weights == "float32":
            assert model.config.mask_id is not None
            uncached_ids = generate_reference(model.transformer, request, model.config.mask_id).ids
        else:
            uncached_ids = forgetful(model, request)
        uncached = time.perf_counter() - started
        assert engine.run([request])[0].ids == uncached_ids, "with and without the cache disagree"
        ratio = uncached / statistics.median(cached)
        times = f"uncached {uncached:.1f} s, cached {statistics.median(cached):.1f} s"
        LOG.print(f"D4: {count} tokens, {weights}, identical; {times}: {ratio:.1f}x (target 10x)")
        found[weights] = {"ratio": ratio, "cached": cached, "uncached": uncached}
        found["value"] = ratio
    return found


def forgetful(model: LanguageModel, request: Request) -> tuple[int, ...]:
    """Decode with the same kernels and no cache: every sequence is preempted after every step."""
    engine = Engine(model.backend(), prefix_cache=False, max_num_batched_tokens=request.canvas_length)
    engine.scheduler.prefill_chunk = request.canvas_length
    engine.add(request)
    while True:
        for update in engine.step():
            if update.completion is not None:
                return update.completion.ids
        for sequence in list(engine.scheduler.running):
            engine.scheduler.preempt(sequence)


def measure_d5(name: str, quick: bool, smoke: bool) -> dict[str, Any]:
    """Eight requests at once against one after the other."""
    model = load(name, "int8")
    prompts = [task.prompt for task in (*facts(4), *extraction(4))]
    requests = [model.request(model.encode_prompt(text), max_new_tokens=4 if smoke else 48, eos_id=()) for text in prompts]

    def together() -> list[Completion]:
        return Engine(model.backend(), prefix_cache=False).run(requests)

    def alone() -> list[Completion]:
        return [Engine(model.backend(), prefix_cache=False).run([request])[0] for request in requests]

    pairs = [(seconds_of(alone, 1)[0], seconds_of(together, 1)[0]) for _ in range(1 if smoke else 3 if quick else 5)]
    ratio = statistics.median(one / many for one, many in pairs)
    same = [a.ids == b.ids for a, b in zip(together(), alone(), strict=True)]
    LOG.print(f"D5: eight requests, {sum(same)} of 8 identical: {ratio:.2f}x the throughput of one (target 4x)")
    return {"value": ratio, "target": 4.0, "pairs": pairs, "identical": sum(same)}


def measure_d6(name: str, floors: Machine, quick: bool, smoke: bool) -> dict[str, Any]:
    """A prompt of 2,048 tokens through the engine's own prefill."""
    best_ratio, rows_of, length = float("inf"), {}, 64 if smoke else 2048
    for weights in ("int8",) if quick else ("float32", "int8"):
        model = load(name, weights)
        config = model.config
        size = config.block_size or 32
        ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()

        def prefill(model: LanguageModel = model, ids: list[int] = ids) -> None:
            engine = Engine(model.backend(), prefix_cache=False)
            request: Request = replace(model.request(ids, max_new_tokens=1, eos_id=()), eos_ids=frozenset())
            engine.run([request])

        seconds = min(seconds_of(prefill, 2 if quick else 3))
        floors.measure(3)
        products = floors.floor(config, weights, length + size, size)
        # Scores and mixing, every position seeing the blocks up to its own, in float32 on every backend.
        pairs = sum((position // size + 1) * size for position in range(length + size))
        operations = 4 * pairs * config.num_layers * config.num_heads * config.head_dim
        floor = products + operations / floors.rates["float32"]
        rows_of[weights] = {"seconds": seconds, "floor": floor, "products_only": products, "ratio": seconds / floor}
        best_ratio = min(best_ratio, seconds / floor)
        LOG.print(
            f"D6: {length:,} tokens, {weights}: {seconds:.2f} s, floor {floor:.2f} s ({products:.2f} s without attention): "
            f"{seconds / floor:.2f}x (target 1.5x)"
        )
    return {"value": best_ratio, "target": 1.5, "rows": rows_of}


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-converted")
    parser.add_argument("--autoregressive", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="8-bit weights only, fewer prompts and repeats")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    parser.add_argument("--only", default="D2,D3,D4,D5,D6")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    quick, smoke = options.quick or options.smoke, options.smoke
    if options.threads:
        torch.set_num_threads(options.threads)
    floors = Machine(smoke=smoke)
    rates = ", ".join(f"{kind} {rate / 1e9:.0f} GOP/s" for kind, rate in floors.rates.items())
    LOG.print(f"{json.dumps(machine())}\nread bandwidth {floors.bytes_per_second / 1e9:.1f} GB/s, large products: {rates}")
    names = (options.autoregressive, options.model)
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "D2": lambda: measure_d2(names, quick, smoke),
        "D3": lambda: measure_d3(options.model, floors, quick, smoke),
        "D4": lambda: measure_d4(options.model, quick, smoke),
        "D5": lambda: measure_d5(options.model, quick, smoke),
        "D6": lambda: measure_d6(options.model, floors, quick, smoke),
    }
    wanted = options.only.split(",")
    figures: dict[str, Any] = {name: measure() for name, measure in work.items() if name in wanted}
    out = results_path(options.results, "decode_quick" if quick else "decode")
    before = json.loads(out.read_text()) if out.exists() else {}
    measured = {"machine": machine(), "bytes_per_second": floors.bytes_per_second, "rates": floors.rates}
    everything = {**before, **measured, **figures}  # with --only, the rest of today's figures stay
    write_results(out, everything)
    if options.json:
        json.dump({name: {"value": row["value"], "target": row["target"]} for name, row in figures.items()}, sys.stdout)
        print()


if __name__ == "__main__":
    main()
