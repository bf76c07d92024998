"""Decoding speed against floors measured in the same run, and against the engine itself: targets D3 to D6.

    python benchmarks/decode.py [--quick] [--json] [--only D3,D5] [--threads 2]

D3  one denoising forward with its head at 1, 8, 16, 32 and 64 rows and the model's block, context 256, against
    max(bytes of weights / read bandwidth, operations / rate): at most 1.5 times.
D4  512 tokens with the KV cache against the same without one, the same tokens (the reference in float32; with 8-bit weights
    the engine, made to forget after each step): at least 10 times as fast.
D5  eight requests at once against one after the other, the same tokens: at least 4 times the throughput.
D6  reading a prompt of 2,048 tokens against the floor, attention's operations included: at most 1.5 times.

float32 and bfloat16 are the path of `--quantize none`, int8 that of `--quantize auto`. `everyday.py` measures D2,
`vs_llamacpp.py` D1.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from common import Figure, arguments, figure, print_json, results_path, write_results
from floors import Machine, machine, seconds_of
from rich.console import Console
from rich.table import Table
from tasks import extraction, facts

import unmask
from unmask.engine.backends.base import Backend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, Request
from unmask.models.arch.config import ModelConfig

WEIGHTS = ("float32", "bfloat16", "int8", "int4")
LOG = Console(stderr=True)


class Measured(NamedTuple):
    """Figures by name, and what they were made of."""

    figures: dict[str, Figure]
    details: dict[str, Any]


def load(name: str, weights: str) -> LanguageModel:
    is_quantized = weights.startswith("int")
    model = unmask.load(name, dtype="float32" if is_quantized else weights, quantize=weights if is_quantized else "none")
    model.backend()
    return model


def one_forward(backend: Backend, rows: int, context: int) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """A forward of `rows` rows after `context` cached tokens, and its hidden states."""
    config = backend.config
    kv_cache = backend.new_kv_cache(1, context + rows).normal_()
    tokens = torch.randint(0, config.vocab_size, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = Batch([SequenceSlice(tokens, context, [0], rows)], context + rows, backend.device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return backend.forward(batch, kv_cache)

    return run, run()


def measure_d3(name: str, floors: Machine, quick: bool, smoke: bool) -> Measured:
    """A denoising forward with its head, over rows and weights; and what a step is made of."""
    table = Table(title="D3: one denoising forward, context 256 (ms; target 1.5x the floor)")
    for column in ("weights", "rows", "layers", "attention", "head", "sum", "floor", "ratio"):
        table.add_column(column, justify="right")
    figures, details = dict[str, Figure](), dict[str, Any]()
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
            medians = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
            details[f"{weights}, {rows}"] = medians
            figures[f"D3 {weights}, {rows} rows"] = figure(medians["ratio"], 1.5, higher_is_better=False)
            cells = (f"{1e3 * medians[key]:.1f}" for key in ("layers", "attention", "head", "sum", "floor"))
            table.add_row(weights, str(rows), *cells, f"{medians['ratio']:.2f}")
    LOG.print(table)
    python = measure_python(load(name, "int8"))
    LOG.print(f"A step of a request beside the model (sampling, bookkeeping, Python): {1e3 * python:.2f} ms")
    return Measured(figures, {**details, "python_seconds": python})


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
        self.new_kv_cache, self.prefill_chunk, self.kernels = backend.new_kv_cache, backend.prefill_chunk, backend.kernels
        self.prepare_adapter = backend.prepare_adapter
        self.forward, self.logits, self.greedy = timed(backend.forward), timed(backend.logits), timed(backend.greedy)


def measure_d4(name: str, quick: bool, smoke: bool) -> Measured:
    """The engine against decoding without a cache: the reference in float32, and the 8-bit kernels without theirs."""
    count, runs = (8, 1) if smoke else (512, 1 if quick else 3)
    figures, details = dict[str, Figure](), dict[str, Any]({"tokens": count})
    for weights in ("int8",) if quick and not smoke else ("float32", "int8"):
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
        details[weights] = {"cached": cached, "uncached": uncached}
        figures[f"D4 {weights}"] = figure(ratio, 10.0)
    return Measured(figures, details)


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


def measure_d5(name: str, floors: Machine, quick: bool, smoke: bool) -> Measured:
    """Eight requests at once against one after the other, and what the floors alone would allow."""
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
    floors.measure(3)
    size = model.config.block_size or 1
    one, eight = (floors.floor(model.config, "int8", rows, rows) for rows in (size, 8 * size))
    bound = 8 * one / eight
    LOG.print(
        f"D5: eight requests, {sum(same)} of 8 identical: {ratio:.2f}x the throughput of one (target 4x; {bound:.2f}x by the "
        f"floors at {size} and {8 * size} rows)"
    )
    figures = {"D5 int8": figure(ratio, 4.0), "D5 identical": figure(sum(same), 8.0), "D5 by the floors": figure(bound)}
    return Measured(figures, {"pairs": pairs})


def measure_d6(name: str, floors: Machine, quick: bool, smoke: bool) -> Measured:
    """A prompt of 2,048 tokens through the engine's own prefill."""
    figures, details, length = dict[str, Figure](), dict[str, Any](), 64 if smoke else 2048
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
        details[weights] = {"seconds": seconds, "floor": floor, "products_only": products}
        figures[f"D6 {weights}"] = figure(seconds / floor, 1.5, higher_is_better=False)
        LOG.print(
            f"D6: {length:,} tokens, {weights}: {seconds:.2f} s, floor {floor:.2f} s ({products:.2f} s without attention): "
            f"{seconds / floor:.2f}x (target 1.5x)"
        )
    return Measured(figures, details)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-converted")
    parser.add_argument("--quick", action="store_true", help="8-bit weights only, fewer prompts and repeats")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; tables go to standard error")
    parser.add_argument("--only", default="D3,D4,D5,D6")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(argv)
    quick, smoke = options.quick or options.smoke, options.smoke
    if options.threads:
        torch.set_num_threads(options.threads)
    floors = Machine(smoke=smoke)
    rates = ", ".join(f"{kind} {rate / 1e9:.0f} GOP/s" for kind, rate in floors.rates.items())
    LOG.print(f"{json.dumps(machine())}\nread bandwidth {floors.bytes_per_second / 1e9:.1f} GB/s, large products: {rates}")
    work: dict[str, Callable[[], Measured]] = {
        "D3": lambda: measure_d3(options.model, floors, quick, smoke),
        "D4": lambda: measure_d4(options.model, quick, smoke),
        "D5": lambda: measure_d5(options.model, floors, quick, smoke),
        "D6": lambda: measure_d6(options.model, floors, quick, smoke),
    }
    wanted = options.only.split(",")
    measured = {name: measure() for name, measure in work.items() if name in wanted}
    figures = {name: each for of_target in measured.values() for name, each in of_target.figures.items()}
    out = results_path(options.results, "decode_quick" if quick else "decode")
    before = json.loads(out.read_text()) if out.exists() else {}
    about = {"machine": machine(), "bytes_per_second": floors.bytes_per_second, "rates": floors.rates}
    # With --only, the rest of today's figures stay.
    write_results(out, {**before, **about, **{name: each._asdict() for name, each in measured.items()}})
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
