"""Attention and the vocabulary head of the CPU kernels against their floors, over rows and contexts.

    python benchmarks/attention.py [--rows 1,8,64] [--contexts 256,2048,8192] [--json]

Heads and vocabulary are SmolLM2-135M's. Attention is the time of a forward after cached tokens less that of the same forward
without them, of a model that has little but attention. Its floor is the larger of bytes of keys and values / read bandwidth and
operations / the rate of float32 products; the head's that of its bytes and 8-bit operations. Floors are measured beside each
figure; a ratio is the median of those of the repeats.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import Figure, arguments, figure, print_json
from floors import Machine, machine, seconds_of
from rich.console import Console
from rich.table import Table

from unmask.engine.backends.native import NativeBackend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.native.library import load_kernels
from unmask.models.native.linear import PackedLinear
from unmask.models.native.packing import pack_matrix, pack_model

TARGET = 1.5
CONFIG = ModelConfig(
    family="llama", vocab_size=64, hidden_size=64, num_layers=8, num_heads=9, num_kv_heads=3, head_dim=64, ffn_size=64,
    max_positions=2**16,
)  # fmt: skip
HEAD = (49152, 576)
FLOAT_BYTES = 4


def attention_seconds(backend: NativeBackend, rows: int, context: int) -> float:
    """Seconds of a forward of `rows` rows after `context` cached tokens, less those of one after none."""
    seconds = []
    for past in (context, 0):
        batch = Batch([SequenceSlice([5] * rows, past, [0], rows)], past + rows, backend.device)
        kv_cache = backend.new_kv_cache(1, past + rows).fill_(0.5)
        seconds.append(min(seconds_of(partial(backend.forward, batch, kv_cache), 3)))
    return max(seconds[0] - seconds[1], 0.0)


def head_seconds(head: PackedLinear, rows: int) -> float:
    """Seconds of the likeliest tokens of `rows` hidden states."""
    hidden = torch.randn(rows, head.depth, generator=torch.Generator().manual_seed(0))
    return min(seconds_of(partial(head.greedy, hidden, None), 3))


def attention_floor(floors: Machine, rows: int, context: int) -> float:
    """Seconds to read the context's keys and values, or to multiply with them, whichever is more."""
    keys = CONFIG.num_layers * context * CONFIG.head_dim
    moved, operations = 2 * keys * CONFIG.num_kv_heads * FLOAT_BYTES, 4 * keys * rows * CONFIG.num_heads
    return max(moved / floors.bytes_per_second, operations / floors.rates["float32"])


def head_floor(floors: Machine, rows: int) -> float:
    """Seconds to read the head's weights, or to multiply with them."""
    weights = HEAD[0] * HEAD[1]
    return max(weights / floors.bytes_per_second, 2 * rows * weights / floors.rates["int8"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", default="1,4,8,16,64")
    parser.add_argument("--contexts", default="256,2048,8192")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object; the table goes to standard error")
    options = parser.parse_args(argv)
    rows_of, contexts = ([int(n) for n in text.split(",")] for text in (options.rows, options.contexts))
    if options.smoke:
        rows_of, contexts, options.repeats = [2], [32], 1
    console, floors = Console(file=sys.stderr if options.json else sys.stdout), Machine(smoke=options.smoke)
    kernels = load_kernels()
    backend = NativeBackend(pack_model(Transformer(CONFIG), 8), kernels)
    head = PackedLinear(pack_matrix(torch.ones(*((64, 64) if options.smoke else HEAD)), 8), kernels)
    works: list[tuple[str, int, int | None, Callable[[], float], Callable[[], float]]] = []
    for rows in rows_of:
        works.append(("head", rows, None, partial(head_seconds, head, rows), partial(head_floor, floors, rows)))
        for context in contexts:
            seconds, floor = partial(attention_seconds, backend, rows, context), partial(attention_floor, floors, rows, context)
            works.append(("attention", rows, context, seconds, floor))
    table, figures = Table("what", "rows", "context", "ms", "floor", "ratio", title=machine()["cpu"]), dict[str, Figure]()
    for name, count, keys, seconds_now, floor_now in works:
        pairs = []
        for _ in range(options.repeats):
            floors.measure()
            pairs.append((seconds_now(), floor_now()))
        ratio = statistics.median(taken / least for taken, least in pairs)
        milliseconds = (f"{1e3 * statistics.median(column):.2f}" for column in zip(*pairs, strict=True))
        table.add_row(name, str(count), str(keys or ""), *milliseconds, f"{ratio:.2f}")
        figures["_".join(map(str, filter(None, (name, count, keys))))] = figure(ratio, TARGET, higher_is_better=False)
    console.print(table)
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
