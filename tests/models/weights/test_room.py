"""Room before loading: the sums equal what loading takes, every limit counts, and what does not fit is refused untouched."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pytest
import torch

from helpers import limit_memory, refused
from models.weights.saved import saved_base
from sparse import sparse_checkpoint
from tiny import FAMILIES
from unmask.errors import RoomError
from unmask.models.families.registry import published_config, read_config
from unmask.models.weights.checkpoint import check_tensors
from unmask.models.weights.loading import load_model
from unmask.models.weights.room import Memory, available_memory, check_room, weight_bytes

GIB = 2**30


def proc_of(folder: Path, available_kib: int, *cgroups: str) -> Path:
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\nSwapFree: 88888888 kB\n")
    (folder / "self" / "cgroup").write_text("\n".join(cgroups))
    return folder


def write_files(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_take_what_is_summed_up(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded = load_model(saved_base(family, tmp_path), dtype=dtype)
    assert weight_bytes(loaded.config, dtype) == sum(tensor.nbytes for tensor in loaded.state_dict().values())


def test_the_machine_without_swap(tmp_path: Path) -> None:
    proc = proc_of(tmp_path / "proc", 4 * 2**20)
    assert available_memory("cpu", proc=proc, cgroups=tmp_path) == Memory(4 * GIB, "free memory")


def test_the_innermost_limit_of_cgroups_v2_counts(tmp_path: Path) -> None:
    proc = proc_of(tmp_path / "proc", 64 * 2**20, "0::/pods/mine")
    write_files(tmp_path / "pods", memory__max=9 * GIB, memory__current=GIB)
    write_files(tmp_path / "pods" / "mine", memory__max="max", memory__current=GIB)
    assert available_memory("cpu", proc=proc, cgroups=tmp_path) == Memory(8 * GIB, "memory under the cgroup's limit")
    stat = f"anon 5\nactive_file {GIB // 4}\ninactive_file {GIB // 4}\n"
    write_files(tmp_path / "pods" / "mine", memory__max=3 * GIB, memory__high=2 * GIB, memory__stat=stat)
    found = available_memory("cpu", proc=proc, cgroups=tmp_path)
    assert found is not None
    assert found.num_bytes == 2 * GIB - GIB + GIB // 2  # the limit that slows down counts, pages of files do not


def test_a_container_of_cgroups_v1_whose_path_is_not_mounted(tmp_path: Path) -> None:
    proc = proc_of(tmp_path / "proc", 64 * 2**20, "5:cpu:/docker/abc", "4:memory:/docker/abc", "0::/")
    stat = f"active_file 7\ntotal_active_file 0\ntotal_inactive_file {GIB}\n"
    write_files(tmp_path / "memory", memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=3 * GIB, memory__stat=stat)
    assert available_memory("cpu", proc=proc, cgroups=tmp_path) == Memory(2 * GIB, "memory under the cgroup's limit")
    write_files(tmp_path / "memory", memory__limit_in_bytes=2**63 - 4096)
    assert available_memory("cpu", proc=proc, cgroups=tmp_path) == Memory(64 * GIB, "free memory")


def test_the_limit_of_the_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc = proc_of(tmp_path / "proc", 64 * 2**20)
    (proc / "self" / "statm").write_text("1000 500 400 1 0 300 0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (6 * GIB, 6 * GIB))
    assert available_memory("cpu", proc=proc, cgroups=tmp_path) == Memory(
        6 * GIB - 1000 * resource.getpagesize(), "address space (ulimit -v)"
    )


def test_a_machine_that_says_nothing_in_proc(tmp_path: Path) -> None:
    found = available_memory("cpu", proc=tmp_path, cgroups=tmp_path)
    assert found is not None
    assert found.num_bytes > 0


def test_the_remedies_that_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 10 * GIB)
    check_room("it", {"weights": 9 * GIB}, "cpu")
    with refused(
        RoomError, "it needs 12.9 GB", "weights 11.8 GB", "cache 1.1 GB", "10.7 GB of free memory", "use half (6.4 GB)"
    ):
        check_room("it", {"weights": 11 * GIB, "cache": GIB, "nothing": 0}, "cpu", lambda: {"half": 6 * GIB, "most": 11 * GIB})
    with refused(RoomError, "even half needs 21.5 GB", "smaller model"):
        check_room("it", {"weights": 40 * GIB}, "cpu", lambda: {"half": 20 * GIB})


def test_no_weight_is_read_of_a_model_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_base("llama", tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"")  # reading it would fail
    limit_memory(monkeypatch, 2**20)
    with refused(RoomError, str(folder), "weights in float32"):
        load_model(folder, dtype=torch.float32)


def test_the_headers_of_16_billion_parameters_are_checked_in_seconds(tmp_path: Path) -> None:
    values = published_config("llada2-mini")
    folder = sparse_checkpoint(tmp_path / "mini", values)
    started = time.process_time()
    check_tensors(folder, read_config(values))
    assert time.process_time() - started < 3
