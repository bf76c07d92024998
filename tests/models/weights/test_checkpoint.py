"""Folders of models: strict loading and bit-identical round trips."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import refused
from models.weights.saved import loads_as, same_weights
from tiny import FAMILIES, tiny_model
from unmask.errors import CheckpointError, UnmaskWarning
from unmask.files import read_json
from unmask.models.arch.attention import DenseAttend
from unmask.models.weights import safetensors_io
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.export import export_model
from unmask.models.weights.loading import load_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = 4000  # bytes a shard: many shards for the tiny models
FEW = 25_000  # a few of them


@pytest.mark.parametrize("max_shard_bytes", [10**9, SMALL], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(family: str, dtype: torch.dtype, max_shard_bytes: int, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_model(model, tmp_path / "wide")
    model = load_model(tmp_path / "wide", dtype=dtype)  # rounds all but routers to dtype
    save_model(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    back = load_model(tmp_path / "m", dtype=dtype)
    assert same_weights(back, model)
    assert back.config == model.config
    assert torch.equal(back.inv_freq, model.inv_freq)
    assert (tmp_path / "m" / SINGLE).exists() == (max_shard_bytes > SMALL)
    assert read_json(tmp_path / "m" / "config.json")["torch_dtype"] == str(dtype).removeprefix("torch.")
    save_model(back, tmp_path / "m2", max_shard_bytes=max_shard_bytes)
    files = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "m2").iterdir())
    assert all((tmp_path / "m" / f).read_bytes() == (tmp_path / "m2" / f).read_bytes() for f in files)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_weights_survive_unchanged(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    save_model(model, tmp_path)
    assert loads_as(tmp_path, model) == [True]


def test_a_loaded_model_computes_and_trains(tmp_path: Path) -> None:
    model = tiny_model("llada2")
    save_model(model, tmp_path)
    back = load_model(tmp_path, dtype=torch.float32)
    tokens = torch.arange(7)[None]
    out = back(tokens, tokens, DenseAttend(None))
    assert torch.equal(out, model(tokens, tokens, DenseAttend(None)))
    back.head(out).square().mean().backward()
    assert all(parameter.grad is not None for parameter in back.parameters())
    assert not back.blocks[1].mlp.expert_bias.requires_grad


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def test_every_problem_is_named_in_one_error(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.0.self_attn.k_proj.weight"], tensors["model.norm.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
        tensors["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(32)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(48, 32)
        tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(32, dtype=torch.int8)

    edit(tmp_path, spoil)
    problems = (
        "missing: model.layers.0.self_attn.k_proj.weight",
        "missing: model.norm.weight",
        "unexpected: model.layers.9.mlp.up_proj.weight",
        "unexpected: model.layers.1.self_attn.q_proj.bias",
        "wrong shape: model.layers.1.mlp.down_proj.weight is [48, 32], must be [32, 48]",
        "wrong dtype: model.layers.0.input_layernorm.weight is I8",
    )
    with refused(CheckpointError, *problems):
        load_model(tmp_path, dtype=torch.float32)


def test_rotary_tables_and_a_copy_of_a_tied_head_are_skipped(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    assert model.config.tied_head
    save_model(model, tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit(tmp_path, add)
    assert loads_as(tmp_path, model) == [True]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_its_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_io, "_COMPARED_BYTES", 999)  # some rows at a time
    model = tiny_model(family, tied_head=False)
    save_model(model, tmp_path / "m", max_shard_bytes=FEW)
    config = read_json(tmp_path / "m" / "config.json")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.warns(UnmaskWarning, match=r"lm_head\.weight"):
        loaded = load_model(tmp_path / "m", dtype=torch.float32)
    assert same_weights(loaded, model)
    assert loaded.config == model.config
    with pytest.warns(UnmaskWarning):
        export_model(tmp_path / "m", tmp_path / "exported")
    save_model(loaded, tmp_path / "saved")
    for name in ("exported", "saved"):
        assert read_json(tmp_path / name / "config.json")["tie_word_embeddings"] is False
        assert loads_as(tmp_path / name, model) == [True]


def test_a_config_is_read_where_shards_are_missing(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_model(model, tmp_path, max_shard_bytes=FEW)
    next(tmp_path.glob("model-00001-*")).unlink()
    assert read_model_config(tmp_path) == model.config
    with refused(CheckpointError, "model-00001"):
        load_model(tmp_path, dtype=torch.float32)


def test_a_tied_head_of_another_shape_is_named(tmp_path: Path) -> None:
    save_model(tiny_model("qwen2"), tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3)}))
    with pytest.warns(UnmaskWarning), refused(CheckpointError, "lm_head.weight", [3]):
        load_model(tmp_path, dtype=torch.float32)


def test_an_untied_head_is_required(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)
    edit(tmp_path, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with refused(CheckpointError, "missing", "lm_head.weight", "tie_word_embeddings"):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"{", ("config.json", "JSON")),
        (b"\xff\xfe\x00", ("config.json", "JSON")),
        (b"[]", ("config.json", "list")),
        (b"{}", ("config.json", "model_type", None)),
        (b'{"model_type": "llama"}', ("config.json", "'hidden_size'")),
        (None, ("config.json",)),
    ],
)
def test_a_garbage_config_is_named(content: bytes | None, names: tuple[object, ...], tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with refused(CheckpointError, *names):
        load_model(tmp_path, dtype=torch.float32)
