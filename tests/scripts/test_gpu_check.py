"""The checks that need a GPU, dry: their parts on a CPU, and as a whole when slow. Figures mean nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import gpu_check
import pytest
from gpu_check import DIFFERENCES, DRY, FULL, SECTIONS, check_engine, check_fsdp, check_memory, check_training
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

ROOT = Path(__file__).parents[2]


def test_fsdp_on_one_rank_changes_no_gradient() -> None:
    figures = check_fsdp(DRY)
    # It holds meshes, whose groups are gone.
    _clear_sharding_prop_cache()
    assert len(figures) == 2 * len(DIFFERENCES)
    assert all(each["met"] for each in figures.values())


def test_decoding_is_timed() -> None:
    figures = check_engine(DRY)
    assert {"engine_1_tokens_per_second", "engine_8_tokens_per_second", "engine_32_tokens_per_second"} < figures.keys()
    assert all(each["value"] > 0 for each in figures.values())


def test_training_and_its_memory_are_measured() -> None:
    figures = check_training(DRY) | check_memory(DRY)
    assert figures["flex_loss_falls_by"]["met"]
    assert figures["memory_recomputed_planned_gib"]["value"] < figures["memory_kept_planned_gib"]["value"]


def test_it_is_short_enough_and_the_model_large_enough() -> None:
    assert sum(seconds for _, seconds in SECTIONS.values()) < 8 * 60
    assert FULL.batch_rows % FULL.micro_rows == 0


def test_a_failing_section_does_not_keep_the_next_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], *, stdout: TextIO, timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
        if "fsdp" in command:
            stdout.write("Traceback\nRuntimeError: no NCCL\n")
        elif "memory" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        else:
            Path(command[command.index("--figures") + 1]).write_text('{"speed": {"value": 2.0, "target": 1.0, "met": true}}')
        return subprocess.CompletedProcess(command, int("fsdp" in command))

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setenv("OUT", str(tmp_path))
    with pytest.raises(SystemExit, match="1"):
        gpu_check.main(["--dry-run", "--sections", "fsdp,memory,engine"])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "gpu_check.json").read_text())
    errors = {name: section["error"] for name, section in report["sections"].items()}
    assert errors == {"fsdp": "exit code 1: RuntimeError: no NCCL", "memory": "took longer than 120 s", "engine": None}
    assert report["figures"]["speed"]["met"]


@pytest.mark.slow
def test_the_whole_script_runs_dry(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--dry-run"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    report = json.loads(done.stdout)
    assert {name: section["error"] for name, section in report["sections"].items()} == dict.fromkeys(SECTIONS)
    assert {"flex_step_seconds", "memory_kept_error", "gpu_tests_passed"} < report["figures"].keys()
