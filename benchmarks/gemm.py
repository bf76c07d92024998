"""Quantised matrix products on this CPU: the libraries' and ours against float32 and the floor.

    python benchmarks/gemm.py [--rows 1,8,32,64] [--repeats 5] [--json]

Shapes are SmolLM2-135M's. Every way is first held to the exact product it claims to compute, at every row count, and its
time is printed only then. Weights are cold, as in a forward: each way goes round several copies that do not fit into a
cache. Ways take turns (A B A B ...); a figure is the median over the repeats, with the range behind it. The floor is the
larger of weight bytes / read bandwidth and operations / peak rate of 8-bit dot products, both measured here, for 8 bits.
"""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments
from floors import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from unmask.models.native.build import find_target
from unmask.models.native.interface import Kernels
from unmask.models.native.library import kernel_variant, load_kernels
from unmask.models.native.linear import PackedLinear
from unmask.models.native.packing import pack_matrix
from unmask.models.native.quantize import GROUP, QuantizedMatrix, round_bytes, round_codes
from unmask.models.native.variants import FLAGS, SOURCES, variants_of

SHAPES = {"qkv": (576, 960), "out": (576, 576), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
COLD_BYTES = 64 << 20
Product = Callable[[Tensor], Tensor]
# Dot products at the rate of the registers; what they read changes behind the compiler's back.
PEAK = """
#include "dot.h"
extern "C" int rounds(int64_t count) {
    static uint8_t weights[64] = {1, 2, 3};
    const NativeInts inputs = splat_to<NativeInts>(0x00010001);
    NativeInts sums[12] = {};
    for (int64_t i = 0; i < count; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < 12; j++) {
            asm volatile("" : : "r"(weights) : "memory");
            sums[j] = dot(sums[j], load<NativeInts>(weights), inputs);
        }
    }
    NativeInts total = {};
    for (int j = 0; j < 12; j++) total += sums[j];
    return total[0];
}
extern "C" int operations() { return 2 * 12 * kNative * 4 / kPasses; }
"""


@dataclass(frozen=True)
class Way:
    """A way to multiply: one callable per copy of the weights, and the matrix [N, K] it should multiply by."""

    products: list[Product]
    weight: Tensor
    rounded_inputs: int | None
    """How many activations share a scale; None: they are not rounded."""

    def expected(self, x: Tensor) -> Tensor:
        if self.rounded_inputs is not None:
            q, scale = round_rows(x.view(-1, self.rounded_inputs))
            x = (q.double() * scale.double()).view(x.shape)
        return (x.double() @ self.weight.double().T).float()


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as signed 8-bit integers, and their scales."""
    peak = x.abs().amax(1, keepdim=True)
    return (x * (torch.full_like(peak, 127) / peak)).round().to(torch.int8), peak / 127


def ways(inputs: int, outputs: int, kernels: Kernels) -> dict[str, Way]:
    """Every way there is, by name. The libraries' take a float matrix and round its rows as ours do."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    eight, four = round_bytes(weight), round_codes(weight)
    copies = range(max(2, COLD_BYTES // (inputs * outputs)))

    def way(make: Callable[[], Product], exact: Tensor, rounded_inputs: int | None) -> Way:
        return Way([make() for _ in copies], exact, rounded_inputs)

    def ours(bits: int) -> Callable[[], Product]:
        return lambda: PackedLinear(pack_matrix(weight, bits), kernels)

    return {
        "float32": way(partial(plain, weight), weight, None),
        "onednn float32": way(partial(packed_float, weight), weight, None),
        "_int_mm": way(partial(int_mm, eight), eight.dequantize(), inputs),
        "onednn qlinear": way(partial(onednn, eight), eight.dequantize(), inputs),
        "_weight_int8pack_mm": way(partial(weight_only, eight), eight.dequantize(), None),
        "ours, int8": way(ours(8), eight.dequantize(), inputs),
        "ours, int4": way(ours(4), four.dequantize(), GROUP),
    }


def plain(weight: Tensor) -> Product:
    w = weight.clone()
    return lambda x: F.linear(x, w)


def packed_float(weight: Tensor) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)  # packed for 8 rows, it serves all counts alike

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return out

    return product


def int_mm(eight: QuantizedMatrix) -> Product:
    w = eight.integers_NK.clone().t()

    def product(x: Tensor) -> Tensor:
        q, scale = round_rows(x)
        return torch._int_mm(q, w).float() * scale * eight.scale_N

    return product


def onednn(eight: QuantizedMatrix) -> Product:
    packed = torch.ops.onednn.qlinear_prepack(eight.integers_NK, None)
    zeros = torch.zeros(len(eight.scale_N), dtype=torch.int64)

    def product(x: Tensor) -> Tensor:
        q, scale = round_rows(x)
        # Signed inputs take a path without vector instructions, so 128 is added and told.
        unsigned = q.view(torch.uint8).bitwise_xor_(128)
        out = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, packed, eight.scale_N, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        scaled: Tensor = out * scale
        return scaled

    return product


def weight_only(eight: QuantizedMatrix) -> Product:
    w = eight.integers_NK.clone()

    def product(x: Tensor) -> Tensor:
        out: Tensor = torch._weight_int8pack_mm(x, w, eight.scale_N)
        return out

    return product


def check(way: Way, x: Tensor, plain: Way) -> str | None:
    """Why a way is not timed, if so: it fails, it is wrong, or it has no fast kernel here."""
    try:
        got = [product(x) for product in way.products[:2]]
    except RuntimeError as error:
        return str(error).splitlines()[0][:40]
    expected = way.expected(x)
    worst = max(float((out - expected).norm() / expected.norm()) for out in got)
    if worst > 1e-5:
        return f"WRONG by {worst:.1e}"
    slower = timed(lambda: way.products[0](x)) / timed(lambda: plain.products[0](x))
    return f"{slower:.0f} times slower than float32" if slower > 10 else None


def seconds(way: Way, x: Tensor) -> float:
    """Seconds a product, over all copies."""
    started = time.perf_counter()
    for product in way.products:
        product(x)
    return (time.perf_counter() - started) / len(way.products)


def read_bandwidth() -> float:
    """Bytes per second of reading memory with all threads."""
    data = torch.ones(64 << 20, dtype=torch.int32)
    return max(data.nbytes / timed(lambda: data.max()) for _ in range(7))


def peak_rate() -> float:
    """8-bit operations per second of all threads, multiplications and additions counted apart."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.cpp", Path(folder) / "peak.so"
        source.write_text(PEAK)
        flags = variants_of(platform.machine())[kernel_variant() or ""]
        command = [*find_target().compiler, *FLAGS, *flags, f"-I{SOURCES}", "-shared", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        peak = ctypes.CDLL(str(library))
        peak.rounds.argtypes = [ctypes.c_int64]
        operations: int = peak.operations()
        one = max(1e6 * operations / timed(lambda: peak.rounds(1_000_000)) for _ in range(7))
    return one * torch.get_num_threads()


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(shape: str, rows: list[int], repeats: int, kernels: Kernels) -> list[dict[str, Any]]:
    """Figures of one shape: for each row count and way, milliseconds in the order of the repeats, or why there are none."""
    inputs, outputs = SHAPES[shape]
    all_ways, figures = ways(inputs, outputs, kernels), []
    for count in rows:
        x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))
        reasons = {name: check(way, x, all_ways["float32"]) for name, way in all_ways.items()}
        times: dict[str, list[float]] = {name: [] for name, reason in reasons.items() if reason is None}
        for _ in range(repeats):
            for name in times:
                times[name].append(1e3 * seconds(all_ways[name], x))
        for name, reason in reasons.items():
            figures.append({"shape": shape, "rows": count, "way": name, "ms": times.get(name, []), "reason": reason})
    return figures


def floor_ms(shape: str, rows: int, limits: dict[str, float]) -> float:
    inputs, outputs = SHAPES[shape]
    return 1e3 * max(inputs * outputs / limits["bandwidth"], 2 * rows * inputs * outputs / limits["peak"])


def table(figures: list[dict[str, Any]], limits: dict[str, float]) -> Table:
    out = Table("shape", "rows", "way", "ms", "range", "GOP/s", "x floor", title="Matrix products, cold weights")
    for figure in figures:
        inputs, outputs = SHAPES[figure["shape"]]
        if not figure["ms"]:
            out.add_row(figure["shape"], str(figure["rows"]), figure["way"], "-", figure["reason"], "", "")
            continue
        median = statistics.median(figure["ms"])
        rate = 2 * figure["rows"] * inputs * outputs / median / 1e6
        floor = floor_ms(figure["shape"], figure["rows"], limits)
        spread = f"{min(figure['ms']):.3f}-{max(figure['ms']):.3f}"
        out.add_row(
            figure["shape"],
            str(figure["rows"]),
            figure["way"],
            f"{median:.3f}",
            spread,
            f"{rate:.0f}",
            f"{median / floor:.1f}",
        )
    return out


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(argv)
    console = Console(stderr=options.json)
    kernels = load_kernels()
    limits = {"bandwidth": read_bandwidth(), "peak": peak_rate()}
    rows, shapes = [int(n) for n in options.rows.split(",")], options.shapes.split(",")
    if options.smoke:
        rows, shapes, options.repeats = rows[:1], shapes[:1], 1
    figures: list[dict[str, Any]] = []
    for shape in shapes:
        figures += measure(shape, rows, options.repeats, kernels)
    console.print(table(figures, limits))
    console.print(f"read bandwidth {limits['bandwidth'] / 1e9:.1f} GB/s, peak {limits['peak'] / 1e9:.0f} GOP/s, {machine()}")
    if options.json:
        print(json.dumps({"machine": machine(), "limits": limits, "figures": figures}))


if __name__ == "__main__":
    main()
