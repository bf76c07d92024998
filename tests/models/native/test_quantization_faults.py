"""Processes that quantise a model: killed at random moments, on a full disk, and how much memory they take."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from helpers import refused
from runs import tiny_folder
from sparse import sparse_checkpoint
from tiny import tiny_config, tiny_model
from unmask.errors import CheckpointError
from unmask.models.families.registry import write_config
from unmask.models.native.quantization_job import QuantizationJob
from unmask.models.native.recipe import CALIBRATED, QuantizationRecipe
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.manifest import MANIFEST

KILLS = 5


def content(folder: Path) -> dict[str, bytes]:
    """Files by name, without those of a job that was killed when all else was done."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def command(model: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "unmask", "quantize", str(model), "--out", str(out), *options]


def moments(seconds: float) -> Iterator[float | None]:
    """How long each run may take, drawn from a time that one needs, short ones first; after some runs, as long as it likes."""
    rng = random.Random(0)
    yield from sorted(rng.uniform(0, seconds) for _ in range(KILLS))
    yield from itertools.repeat(None)


def process_of(work: Callable[[], object]) -> Callable[[float | None], int | None]:
    """Runs `work` in a process of its own, killed in its time; returns its exit code."""

    def alone() -> None:
        torch.set_num_threads(1)  # OpenMP's other threads have not been forked
        work()

    def run(seconds: float | None) -> int | None:
        process = multiprocessing.get_context("fork").Process(target=alone)
        process.start()
        process.join(120 if seconds is None else seconds)
        process.kill()
        process.join()
        return process.exitcode

    return run


@pytest.mark.parametrize("recipe", [QuantizationRecipe(8), CALIBRATED])
def test_a_job_killed_at_random_moments_ends_in_the_same_files(tmp_path: Path, recipe: QuantizationRecipe) -> None:
    save_model(tiny_model("llama", num_layers=4), tmp_path / "model")
    rows = torch.randint(0, 57, (4, 16), generator=torch.Generator().manual_seed(0)) if recipe == CALIBRATED else None
    job = QuantizationJob("it", tmp_path / "model", recipe, tokens_RT=rows)
    started = time.monotonic()
    job.run(tmp_path / "made")
    run, killed = process_of(lambda: job.run(tmp_path / "out")), 0
    for seconds in moments((time.monotonic() - started) / 2):
        if (code := run(seconds)) == 0 or (tmp_path / "out" / MANIFEST).exists():
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed > 0
    assert content(tmp_path / "out") == content(tmp_path / "made")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llada2"])
@pytest.mark.parametrize("bits", ["8", "4"])
def test_the_command_killed_at_random_moments_goes_on_to_the_same_files(tmp_path: Path, family: str, bits: str) -> None:
    model = tiny_folder(tmp_path / "model", family=family, num_layers=24, hidden_size=128, ffn_size=256)
    started = time.monotonic()
    subprocess.run(command(model, tmp_path / "made", "--bits", bits), check=True)
    seconds_whole, killed = time.monotonic() - started, 0
    for seconds in moments(seconds_whole):
        process = subprocess.Popen(command(model, tmp_path / "out", "--bits", bits))
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code == 0 or (tmp_path / "out" / MANIFEST).exists():
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed > 0
    assert content(tmp_path / "out") == content(tmp_path / "made")


def peak_bytes(words: list[str]) -> int:
    """The largest resident memory of a command."""
    process = subprocess.Popen(words)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return 1024 * usage.ru_maxrss


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--bits", "8"), ("--bits", "4", "--calibrate", "none")])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Six times as many layers: 90 and 540 MB of weights."""
    peaks = []
    for layers in (4, 24):
        config = tiny_config("llama", hidden_size=1024, ffn_size=2560, num_layers=layers)
        model = sparse_checkpoint(tmp_path / str(layers), write_config(config))
        peaks.append(peak_bytes(command(model, tmp_path / f"{layers} packed", *options)))
    assert peaks[1] < peaks[0] + 100e6
    assert peaks[1] < 1e9


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_what_is_done(tmp_path: Path) -> None:
    """A real one: a file system in memory, of which another file takes the room when the job has begun."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        model = tiny_folder(tmp_path / "model", num_layers=6, hidden_size=256, ffn_size=512)
        job = QuantizationJob("it", model, QuantizationRecipe(8))
        job.run(tmp_path / "made")

        def fill(done: int, total: int) -> None:
            if not (disk / "filler").exists():
                (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 2**20))

        with refused(CheckpointError, disk / "out", "space"):
            job.run(disk / "out", fill)
        with refused(CheckpointError, disk / "out", "free"):
            job.run(disk / "out")
        (disk / "filler").unlink()
        job.run(disk / "out")
        assert content(disk / "out") == content(tmp_path / "made")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
