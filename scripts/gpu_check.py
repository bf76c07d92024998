"""Checks on one GPU: tests, FSDP2, a training step's MFU, memory against the plan, and decoding; run by gpu_check.sh.

Prints one JSON object: `figures` (value, target, met), and for each section its seconds and what went wrong. A section that
fails, or takes too long, does not keep the next from running: each is a process of its own, and imports what it alone needs.
With $OUT set, the object and what the sections printed are left there. `--dry-run`: the smallest sizes, without a GPU if there
is none; figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from common import Figure, figure
from torch import Tensor, nn

from unmask.data.packing import PackedRows
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer
from unmask.train.forward import AttentionBackend
from unmask.train.fuse import fuse
from unmask.train.loop import accumulate
from unmask.train.objectives.base import Objective, Setting
from unmask.train.optim import MasterAdamW
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.world import World
from unmask.train.plan.gpus import GIB
from unmask.train.plan.memory import stage_memory, stages
from unmask.train.plan.work import row_works
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.speed import Utilisation, gpu_of, peak_memory

Figures = dict[str, Figure]
ROOT = Path(__file__).parent.parent
MFU, MEMORY_ERROR, BATCHING = 0.45, 0.10, 8.0
DIFFERENCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SEQUENCES = (1, 8, 32)
BLOCK_SIZE = 32
RATE = 1e-4


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        config: of the model, a dense one that denoises.
        row_length: tokens.
        micro_rows, batch_rows: of a forward pass, and of a step.
        steps: that are timed.
        prompt, new_tokens: of each sequence that is decoded.
    """

    config: ModelConfig
    row_length: int
    micro_rows: int
    batch_rows: int
    steps: int
    prompt: int
    new_tokens: int

    @cached_property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def attention(self) -> AttentionBackend:
        """FlexAttention, which computes no gradient on a CPU."""
        return "flex" if self.device.type == "cuda" else "blocked"

    @cached_property
    def recipe(self) -> Recipe:
        """Denoising, every row one document."""
        values: dict[str, Any] = {
            "model": "random",
            "decode_block_size": BLOCK_SIZE,
            "data": {"row_length": self.row_length, "sources": [{"kind": "jsonl", "path": "none"}]},
            "objective": {"kind": "denoise", "complementary": False, "mask_noise_steps": 0},
            "train": {"tokens": 1_000_000, "batch_rows": self.batch_rows, "micro_rows": self.micro_rows},
        }
        return parse_recipe(values, "of the GPU check")

    def model(self, dtype: torch.dtype, *, recompute: bool = False) -> Transformer:
        """A random model, the same each time."""
        torch.manual_seed(0)
        with self.device:
            model = Transformer(self.config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        model.activation_checkpointing = recompute
        return model.to(dtype).train()

    def rows(self, count: int) -> PackedRows:
        """Random rows, the same each time."""
        assert self.config.mask_id is not None
        generator, shape = torch.Generator().manual_seed(1), (count, self.row_length)
        tokens_RL = torch.randint(0, self.config.mask_id, shape, generator=generator)
        ones_RL, position_RL = torch.ones(shape, dtype=torch.int64), torch.arange(self.row_length).expand(shape)
        ordinal_RL = torch.arange(count)[:, None].expand(shape)
        return PackedRows(tokens_RL, ones_RL, position_RL, ones_RL > 0, ones_RL - 1, ordinal_RL)

    def objective(self, model: Transformer, backend: AttentionBackend, world: World) -> Objective:
        """What is minimised."""
        setting = Setting(model, self.recipe.train, backend, mask_id=self.config.mask_id, world=world)
        return self.recipe.objective.build(setting)

    def loss(self, objective: Objective, rows: PackedRows) -> float:
        """The loss of a batch, whose gradients are added."""
        return float(accumulate(objective, rows, self.recipe.blocks.phases[0], 0)["loss"])


_HALF_BILLION = ModelConfig(
    family="llama",
    vocab_size=32_768,
    hidden_size=1536,
    num_layers=16,
    num_heads=12,
    num_kv_heads=4,
    head_dim=128,
    ffn_size=4096,
    max_positions=4096,
    tied_head=True,
    mask_id=32_767,
    block_size=BLOCK_SIZE,
)
_TINY = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    ffn_size=64,
    max_positions=256,
    tied_head=True,
    mask_id=63,
    block_size=BLOCK_SIZE,
)
FULL = Sizes(_HALF_BILLION, row_length=4096, micro_rows=2, batch_rows=8, steps=5, prompt=256, new_tokens=128)
DRY = Sizes(_TINY, row_length=64, micro_rows=1, batch_rows=2, steps=1, prompt=5, new_tokens=32)


