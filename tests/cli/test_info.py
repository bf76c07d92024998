"""`unmask info`: figures checked by hand, from a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unmask.cli.info import describe
from unmask.models.families.registry import PUBLISHED, published_config, read_config
from unmask.models.native.sizes import packed_bytes
from unmask.models.weights.loading import load_model


def test_facts_of_a_folder(run, diffusion_folder: Path) -> None:
    import torch

    facts = json.loads(run("info", diffusion_folder, "--json").stdout)
    weights = load_model(diffusion_folder, dtype=torch.float32)
    count = sum(parameter.numel() for parameter in weights.parameters())
    assert (facts["parameters"], facts["active_parameters"]) == (count, count)
    packed = {f"int{bits}": packed_bytes(weights.config, torch.float32, bits) for bits in (8, 4)}
    assert facts["memory_bytes"] == {"float32": 4 * count, "bfloat16": 2 * count, **packed}
    assert (facts["architecture"], facts["kind"], facts["block_size"]) == ("llama", "diffusion", 8)
    assert (facts["layers"], facts["heads"], facts["kv_heads"], facts["head_dim"]) == (2, 4, 2, 8)
    assert facts["kv_cache_bytes_per_token"] == 2 * 2 * (2 * 2 * 8)
    assert facts["mask_id"] == weights.config.mask_id
    assert facts["context"] == 256
    assert facts["weights_on_disk"]["missing"] == 0
    assert facts["weights_on_disk"]["num_bytes"] == (diffusion_folder / "model.safetensors").stat().st_size


def test_words_for_people(run, ar_folder: Path, diffusion_folder: Path) -> None:
    lines = dict(line.split(maxsplit=1) for line in run("info", ar_folder).stdout.splitlines())
    assert lines["architecture"] == "llama, autoregressive"
    assert lines["mask"] == "token       none: an autoregressive model"
    lines = dict(line.split(maxsplit=1) for line in run("info", diffusion_folder).stdout.splitlines())
    assert lines["architecture"] == "llama, diffusion"
    assert lines["block"] == "size       8 tokens"


def test_what_decodes_by_default_is_told(run, diffusion_folder: Path) -> None:
    auto = json.loads(run("info", diffusion_folder, "--json").stdout)["auto"]
    assert auto["quantize"] == ("none" if auto["kernels"] is None or auto["device"] != "cpu" else "int8")
    assert f"CPU kernels: {auto['kernels'] or 'not built'}" in run("info", diffusion_folder).stdout
    assert json.loads(run("info", "llada2-mini", "--json").stdout)["auto"]["quantize"] == auto["quantize"]


def test_config_alone_is_enough(run, own_folder: Path) -> None:
    before = json.loads(run("info", own_folder, "--json").stdout)
    for path in own_folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    after = json.loads(run("info", own_folder, "--json").stdout)
    assert after | _free(after) == before | {"weights_on_disk": None} | _free(before)


def _free(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts that do not depend on how much memory is free at the moment."""
    return {"auto": {name: value for name, value in facts["auto"].items() if name != "available_bytes"}}


def test_ignored_keys_are_listed(run, own_folder: Path) -> None:
    config = json.loads((own_folder / "config.json").read_text())
    (own_folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.0, "zeta": 1}))
    facts = json.loads(run("info", own_folder, "--json").stdout)
    assert facts["ignored_config_keys"] == ["attention_dropout", "zeta"]
    assert "attention_dropout, zeta" in run("info", own_folder).stdout


def test_missing_tensors_are_counted(run, own_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(own_folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, own_folder / "model.safetensors")
    assert "1 missing" in run("info", own_folder).stdout


@pytest.mark.parametrize(("name", "total", "active"), [("llada2-mini", 16e9, 1.4e9), ("llada2-flash", 100e9, 6.1e9)])
def test_presets_are_the_size_they_are_called(run, name: str, total: float, active: float) -> None:
    facts = json.loads(run("info", name, "--json").stdout)
    assert facts["parameters"] == pytest.approx(total, rel=0.04)
    assert facts["active_parameters"] == pytest.approx(active, rel=0.04)
    assert facts["experts"] == {"routed": 256, "active": 8, "shared": 1}


def test_active_parameters_are_told_to_people(run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(published_config("llada2-mini") | {"num_experts": 16, "num_hidden_layers": 2})
    )
    assert "active for a token" in run("info", tmp_path).stdout


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_preset_is_described(name: str) -> None:
    facts = describe(read_config(published_config(name)))
    sizes = list(facts["memory_bytes"].values())
    assert sizes == sorted(sizes, reverse=True)


def test_hub_id_fetches_the_config_only(run, own_folder: Path, monkeypatch) -> None:
    fetched = []

    def download(model: str, name: str, *, local_files_only: bool) -> str:
        fetched.append((model, name))
        return str(own_folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert run("info", "owner/name", "--json").exit_code == 0
    assert fetched == [("owner/name", "config.json")]


def test_hub_out_of_reach(fails, monkeypatch) -> None:
    def download(model: str, name: str, *, local_files_only: bool) -> str:
        raise RuntimeError("no route to host\nlong story")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    fails("info", "owner/name", names=("'owner/name'", "no route to host"))


@pytest.mark.parametrize("model", ["nope", "./nope", "/nope/nope", "a/b/c"])
def test_unknown_model(fails, model: str) -> None:
    assert "llada2-mini" in fails("info", model)


def test_no_model(fails) -> None:
    assert "''" in fails("info", "")


def test_folder_without_config(fails, tmp_path: Path) -> None:
    assert "config.json" in fails("info", tmp_path)


def test_truncated_weights(fails, own_folder: Path) -> None:
    content = (own_folder / "model.safetensors").read_bytes()
    (own_folder / "model.safetensors").write_bytes(content[:100])
    fails("info", own_folder, names=["model.safetensors"])
