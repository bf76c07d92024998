"""LLaDA2.0-mini's size on this machine: made with random weights, quantised, opened, and its forwards beside their floors.

    python benchmarks/mini16b.py [--layers 20] [--bits 4] [--folder out/mini16b] [--keep] [--json]
    python benchmarks/mini16b.py --preset llada2-flash --layers 3 --keep     # 100 billion parameters have 32 layers
    systemd-run --scope -p MemoryMax=3G python benchmarks/mini16b.py --stage generate     # with less memory than weights

Weights are random (seeded): sizes, memory and time are those of the published model; tokens are random, too, so that experts
are chosen about evenly, which a trained router does less. The bfloat16 checkpoint (32 GB) is removed once it is quantised, and
everything at the end, unless `--keep`; what an earlier run kept is not made again. Each stage is a process of its own, whose
largest resident memory is that of its life, mapped pages of files included.

A floor is bytes / read bandwidth or operations / rate of large products, whichever takes longer, measured beside each forward;
of experts the bytes of those that were touched, of attention those of keys and values. The rate of decoding is that of blocks
of 32 at the 2.55 tokens per forward which are published for this model.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Figure, arguments, figure, print_json, results_path, write_results
from floors import Machine, machine, seconds_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

import unmask
from unmask.engine.backends.native import NativeBackend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.models.arch.config import ModelConfig
from unmask.models.families.registry import published_config, read_config, stored_tensors, write_config
from unmask.models.native.packed_file import prefault
from unmask.models.native.packing import PackedWeights
from unmask.models.native.quantization_job import QuantizationJob
from unmask.models.native.recipe import QuantizationRecipe
from unmask.models.native.sizes import packed_bytes
from unmask.models.weights.checkpoint import parameter_dtype
from unmask.models.weights.room import weight_bytes
from unmask.models.weights.safetensors_io import TensorSpec, write_checkpoint

LOG = Console(stderr=True, width=132)
ROWS, BLOCK, CONTEXT, CAPACITY = (1, 4, 8, 16, 32), 32, 1024, 48
WARM_SECONDS = 20.0
TOKENS_PER_FORWARD = 2.55
"""Published for blocks of 32 and threshold 0.95."""
_POOL = 2**24 + 43
"""Random numbers that all weights are cut from; no multiple of a row's length."""
_STD = 0.02


def geometry(preset: str, num_layers: int | None, *, smoke: bool) -> ModelConfig:
    """The architecture of a published model, or of something tiny."""
    config = read_config(published_config(preset))
    if smoke:
        assert config.moe is not None
        moe = replace(config.moe, num_experts=16, num_active=4, expert_size=32, num_groups=4, num_active_groups=2)
        config = replace(
            config, vocab_size=512, mask_id=3, eos_ids=(1,), pad_id=1, hidden_size=64, num_layers=3, num_heads=4,
            num_kv_heads=2, head_dim=16, ffn_size=96, max_positions=2048, moe=moe,
        )  # fmt: skip
    return replace(config, num_layers=num_layers or config.num_layers)


class RandomWeights:
    """Tensors of a checkpoint: normal numbers, a piece of a fixed pool for each name."""

    def __init__(self, config: ModelConfig) -> None:
        self._pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(_STD).bfloat16()
        self.specs = {
            name: TensorSpec(tensor.shape, parameter_dtype(tensor.parameter, torch.bfloat16))
            for name, tensor in stored_tensors(config).items()
        }

    def read(self, name: str) -> Tensor:
        """A tensor; norms are near 1."""
        spec = self.specs[name]
        flat = torch.empty(torch.Size(spec.shape).numel(), dtype=spec.dtype)
        at = zlib.crc32(name.encode()) % _POOL
        for piece in (flat[: _POOL - at], *flat[_POOL - at :].split(_POOL)):
            piece.copy_(self._pool[at : at + len(piece)])
            at = 0
        if "norm" in name:
            flat += 1
        return flat.view(spec.shape)