def check_tests(sizes: Sizes) -> Figures:
    """The tests that need a GPU; on a dry run they are skipped, or run."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
        done = subprocess.run(command, cwd=ROOT, check=False, stdout=sys.stderr)
        if not report.exists():
            raise SystemExit(f"pytest ended with exit code {done.returncode}")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {"gpu_tests_passed": figure(passed, max(counts["tests"], 1))}


def check_fsdp(sizes: Sizes) -> Figures:
    """FSDP2 on one rank: loss and gradients of a step against those without it."""
    from unmask.train.parallel.fsdp import apply_fsdp

    figures: Figures = {}
    rows = sizes.rows(2 * sizes.micro_rows)
    with one_rank(sizes.device) as world:
        for dtype, target in DIFFERENCES.items():
            plain = sizes.model(torch.float32)
            sharded, computed = deepcopy(plain), plain.to(dtype)
            optimizer = MasterAdamW(computed.named_parameters(), betas=(0.9, 0.95), weight_decay=0.0)
            loss = sizes.loss(sizes.objective(computed, "blocked", World.single()), rows)
            optimizer.clip(float("inf"))
            apply_fsdp(sharded, world, dtype)
            sharded_loss = sizes.loss(sizes.objective(sharded, "blocked", world), rows)
            found = [world.full(_gradient(parameter)) for parameter in sharded.parameters()]
            expected = [_gradient(parameter) for parameter in optimizer.parameters]
            name = str(dtype).removeprefix("torch.")
            figures[f"fsdp_{name}_gradients"] = figure(_difference(found, expected), target, higher_is_better=False)
            figures[f"fsdp_{name}_loss"] = figure(abs(sharded_loss / loss - 1), target, higher_is_better=False)
    return figures


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Norm of the difference, in norms of what is expected."""
    assert len(found) == len(expected)
    squares = sum(float((one.float() - other.float()).square().sum()) for one, other in zip(found, expected, strict=True))
    return float((squares / sum(float(other.float().square().sum()) for other in expected)) ** 0.5)


@contextmanager
def one_rank(device: torch.device) -> Iterator[World]:
    """A world of one rank, with process groups."""
    from unmask.train.parallel.ranks import Ranks

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield Ranks(ParallelDims(), device.type)
    finally:
        dist.destroy_process_group()


