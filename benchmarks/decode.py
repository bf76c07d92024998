"""Decoding speed: diffusion against autoregressive decoding of the model it came from, and cached against uncached.

    python benchmarks/decode.py [--prompts 4] [--repeats 5] [--max-new-tokens 64] [--thresholds 0.95,0.8] [--uncached]

The ways of decoding take turns (A B A B ...) on the same prompts in one process; each figure is the median over the repeats
with its range. Every forward counts, prefill and commit included. Texts are printed, because speed means nothing without them.
With --uncached, the cached decoder is timed against the uncached reference, and must give the same tokens. Writes the figures
to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import unmask
from unmask.diffusion.decode import DecodeRules
from unmask.engine.completion import Completion, Prompt
from unmask.engine.model import LanguageModel
from unmask.engine.reference import generate_reference

PROMPTS = (
    "What is the capital of France?",
    "List five fruits.",
    "What is photosynthesis?",
    "How do I make a cup of tea?",
    "Write a short poem about the sea.",
    "What is 17 plus 25?",
    "Why is sleep important?",
    "Give me three tips for saving money.",
)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "cpu": model,
        "amx_bf16": "amx_bf16" in flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def in_turn(ways: dict[str, Callable[[], list[Completion]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Run every way once to warm up, then `repeats` times in turn; tokens, forwards and seconds of each."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, list[Completion]] = {}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            seconds[name].append(time.perf_counter() - started)
    figures = {}
    for name, completions in results.items():
        tokens = sum(len(completion.ids) for completion in completions)
        forwards = sum(completion.forwards for completion in completions)
        rates = [tokens / s for s in seconds[name]]
        figures[name] = {
            "tokens": tokens,
            "forwards": forwards,
            "tokens_per_forward": tokens / forwards,
            "tokens_per_second": statistics.median(rates),
            "range": [min(rates), max(rates)],
            "seconds": seconds[name],
            "completions": completions,
        }
    return figures


def report(figures: dict[str, dict[str, Any]], first: str) -> None:
    """Print a table; the last column is the median ratio of tokens/s to the first way's, repeat by repeat."""
    base = figures[first]
    print(f"{'':<26}{'tokens/s':>10}{'range':>16}{'per forward':>13}{'forwards':>10}{'ratio':>8}")
    for name, row in figures.items():
        ratios = [
            (row["tokens"] / mine) / (base["tokens"] / theirs)
            for mine, theirs in zip(row["seconds"], base["seconds"], strict=True)
        ]
        low, high = row["range"]
        print(
            f"{name:<26}{row['tokens_per_second']:>10.1f}{f'{low:.1f}-{high:.1f}':>16}"
            f"{row['tokens_per_forward']:>13.2f}{row['forwards']:>10}{statistics.median(ratios):>8.2f}"
        )


def encode(model: LanguageModel, count: int, max_new_tokens: int) -> list[Prompt]:
    eos_ids = frozenset(model.config.eos_ids)
    return [Prompt(tuple(model.encode_prompt(text)), max_new_tokens, eos_ids) for text in PROMPTS[:count]]


def decode_all(model: LanguageModel, prompts: list[Prompt], **options: Any) -> list[Completion]:
    return [model.complete(prompt.ids, max_new_tokens=prompt.max_new_tokens, **options) for prompt in prompts]


def uncached(model: LanguageModel, prompts: list[Prompt], threshold: float) -> list[Completion]:
    size = model.config.block_size or 32
    rules = DecodeRules(block_size=size, threshold=threshold, steps=size)
    assert model.config.mask_id is not None
    return [generate_reference(model.transformer, prompt, rules, model.config.mask_id) for prompt in prompts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-diffusion")
    parser.add_argument("--autoregressive", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--thresholds", default="0.95,0.8")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--uncached", action="store_true", help="time the cached decoder against the uncached reference")
    options = parser.parse_args()
    model = unmask.load(options.model, dtype=options.dtype)
    prompts = encode(model, options.prompts, options.max_new_tokens)
    thresholds = [float(value) for value in options.thresholds.split(",")]
    if options.uncached:
        first = "uncached reference"
        ways: dict[str, Callable[[], list[Completion]]] = {
            first: lambda: uncached(model, prompts, thresholds[0]),
            "cached": lambda: decode_all(model, prompts, threshold=thresholds[0]),
        }
    else:
        base, first = unmask.load(options.autoregressive, dtype=options.dtype), "autoregressive"
        ways = {first: lambda: decode_all(base, prompts)}
        for threshold in thresholds:
            ways[f"diffusion, threshold {threshold}"] = lambda t=threshold: decode_all(model, prompts, threshold=t)
    figures = in_turn(ways, options.repeats)
    print(json.dumps(machine()))
    report(figures, first)
    if options.uncached:
        cached, reference = figures["cached"]["completions"], figures[first]["completions"]
        same = [a.ids == b.ids for a, b in zip(cached, reference, strict=True)]
        print(f"token-identical: {sum(same)} of {len(same)}")
    for name, row in figures.items():
        for text, completion in zip(PROMPTS, row.pop("completions"), strict=False):
            assert model.tokenizer is not None
            print(f"[{name}] {text} -> {model.tokenizer.decode(completion.ids)!r}")
    now = datetime.now(UTC)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    path = results / f"decode{'_uncached' if options.uncached else ''}_{now:%Y-%m-%d}.json"
    settings = vars(options)
    path.write_text(json.dumps({"machine": machine(), "options": settings, "figures": figures}, indent=1) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
