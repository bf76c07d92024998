"""Metrics of a run: the history survives a disk that is full."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from unmask.errors import CheckpointError
from unmask.train.metrics import MetricLog, read_metrics


def test_a_resume_on_a_full_disk_keeps_the_history(tmp_path: Path) -> None:
    with MetricLog(tmp_path, from_step=0) as log:
        for step in range(1, 20):
            log.write({"kind": "train", "step": step, "loss": 1.0})
    history = read_metrics(tmp_path / "metrics.jsonl")
    assert len(history) == 19
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError):
            MetricLog(tmp_path, from_step=19)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_metrics(tmp_path / "metrics.jsonl") == history