class Step:
    """A training step as `unmask convert` takes it in one process."""

    def __init__(self, sizes: Sizes, *, recompute: bool = False) -> None:
        self._sizes, model = sizes, sizes.model(torch.bfloat16, recompute=recompute)
        if sizes.device.type == "cuda":
            fuse(model)
        self._optimizer = MasterAdamW(model.named_parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        self._objective = sizes.objective(model, sizes.attention, World.single())

    def __call__(self, rows: PackedRows) -> float:
        """Train on these rows; returns the loss before."""
        loss = self._sizes.loss(self._objective, rows)
        self._optimizer.clip(1.0)
        self._optimizer.step(RATE)
        return loss


def check_training(sizes: Sizes) -> Figures:
    """Training steps with FlexAttention: MFU, tokens/s, peak memory."""
    step, rows = Step(sizes), sizes.rows(sizes.batch_rows)
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(2 + sizes.steps):
        started = time.perf_counter()
        losses.append(step(rows))
        _wait(sizes.device)
        seconds.append(time.perf_counter() - started)
    typical = statistics.median(seconds[2:])
    utilisation = Utilisation.of_run(sizes.recipe, sizes.config, gpu_of(sizes.device), 1)
    figures = {} if utilisation is None else {"flex_mfu": figure(utilisation.mfu(0, typical), MFU)}
    return figures | {
        "flex_tokens_per_second": figure(rows.num_tokens / typical),
        "flex_step_seconds": figure(typical),
        "flex_first_step_seconds": figure(seconds[0]),
        "flex_memory_gib": figure(peak_memory() / GIB),
        "flex_loss_falls_by": figure(losses[0] - losses[-1], 0.0),
    }


def check_memory(sizes: Sizes) -> Figures:
    """Peak memory of a step against `unmask plan`'s, activations kept and computed again."""
    figures: Figures = {}
    (row,), (stage,) = row_works(sizes.recipe), stages(sizes.config, ParallelDims())
    micro_batches = sizes.batch_rows // sizes.micro_rows
    for name, recompute in (("kept", False), ("recomputed", True)):
        peak = _peak_of_step(sizes, recompute=recompute)
        memory = stage_memory(
            sizes.config, row, ParallelDims(), stage,
            micro_rows=sizes.micro_rows, micro_batches=micro_batches, recompute=recompute,
        )  # fmt: skip
        predicted = memory.total
        figures[f"memory_{name}_gib"] = figure(peak / GIB)
        figures[f"memory_{name}_planned_gib"] = figure(predicted / GIB)
        figures[f"memory_{name}_error"] = figure(abs(predicted / peak - 1), MEMORY_ERROR, higher_is_better=False)
    return figures


def _peak_of_step(sizes: Sizes, *, recompute: bool) -> int:
    """Bytes at the peak of the second step: the first compiles, and makes the optimiser's state."""
    gc.collect()  # the model before
    step, rows = Step(sizes, recompute=recompute), sizes.rows(sizes.batch_rows)
    for _ in range(2):
        if sizes.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step(rows)
    return peak_memory()


def check_engine(sizes: Sizes) -> Figures:
    """Decoding by the torch backend: tokens/s of some sequences at once, 8 steps for a block."""
    from unmask.engine.engine import Engine
    from unmask.engine.request import Request
    from unmask.engine.sampling_params import ResolvedParams

    dtype = torch.bfloat16 if sizes.device.type == "cuda" else torch.float32
    params = ResolvedParams(block_size=BLOCK_SIZE, steps=8, threshold=1.0, max_new_tokens=sizes.new_tokens)
    tokens = sizes.rows(max(SEQUENCES)).tokens_RL[:, : sizes.prompt].tolist()
    room = max(SEQUENCES) * (sizes.prompt + sizes.new_tokens + BLOCK_SIZE)
    model, rates = sizes.model(dtype).eval(), {}
    for count in SEQUENCES:
        requests = [Request(tuple(ids), params) for ids in tokens[:count]]
        for _ in range(2):  # once to warm up
            engine = Engine(model, num_tokens=room, max_num_seqs=count, max_num_batched_tokens=4096)
            _wait(sizes.device)
            started = time.perf_counter()
            completions = engine.run(requests)
            _wait(sizes.device)
            rates[count] = sum(len(each.ids) for each in completions) / (time.perf_counter() - started)
    figures = {f"engine_{count}_tokens_per_second": figure(rate) for count, rate in rates.items()}
    return figures | {"engine_batching": figure(rates[max(SEQUENCES)] / rates[1], BATCHING)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


SECTIONS: Mapping[str, tuple[Callable[[Sizes], Figures], int]] = {
    "tests": (check_tests, 80),
    "fsdp": (check_fsdp, 60),
    "training": (check_training, 120),
    "memory": (check_memory, 120),
    "engine": (check_engine, 80),
}
"""What each section does, and the seconds that it may take: 460 in all."""


def run_section(name: str, *, dry_run: bool, logs: Path) -> dict[str, Any]:
    """Run a section in a process of its own: its figures, its seconds, and its error or None."""
    log, figures = logs / f"{name}.log", logs / f"{name}.json"
    command = [sys.executable, __file__, "--section", name, "--figures", str(figures), *(["--dry-run"] if dry_run else [])]
    started = time.perf_counter()
    with log.open("w") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=SECTIONS[name][1], check=False)
            error = f"exit code {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired as late:
            error = f"took longer than {late.timeout:g} s"
    if error is not None:
        text = log.read_text()
        print(f"{name}:\n{text[-3000:]}", file=sys.stderr)
        error = f"{error}: {text.strip().splitlines()[-1]}" if text.strip() else error
    found = json.loads(figures.read_text()) if error is None else {}
    return {"figures": found, "seconds": round(time.perf_counter() - started, 1), "error": error}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="the smallest sizes; without a GPU if there is none")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them [default: %(default)s]")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--figures", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device; without one there is only --dry-run")
    if options.section is not None:
        figures = SECTIONS[options.section][0](DRY if options.dry_run else FULL)
        options.figures.write_text(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(os.environ.get("OUT") or folder)
        results = {name: run_section(name, dry_run=options.dry_run, logs=logs) for name in options.sections.split(",")}
        report = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "torch": torch.__version__,
            "figures": {name: each for result in results.values() for name, each in result.pop("figures").items()},
            "sections": results,
        }
        (logs / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    if any(result["error"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
