"""What sampling costs beside greedy decoding: CPU seconds of a forward with its sampling, by decoding options, in turn.

The same prompt and number of forwards for all options: token by token, and a block decoded one token a step, so that every
forward samples a whole block's rows. int8 kernels, one thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import arguments, results_path, write_results
from floors import machine

import unmask
from unmask.engine.llm import LanguageModel

TARGET = 1.10
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 50},
    "min_p": {"temperature": 0.8, "min_p": 0.05},
    "all filters": {"temperature": 0.8, "min_p": 0.01, "top_k": 100, "top_p": 0.9},
    "flat top_p": {"temperature": 1.5, "top_p": 0.95},
    "penalties": {"frequency_penalty": 0.5, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
}
ONE_TOKEN_A_STEP: dict[str, Any] = {"threshold": 1.0, "ignore_eos": True}


def seconds_per_forward(model: LanguageModel, ids: Sequence[int], tokens: int, options: dict[str, Any]) -> float:
    """CPU time of decoding `tokens` tokens by its forwards; what else the machine does hardly changes it."""
    started = time.process_time()
    mode = "diffusion" if model.is_diffusion else "ar"
    completion = model.complete(ids, max_new_tokens=tokens, mode=mode, **ONE_TOKEN_A_STEP, **options)
    return (time.process_time() - started) / completion.forwards


def measure(model: LanguageModel, *, rounds: int, tokens: int) -> dict[str, dict[str, float]]:
    """Median CPU seconds of a forward, and of the ratios to greedy decoding in the same round."""
    model.backend()
    ids = [7 + number for number in range(24)]
    found: dict[str, list[float]] = {name: [] for name in OPTIONS}
    for number in range(rounds + 1):
        for name, options in OPTIONS.items():
            seconds = seconds_per_forward(model, ids, tokens, options)
            if number:  # the first round warms up
                found[name].append(seconds)
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(mine / greedy for mine, greedy in zip(seconds, found["greedy"], strict=True)),
        }
        for name, seconds in found.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--autoregressive", default="smollm2-135m", help="decoded token by token")
    parser.add_argument("--diffusion", default="smollm2-135m-converted", help="decoded in blocks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rounds, tokens = (1, 6) if options.smoke else (options.rounds, 32)
    results: dict[str, Any] = {"machine": machine(), "target": TARGET}
    for kind in ("autoregressive", "diffusion"):
        model = unmask.load(getattr(options, kind), dtype="float32", quantize="none" if options.smoke else "int8")
        results[kind] = measure(model, rounds=rounds, tokens=tokens)
    write_results(results_path(options.results, "sampling"), results)
    if options.json:
        print(json.dumps(results))
        return
    for kind in ("autoregressive", "diffusion"):
        for name, figures in results[kind].items():
            print(f"{kind:15} {name:12} {figures['milliseconds']:7.2f} ms a forward  {figures['ratio']:.2f}x greedy")


if __name__ == "__main__":
    main(sys.argv[1:])
