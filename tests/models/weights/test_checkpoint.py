"""Folders of safetensors: strict reading, bit-identical round trips, and writes that survive a crash at any moment."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tiny import FAMILIES, tiny_model
from unmask.errors import CheckpointError, ConfigError
from unmask.files import disk_errors
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer, resize_vocabulary
from unmask.models.weights import safetensors_io
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import iter_tensors, tensor_index

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = 4000  # bytes a shard: many shards for the tiny models
FEW = 25_000  # a few of them


def same_weights(a: Transformer, b: Transformer) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


def loads_as(folder: Path, *models: Transformer) -> list[bool]:
    found = load_model(folder, dtype=torch.float32)
    return [same_weights(found, model) for model in models]


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


def test_shards_keep_their_limit_and_the_index_their_total(tmp_path: Path) -> None:
    save_model(tiny_model("llada2"), tmp_path, max_shard_bytes=SMALL)
    index = read_json(tmp_path / INDEX)
    sizes = {}
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        sizes[path.name] = sum(t.numel() * t.element_size() for t in tensors.values())
        assert sizes[path.name] <= SMALL or len(tensors) == 1
        assert {name for name, file in index["weight_map"].items() if file == path.name} == tensors.keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    count = len(sizes)
    assert sorted(sizes) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def test_the_safetensors_library_reads_mixed_dtypes_of_odd_length(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5), "c": torch.randn(2, 2).double(), "d": torch.zeros(0)}
    specs = {name: safetensors_io.TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    with (tmp_path / "f.safetensors").open("wb") as file:
        safetensors_io.write_safetensors(file, specs, list(specs), lambda name: tensors[name])
    back = load_file(tmp_path / "f.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_extra_files_are_copied_but_never_replace_the_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("tokens")
    (tmp_path / "config.json").write_text("not this")
    save_model(tiny_model("llama"), tmp_path / "m", extra_files=[tmp_path / "tokenizer.json", tmp_path / "config.json"])
    assert (tmp_path / "m" / "tokenizer.json").read_text() == "tokens"
    assert read_model_config(tmp_path / "m").family == "llama"
    with pytest.raises(CheckpointError, match=r"cannot read .*absent.json to copy it"):
        save_model(tiny_model("llama"), tmp_path / "n", extra_files=[tmp_path / "absent.json"])


def test_streaming_gives_every_tensor_once(tmp_path: Path) -> None:
    save_model(tiny_model("qwen3"), tmp_path, max_shard_bytes=SMALL)
    expected = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    streamed = list(iter_tensors(tmp_path))
    assert len(streamed) == len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in streamed)
    assert [name for name, _ in iter_tensors(tmp_path, only={"model.norm.weight"})] == ["model.norm.weight"]


# --- strictness ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path, dtype=torch.float32)
    message = str(caught.value)
    for part in (
        "missing: model.layers.0.self_attn.k_proj.weight",
        "missing: model.norm.weight",
        "unexpected: model.layers.9.mlp.up_proj.weight",
        "unexpected: model.layers.1.self_attn.q_proj.bias",
        "wrong shape: model.layers.1.mlp.down_proj.weight is [48, 32], must be [32, 48]",
        "wrong dtype: model.layers.0.input_layernorm.weight is I8",
    ):
        assert part in message
    assert "\n" not in message


def test_rotary_tables_and_a_tied_head_are_skipped(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    assert model.config.tied_head
    save_model(model, tmp_path)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(3)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit(tmp_path, add)
    assert loads_as(tmp_path, model) == [True]


def test_an_untied_head_is_required(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)
    edit(tmp_path, lambda tensors: tensors.__delitem__("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("keep", [0, 5, 200, -1], ids=["empty", "in the length", "in the header", "one byte short"])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path, max_shard_bytes=SMALL)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{victim.name} is not a complete safetensors file"):
        load_model(tmp_path, dtype=torch.float32)


def test_a_garbage_header_is_named(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * (path.stat().st_size - 8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        tensor_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: {"weight_map": {**i["weight_map"], "x": "gone.safetensors"}}, "names gone.safetensors, which does not"),
        (lambda i: {"weight_map": {**i["weight_map"], "x": i["weight_map"]["lm_head.weight"]}}, "lacks: x"),
        (lambda i: {"weight_map": {"x": "../model.safetensors"}}, "must lie in the same folder"),
        (lambda i: {"weight_map": ["x"]}, "no valid 'weight_map'"),
        (lambda i: [], "holds a list, not a JSON object"),
    ],
    ids=["absent shard", "absent tensor", "outside", "no map", "no object"],
)
def test_a_wrong_index_is_named(change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path, max_shard_bytes=SMALL)
    (tmp_path / INDEX).write_text(json.dumps(change(read_json(tmp_path / INDEX))))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[]", "holds a list"),
        (b"{}", "config.json: model_type is None"),
        (b'{"model_type": "llama"}', "config.json: config.json lacks 'hidden_size'"),
        (None, "config.json does not exist"),
    ],
)
def test_a_garbage_config_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)
    (tmp_path / "config.json").unlink()
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, dtype=torch.float32)


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors and no"):
        load_model(tmp_path, dtype=torch.float32)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin but no safetensors"):
        load_model(tmp_path, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="is not a folder"):
        tensor_index(tmp_path / "nowhere")


# --- atomicity ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the process ending right here."""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("old_bytes", [10**9, FEW], ids=["old single", "old sharded"])
@pytest.mark.parametrize("new_bytes", [10**9, FEW], ids=["new single", "new sharded"])
def test_a_full_disk_at_any_file_leaves_the_old_checkpoint(
    old_bytes: int, new_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    old, new = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    save_model(old, folder, max_shard_bytes=old_bytes)
    before = snapshot(folder)
    save_model(new, tmp_path / "new", max_shard_bytes=new_bytes)
    num_files = len(list((tmp_path / "new").iterdir()))
    real = safetensors_io.write_synced
    left = 0

    def failing(path: Path, writer: Callable[..., None]) -> None:
        nonlocal left
        real(path, writer)
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1

    monkeypatch.setattr(safetensors_io, "write_synced", failing)
    for number in range(num_files):
        left = number
        with pytest.raises(CheckpointError, match=f"^no space left while writing {folder};"):
            save_model(new, folder, max_shard_bytes=new_bytes)
        assert snapshot(folder) == before
    left = num_files
    save_model(new, folder, max_shard_bytes=new_bytes)
    assert loads_as(folder, new) == [True]


@pytest.mark.parametrize("old_bytes", [10**9, FEW], ids=["old single", "old sharded"])
@pytest.mark.parametrize("new_bytes", [10**9, FEW], ids=["new single", "new sharded"])
def test_a_kill_at_any_rename_leaves_all_old_or_all_new(
    old_bytes: int, new_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tiny_model("qwen3", seed=0), tiny_model("qwen3", seed=1)
    real_replace, real_unlink, calls = os.replace, Path.unlink, 0
    outcomes = []

    def counted(action: Callable[..., None]) -> Callable[..., None]:
        def act(*args: Any, **kwargs: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > allowed:
                raise Killed
            action(*args, **kwargs)

        return act

    for allowed in range(80):
        folder = tmp_path / str(allowed)
        save_model(old, folder, max_shard_bytes=old_bytes)
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(real_replace))
            patch.setattr(Path, "unlink", counted(real_unlink))
            try:
                save_model(new, folder, max_shard_bytes=new_bytes)
                finished = True
            except Killed:
                finished = False
        outcomes.append(loads_as(folder, old, new))
        if finished:
            break
    assert all(sum(outcome) == 1 for outcome in outcomes)
    assert outcomes[0] == [True, False]
    assert outcomes[-1] == [False, True]
    save_model(old, folder, max_shard_bytes=old_bytes)
    assert loads_as(folder, old) == [True]


def test_replacing_removes_old_shards_and_keeps_other_files(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path, max_shard_bytes=FEW)
    (tmp_path / "model_card.safetensors").write_text("not a weight file of this checkpoint")
    (tmp_path / "notes.txt").write_text("kept")
    save_model(tiny_model("llama", seed=1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", SINGLE, "model_card.safetensors", "notes.txt",
    ]  # fmt: skip


def test_a_failed_save_of_a_new_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space left"):
        save_model(tiny_model("llama"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_disk_errors_pass_other_errors_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError


# --- vocabulary ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2"], ids=["untied", "tied"])
def test_new_tokens_start_as_the_mean(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    size = model.config.vocab_size
    resize_vocabulary(model, size + 2)
    after = model.state_dict()
    grown = {"embed.weight"} | ({"lm_head.weight"} if family == "llama" else set())
    for name, tensor in before.items():
        assert torch.equal(after[name][:size] if name in grown else after[name], tensor)
    for name in grown:
        assert after[name].shape[0] == size + 2
        torch.testing.assert_close(after[name][size:], before[name].mean(0).expand(2, -1))
    assert model.config.vocab_size == size + 2
    save_model(model, tmp_path)
    assert loads_as(tmp_path, model) == [True]
    hidden = model(torch.tensor([[size + 1]]), torch.zeros(1, 1, dtype=torch.int64), DenseAttend(None))
    assert model.head(hidden).shape == (1, 1, size + 2)
    with pytest.raises(ConfigError, match=f"vocabulary size {size} is below the model's {size + 2}"):
        resize_vocabulary(model, size)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())
