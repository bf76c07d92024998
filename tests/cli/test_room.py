"""A model that does not fit into memory: one line from every command that would load it, and what `info` says of it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import limit_memory, make_tokenizer
from sparse import sparse_checkpoint
from unmask.models.families.registry import published_config

LARGE = {"generate": ("Hello",), "infill": ("a ___ b",), "trace": ("Hello", "--out", "trace.json"), "chat": ()}


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As large as LLaDA2.0-mini, 16 billion parameters without content, in a sixteenth of its tensors."""
    config = published_config("llada2-mini")
    config |= {"num_experts": 16, "moe_intermediate_size": 16 * config["moe_intermediate_size"]}
    folder = sparse_checkpoint(tmp_path_factory.mktemp("large") / "mini", config)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole_mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaDA2.0-mini without content: 16 billion parameters in 14,813 tensors, 30 GiB of holes."""
    folder = sparse_checkpoint(tmp_path_factory.mktemp("whole") / "mini", published_config("llada2-mini"))
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("verb", LARGE)
def test_commands_refuse_in_one_line(verb: str, fails, mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 6 * 10**9)
    names = (str(mini), "6.0 GB of free memory", "unmask quantize")
    fails(verb, *LARGE[verb], "--model", mini, "--device", "cpu", names=names)


def test_training_refuses_in_one_line(
    fails, mini: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_memory(monkeypatch, 24 * 10**9)
    fails("sft", "--model", mini, "--data", answers, "--out", tmp_path / "out", names=("training", "gradients", "24.0 GB"))


def test_info_says_what_fits(run, mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.cli.info.pick_device", lambda device: "cpu")
    limit_memory(monkeypatch, 40 * 10**9)
    auto = json.loads(run("info", mini, "--json").stdout)["auto"]
    assert (auto["available_bytes"], auto["fits"]) == (40 * 10**9, ["dtype bfloat16", "quantize int8", "quantize int4"])
    assert "40.0 GB on cpu: --dtype bfloat16" in run("info", mini).stdout
    limit_memory(monkeypatch, 10**9)
    assert "nothing fits: --quantize int4 needs" in run("info", mini).stdout


def test_a_cache_that_does_not_fit_names_the_flag(fails, diffusion_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.models.weights.loading.check_weights", lambda *arguments: None)
    for check in ("check_loading", "check_packing", "check_mapped"):
        monkeypatch.setattr(f"unmask.engine.room.DecodingRoom.{check}", lambda *arguments, **options: None)
    limit_memory(monkeypatch, 2**27 + 10**4)
    options = ("--quantize", "none", "--max-new-tokens", 64)
    fails("generate", "Hello", "-m", diffusion_folder, *options, names=("KV cache", "--cache-tokens", "--max-new-tokens"))


@pytest.mark.slow
def test_a_whole_process_takes_seconds_and_little_memory(whole_mini: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, 24 * 2**30))

    command = [sys.executable, "-m", "unmask", "generate", "Hello", "--model", str(whole_mini), "--device", "cpu"]
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert time.monotonic() - started < 20
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak < 600 * 1024 or peak == before
