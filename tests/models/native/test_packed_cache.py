"""Packed weights in files: mapped as they were packed, aligned, made again when the model, the code or the file has changed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import refused
from tiny import tiny_model
from unmask.errors import CheckpointError, UnmaskWarning
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.native import packed_cache
from unmask.models.native.packed_cache import PackedCache, packed_folder
from unmask.models.native.packed_file import map_packed, prefault, write_packed
from unmask.models.native.packing import FLOAT_BITS, PackedWeights, pack_model
from unmask.models.native.quantize import PackedMatrix
from unmask.models.weights.checkpoint import ModelParts, save_model
from unmask.models.weights.loading import load_parts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model("qwen2"), tmp_path / "model")
    return tmp_path / "model"


def cache_of(folder: Path, bits: int = 8) -> PackedCache:
    return PackedCache(folder, bits, torch.float32, least_bytes=0)


def loader(folder: Path) -> Callable[[], ModelParts]:
    return lambda: load_parts(folder, dtype=torch.float32)


def assert_same(found: PackedWeights | None, expected: PackedWeights) -> None:
    assert found is not None
    assert (found.config, found.bits, found.rope_factor, found.is_rotated) == (
        expected.config, expected.bits, expected.rope_factor, expected.is_rotated,
    )  # fmt: skip
    assert found.vectors.keys() == expected.vectors.keys()
    assert all(torch.equal(found.vectors[name], vector) for name, vector in expected.vectors.items())
    assert found.matrices.keys() == expected.matrices.keys()
    for name, matrix in expected.matrices.items():
        for part in fields(PackedMatrix):
            value, other = getattr(matrix, part.name), getattr(found.matrices[name], part.name)
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other


@pytest.mark.parametrize("bits", [8, 4, FLOAT_BITS])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "llada2"])
def test_a_mapped_file_holds_what_was_packed(tmp_path: Path, family: str, bits: int) -> None:
    weights, path = pack_model(tiny_model(family), bits), tmp_path / "packed.safetensors"
    write_packed(path, weights, {})
    assert_same(map_packed(path), weights)
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("embed"), weights.vectors["embed"])


def test_gated_lora_goes_along_and_every_tensor_starts_at_a_cache_line(tmp_path: Path) -> None:
    shape = {"mask_id": 57, "block_size": 4, "start_id": 0, "eos_ids": (1, 2)}
    weights = pack_model(add_gated_lora(tiny_model("llama", **shape), 3, seed=0), 4)
    write_packed(tmp_path / "a", weights, {})
    found = map_packed(tmp_path / "a")
    assert_same(found, weights)
    assert found is not None
    tensors = (*found.vectors.values(), *(matrix.weight for matrix in found.matrices.values()))
    assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}


def test_packing_happens_once(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert cache_of(folder).open() is None
    weights = cache_of(folder).pack(loader(folder), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert_same(cache_of(folder).open(), weights)
    assert_same(weights, pack_model(tiny_model("qwen2"), 8))
    assert cache_of(folder, 4).open() is None
    assert PackedCache(folder, 8, torch.bfloat16, least_bytes=0).open() is None
    assert cache_of(folder, FLOAT_BITS).open() is None


def test_what_has_changed_is_packed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_of(folder).pack(loader(folder))
    save_model(tiny_model("qwen2", seed=1), folder)
    assert cache_of(folder).open() is None
    weights = cache_of(folder).pack(loader(folder))
    assert_same(cache_of(folder).open(), weights)
    assert len(list(packed_folder().iterdir())) == 1
    monkeypatch.setattr(packed_cache, "_code_digest", lambda: "another")
    assert cache_of(folder).open() is None


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "gone"])
def test_a_damaged_file_is_not_mapped(folder: Path, damage: str) -> None:
    cache_of(folder).pack(loader(folder))
    path = cache_of(folder).path
    content = path.read_bytes()
    broken = {"cut": content[:-1], "header": b"\xff" * 16 + content[16:], "empty": b""}
    if damage in broken:
        path.unlink()
        path.write_bytes(broken[damage])
    else:
        path.unlink()
    assert cache_of(folder).open() is None
    assert_same(cache_of(folder).pack(loader(folder)), pack_model(tiny_model("qwen2"), 8))


def test_packed_weights_of_models_that_are_gone_are_removed(folder: Path, tmp_path: Path) -> None:
    cache_of(folder).pack(loader(folder))
    save_model(tiny_model("llama"), tmp_path / "other")
    shutil.rmtree(folder)
    cache_of(tmp_path / "other").pack(loader(tmp_path / "other"))
    assert list(packed_folder().iterdir()) == [cache_of(tmp_path / "other").path]


def test_small_models_are_not_kept(folder: Path) -> None:
    PackedCache(folder, 8, torch.float32).pack(loader(folder))
    assert not packed_folder().exists()


def test_a_cache_that_cannot_be_written_only_warns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise CheckpointError("no space left")

    monkeypatch.setattr(packed_cache, "write_packed", refuse)
    with pytest.warns(UnmaskWarning, match="no space left"):
        weights = cache_of(folder).pack(loader(folder))
    assert_same(weights, pack_model(tiny_model("qwen2"), 8))


def test_a_file_of_the_packed_weights_may_be_replaced_while_it_is_mapped(folder: Path) -> None:
    cache_of(folder).pack(loader(folder))
    mapped = cache_of(folder).open()
    os.utime(folder / "model.safetensors", ns=(1, 1))
    cache_of(folder).pack(loader(folder))
    assert_same(mapped, pack_model(tiny_model("qwen2"), 8))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_are_mapped_beforehand(tmp_path: Path) -> None:
    weights = pack_model(tiny_model("llama", hidden_size=256, ffn_size=2048), 8)
    write_packed(tmp_path / "packed", weights, {})
    mapped = map_packed(tmp_path / "packed")
    assert mapped is not None
    prefault(mapped).join()
    lines = Path("/proc/self/smaps").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith(str(tmp_path / "packed")))
    resident = next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))
    assert 1024 * resident >= sum(matrix.weight.nbytes for matrix in mapped.matrices.values())
    assert_same(mapped, weights)


def test_weights_that_are_not_finite_are_refused_by_name(folder: Path) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    with refused(CheckpointError, folder, "finite: model.layers.1.mlp.up_proj.weight;"):
        cache_of(folder).pack(loader(folder))
    assert cache_of(folder, FLOAT_BITS).pack(loader(folder)).bits == FLOAT_BITS
