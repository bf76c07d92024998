"""Room for decoding: what is checked for each kind of weights, remedies, paged weights, and the size of the KV cache."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import unmask
from helpers import limit_memory, refused
from models.weights.saved import saved_base
from tiny import tiny_config, tiny_model
from unmask.engine import room
from unmask.engine.engine import Engine
from unmask.engine.room import DecodingRoom
from unmask.errors import RoomError, UnmaskNote
from unmask.models.arch.config import ModelConfig
from unmask.models.native.sizes import packed_bytes, packing_bytes
from unmask.models.weights.room import RESERVE, kv_cache_bytes, weight_bytes

BIG = {"hidden_size": 1024, "ffn_size": 4096, "head_dim": 256, "vocab_size": 4096, "num_layers": 4, "max_positions": 4096}


def room_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> DecodingRoom:
    return DecodingRoom(config, dtype, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are taken to be there."""
    monkeypatch.setattr("unmask.models.native.library.kernel_variant", lambda: "portable")


def test_weights_as_they_are_need_room_and_some_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", **BIG)
    total = weight_bytes(config, torch.float32) + kv_cache_bytes(config, torch.float32, 2048)
    limit_memory(monkeypatch, total + RESERVE)
    room_of(config).check_loading("it")
    limit_memory(monkeypatch, total + RESERVE - 1)
    with refused(RoomError, "it needs", "KV cache of 2,048 tokens", "dtype bfloat16", "quantize int8", "quantize int4"):
        room_of(config).check_loading("it")


def test_only_what_runs_here_is_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 1)
    for variant in ("avx2", None):
        monkeypatch.setattr("unmask.models.native.library.kernel_variant", lambda variant=variant: variant)
        assert room.is_quantizable(torch.device("cpu")) == (variant is not None)
        with pytest.raises(RoomError, match=r"even .* needs") as caught:
            room_of(tiny_config("llama", **BIG)).check_loading("it")
        assert ("unmask quantize it" in str(caught.value)) == (variant is not None)


def test_quantising_needs_room_and_mapped_weights_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", **BIG)
    limit_memory(monkeypatch, packing_bytes(config, torch.float32, 4) + RESERVE)
    with refused(RoomError, "quantising to int4"):
        room_of(config).check_packing("it", "int4", whole=False)
    limit_memory(monkeypatch, packed_bytes(config, torch.float32, 4) + RESERVE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert room_of(config).check_mapped("it", "int4")
    limit_memory(monkeypatch, packed_bytes(config, torch.float32, 4) + RESERVE - 1)
    with pytest.warns(UnmaskNote, match="read from disk as they are needed"):
        assert not room_of(config).check_mapped("it", "int4")


def test_floats_that_are_packed_page_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("llama", **BIG)
    limit_memory(monkeypatch, packed_bytes(config, torch.float32, 32) + RESERVE - 1)
    with refused(RoomError, "packing weights in float32"):
        room_of(config).check_packing("it", "none", whole=False)
    with pytest.warns(UnmaskNote, match="of float32 weights"):
        room_of(config).check_mapped("it", "none")


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_load_refuses_before_a_weight_is_read(quantize: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved_base("llama", tmp_path)
    monkeypatch.setattr("unmask.engine.loading.decoding_weights", lambda *arguments: quantize)
    (folder / "model.safetensors").write_bytes(b"")
    limit_memory(monkeypatch, RESERVE)
    with refused(RoomError, str(folder), "free memory"):
        unmask.load(folder, quantize=quantize)


def test_a_cache_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    per_token = kv_cache_bytes(model.config, torch.float32, 1)
    limit_memory(monkeypatch, 100 * per_token + RESERVE)
    with refused(RoomError, "101 tokens", "at most 100 tokens (num_tokens"):
        Engine(model, num_tokens=101)
    assert Engine(model, num_tokens=100).pool.num_cache_blocks == 4


def test_the_default_cache_is_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    per_token = kv_cache_bytes(model.config, torch.float32, 1)
    whole = Engine(model).pool.num_cache_blocks
    limit_memory(monkeypatch, 64 * per_token + RESERVE)
    assert Engine(model).pool.num_cache_blocks == 2 < whole
    limit_memory(monkeypatch, 0)
    with refused(RoomError, "a KV cache of 1 tokens", "smaller model"):
        Engine(model)