def make(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Write the bfloat16 checkpoint."""
    weights = RandomWeights(config)
    write_checkpoint(folder / "bfloat16", write_config(config, dtype="bfloat16"), weights.specs, weights.read)
    return {}


def quantise(folder: Path, bits: int) -> dict[str, Any]:
    """Quantise it, as `unmask quantize` does."""
    QuantizationJob("random weights", folder / "bfloat16", QuantizationRecipe(bits)).run(folder / f"int{bits}")
    return {}


def measure(folder: Path, bits: int, *, smoke: bool) -> dict[str, Any]:
    """Open the quantised model and time its forwards."""
    packed = folder / f"int{bits}"
    _forget_pages(packed)
    started = time.perf_counter()
    backend = unmask.load(packed).backend()
    found: dict[str, Any] = {"open_seconds": time.perf_counter() - started, "open_rss": _resident_bytes()}
    assert isinstance(backend, NativeBackend)
    LOG.print(f"opened in {found['open_seconds']:.2f} s")
    floors, forwards = Machine(smoke=smoke), Forwards(backend)
    started = time.perf_counter()
    forwards.run(BLOCK)
    found["cold_seconds"] = time.perf_counter() - started
    prefault(backend.weights).join()  # as `load` does in the background
    found["mapped_seconds"] = time.perf_counter() - started
    forwards.warm(0.0 if smoke else WARM_SECONDS)
    limited = Forwards(backend.with_expert_capacity(4 if smoke else CAPACITY))
    found["forwards"] = [forwards.timed(rows, floors) for rows in ROWS]
    found["limited"] = [limited.timed(rows, floors) for rows in ROWS[1:]]
    return found


def generate(folder: Path, bits: int) -> dict[str, Any]:
    """Decode a prompt, block by block, as `unmask generate` does."""
    model = unmask.load(folder / f"int{bits}")
    model.generate_ids(range(100, 132), max_new_tokens=1)
    started = time.perf_counter()
    tokens = len(model.generate_ids(range(200, 232), max_new_tokens=BLOCK))
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "tokens_per_second": tokens / seconds, "resident": _resident_bytes()}


class Forwards:
    """Forwards of a model, with its vocabulary head, behind a context of random keys and values."""

    def __init__(self, backend: NativeBackend) -> None:
        self.backend, self._generator = backend, torch.Generator().manual_seed(0)
        self._num_cache_blocks = (CONTEXT + BLOCK) // BLOCK
        self._kv_cache = backend.new_kv_cache(self._num_cache_blocks, BLOCK).normal_(generator=self._generator)
        self.touched_L = np.zeros(backend.config.num_layers, np.int64)

    def run(self, rows: int) -> None:
        """One forward: a token, or a block of so many, in which each attends to all."""
        tokens = torch.randint(0, self.backend.config.vocab_size, (rows,), generator=self._generator).tolist()
        sequence = SequenceSlice(tokens, CONTEXT, range(self._num_cache_blocks), 1 if rows == 1 else BLOCK)
        hidden = self.backend.forward(Batch([sequence], BLOCK), self._kv_cache, touched_L=self.touched_L)
        self.backend.greedy(hidden, self.backend.config.mask_id)

    def warm(self, seconds: float) -> None:
        """Forwards for so long: pages that were just read from disk are slow to read at first, whatever is measured."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.run(BLOCK)

    def timed(self, rows: int, floors: Machine) -> dict[str, Any]:
        """Median seconds of forwards, their floor, and the experts that a layer touched."""
        weights = self.backend.weights
        moved, operations, touched, seconds = list[float](), 0.0, list[float](), list[float]()
        floors.measure(3)
        for _ in range(5):
            seconds += seconds_of(lambda: self.run(rows), 1, warm=not seconds)
            touched.append(float(self.touched_L[self.touched_L > 0].mean()))
            bytes_read, operations = work_of(weights, self.touched_L, rows)
            moved.append(bytes_read)
        config, mean_moved = weights.config, sum(moved) / len(moved)
        keys = config.num_layers * (CONTEXT + rows) * config.head_dim
        mean_moved += 2 * 4 * keys * config.num_kv_heads
        attention = 4 * rows * keys * config.num_heads
        compute = operations / floors.rates["int8"] + attention / floors.rates["float32"]
        LOG.print(f"{rows} rows: {np.median(seconds):.3f} s")
        return {
            "rows": rows, "seconds": float(np.median(seconds)), "read_floor": mean_moved / floors.bytes_per_second,
            "compute_floor": compute, "touched": sum(touched) / len(touched), "bytes": mean_moved,
            "bytes_per_second": floors.bytes_per_second,
        }  # fmt: skip


def work_of(weights: PackedWeights, touched_L: np.ndarray[Any, Any], rows: int) -> tuple[float, float]:
    """Bytes of weights that a forward reads and its operations, vocabulary head included, attention apart."""
    moe = weights.config.moe
    assert moe is not None
    moved, operations = 0.0, 0.0
    for name, matrix in weights.matrices.items():
        num_bytes, numbers = float(matrix.num_bytes), float(matrix.outputs * matrix.depth)
        if ".experts." in name:
            num_bytes *= touched_L[int(name.split(".")[1])] / moe.num_experts
            numbers *= moe.num_active / moe.num_experts
        moved += num_bytes
        operations += 2 * numbers * rows
    return moved, operations


def _forget_pages(folder: Path) -> None:
    """Drop the folder's files from the page cache, so that they are opened from disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run_stage(name: str, options: Any) -> dict[str, Any]:
    """What a stage gives, its seconds and its largest resident memory; in a process of its own, but for a smoke run."""
    started = time.perf_counter()
    if options.smoke:
        found = stage_of(name, options)()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    else:
        command = [sys.executable, __file__, "--stage", name, "--folder", options.folder, "--bits", options.bits]
        command += ["--preset", options.preset, *(["--layers", options.layers] if options.layers else [])]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"stage {name} failed")
        found, peak = json.loads(output), usage.ru_maxrss
    found |= {"seconds": time.perf_counter() - started, "peak_rss": 1024 * peak}
    LOG.print(f"{name}: {found['seconds']:.0f} s, at most {found['peak_rss'] / 1e9:.2f} GB resident")
    return found


def stage_of(name: str, options: Any) -> Callable[[], dict[str, Any]]:
    """The work of a stage."""
    return {
        "make": lambda: make(options.folder, geometry(options.preset, options.layers, smoke=options.smoke)),
        "quantise": lambda: quantise(options.folder, options.bits),
        "measure": lambda: measure(options.folder, options.bits, smoke=options.smoke),
        "generate": lambda: generate(options.folder, options.bits),
    }[name]


def check_disk(folder: Path, config: ModelConfig, bits: int) -> None:
    """End where the disk cannot hold the model in bfloat16 and quantised."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    needed = weight_bytes(config, torch.bfloat16) + packed_bytes(config, torch.bfloat16, bits)
    if needed > free:
        sys.exit(
            f"{folder} has {free / 1e9:.0f} GB free; {config.num_layers} layers need {needed / 1e9:.0f} GB: fewer --layers"
        )


def run_stages(options: Any) -> dict[str, Any]:
    """All stages, and what they wrote removed again."""
    folder, packed = options.folder, options.folder / f"int{options.bits}"
    config = geometry(options.preset, options.layers, smoke=options.smoke)
    found: dict[str, Any] = {"machine": machine(), "preset": options.preset, "layers": config.num_layers}
    try:
        if not (packed / "config.json").exists():
            if not (folder / "bfloat16" / "config.json").exists():
                check_disk(folder, config, options.bits)
                found["make"] = run_stage("make", options)
            found["bfloat16_bytes"] = _folder_bytes(folder / "bfloat16")
            found["quantise"] = run_stage("quantise", options)
        if not options.keep:
            shutil.rmtree(folder / "bfloat16", ignore_errors=True)
        found["packed_bytes"] = _folder_bytes(packed)
        found["measure"] = run_stage("measure", options)
    finally:
        if not options.keep:
            for each in (folder / "bfloat16", packed):
                shutil.rmtree(each, ignore_errors=True)
            with suppress(OSError):  # it holds something else
                folder.rmdir()
    return found


def figures_of(found: dict[str, Any], *, is_whole: bool) -> dict[str, Figure]:
    """Figures by name; targets are those of the whole model."""
    measured = found["measure"]

    def most(value: float, target: float | None = None) -> Figure:
        return figure(value, target if is_whole else None, higher_is_better=False)

    figures = {
        "packed GB": most(found["packed_bytes"] / 1e9),
        "open s": most(measured["open_seconds"], 2.0),
        "RSS after opening GB": most(measured["open_rss"] / 1e9),
        "peak RSS of decoding GB": most(measured["peak_rss"] / 1e9, 11.0),
        "first forward s": most(measured["cold_seconds"]),
        "all read s": most(measured["mapped_seconds"]),
    }
    for stage in ("make", "quantise"):
        if stage in found:
            figures[f"{stage} s"] = most(found[stage]["seconds"])
            figures[f"peak RSS of {stage} GB"] = most(found[stage]["peak_rss"] / 1e9, 2.0 if stage == "quantise" else None)
    for name, forwards in (("", measured["forwards"]), (" with block routing", measured["limited"])):
        for each in forwards:
            floor = max(each["read_floor"], each["compute_floor"])
            figures[f"{each['rows']} rows{name} s"] = most(each["seconds"])
            figures[f"{each['rows']} rows{name} / floor"] = most(each["seconds"] / floor, 1.5)
            figures[f"{each['rows']} rows{name} experts"] = most(each["touched"])
        figures[f"tokens/s of blocks{name}"] = figure(TOKENS_PER_FORWARD / forwards[-1]["seconds"])
    figures["tokens/s of autoregressive decoding"] = figure(1 / measured["forwards"][0]["seconds"])
    return figures


def show(found: dict[str, Any], figures: dict[str, Figure]) -> None:
    """Tables of what was found."""
    table = Table(
        "", "value", "target", "", title=f"{found['preset']}'s geometry, {found['layers']} layers", title_justify="left"
    )
    for name, each in figures.items():
        if " rows" not in name:
            target = "" if each["target"] is None else f"{each['target']:g}"
            verdict = "" if each["met"] is None else "met" if each["met"] else "MISSED"
            table.add_row(name, f"{each['value']:.3g}", target, verdict)
    LOG.print(table)
    columns = (
        "rows",
        "experts of a block",
        "used in a layer",
        "GB read",
        "s",
        "read floor",
        "compute floor",
        "s / floor (1.5)",
    )
    table = Table(*columns)
    for limit, forwards in (("any", found["measure"]["forwards"]), ("limited", found["measure"]["limited"])):
        for each in forwards:
            seconds, read, compute = each["seconds"], each["read_floor"], each["compute_floor"]
            table.add_row(
                str(each["rows"]), limit, f"{each['touched']:.1f}", f"{each['bytes'] / 1e9:.2f}",
                *(f"{value:.3f}" for value in (seconds, read, compute)), f"{seconds / max(read, compute):.2f}",
            )  # fmt: skip
    LOG.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--preset", choices=("llada2-mini", "llada2-flash"), default="llada2-mini", help="16 or 100 billion")
    parser.add_argument(
        "--layers", type=int, help="fewer than all 20 or 32, where the disk is short: 1.6 or 6.4 GB of bfloat16 each"
    )
    parser.add_argument("--bits", type=int, choices=(8, 4), default=4)
    parser.add_argument("--folder", type=Path, default=Path("out/mini16b"), help="where models are written")
    parser.add_argument("--keep", action="store_true", help="remove nothing")
    parser.add_argument("--json", action="store_true", help="print the figures as one object")
    parser.add_argument("--stage", choices=("make", "quantise", "measure", "generate"), help="that one alone, in this process")
    options = parser.parse_args(argv)
    if options.stage:
        print(json.dumps(stage_of(options.stage, options)()))
        return
    if options.smoke:
        options.folder = options.results / "mini16b"
    found = run_stages(options)
    figures = figures_of(found, is_whole=not options.smoke and options.layers is None and options.preset == "llada2-mini")
    write_results(results_path(options.results, "mini16b"), {"figures": figures, **found})
    show(found, figures)
    if options.json:
        print_json(figures)


if __name__ == "__main__":
    main()
