"""Adapters apart from their base: which files are accepted, and what is said of those that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import refused
from lora_folders import write_adapter
from tiny import FAMILIES, MASK, tiny_model
from unmask.errors import CheckpointError
from unmask.models.arch.config import ModelConfig
from unmask.models.weights.adapter import fold_adapter, load_adapter
from unmask.models.weights.lora_adapter import read_lora_adapter

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "unmask_config.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def base_config() -> ModelConfig:
    return tiny_model("llama").config


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of an adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def set_keys(folder: Path, **keys: Any) -> None:
    """Change keys of an adapter's config."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("family", FAMILIES)
def test_updates_are_what_folding_adds(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    adapter = read_lora_adapter(write_adapter(model, tmp_path / "a"), model.config, name="a", max_rank=3)
    assert adapter.rank == 3
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = fold_adapter(load_adapter(model, tmp_path / "a")).state_dict()
    changed = {name.removesuffix(".weight") for name in after if not torch.equal(after[name], before[name])}
    assert changed == set(adapter.updates)
    for name, (a_RK, b_VR) in adapter.updates.items():
        torch.testing.assert_close(before[f"{name}.weight"] + b_VR @ a_RK, after[f"{name}.weight"])


def test_peft_folders_and_parts_of_fused_layers(tmp_path: Path) -> None:
    """Without our config beside them, some modules only, and ranks of their own."""
    folder = write_adapter(tiny_model("llama"), tmp_path / "a")
    (folder / OURS).unlink()
    set_keys(folder, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 2})

    def keep(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if not any(f".{module}." in name for module in ("v_proj", "up_proj")):
                del tensors[name]
            elif "up_proj.lora_A" in name:
                tensors[name] = tensors[name][:2]
            elif "up_proj.lora_B" in name:
                tensors[name] = tensors[name][:, :2]

    edit(folder, keep)
    adapter = read_lora_adapter(folder, base_config(), name="a")
    shapes = {
        name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in adapter.updates.items() if name.startswith("blocks.0.")
    }
    assert shapes == {
        "blocks.0.attention.qkv": ((3, 32), (64, 3)),
        "blocks.0.mlp.gate_up": ((2, 32), (96, 2)),
    }
    assert not adapter.updates["blocks.0.attention.qkv"].b_VR[:48].any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.lora_A.weight"), ("missing", f"{Q_PROJ}.lora_A.weight")),
        (lambda t: t.update(other=torch.zeros(1)), ("unexpected", "other")),
        (lambda t: t.update({f"{Q_PROJ}.lora_B.weight": torch.zeros(16, 3)}), ("wrong shape", f"{Q_PROJ}.lora_B.weight", 16)),
        (lambda t: t[f"{Q_PROJ}.lora_B.weight"].fill_(torch.nan), ("finite", f"{Q_PROJ}.lora_B.weight")),
        (lambda t: t[f"{Q_PROJ}.lora_A.weight"].fill_(torch.inf), ("finite", f"{Q_PROJ}.lora_A.weight")),
    ],
)
def test_files_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], object], named: tuple[object, ...], tmp_path: Path
) -> None:
    folder = write_adapter(tiny_model("llama"), tmp_path / "a")
    edit(folder, change)
    with refused(CheckpointError, *named):
        read_lora_adapter(folder, base_config(), name="a")


def test_what_cannot_be_applied_by_row_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = write_adapter(model, tmp_path / "a")
    with refused(CheckpointError, "rank", 3, 2):
        read_lora_adapter(folder, model.config, name="a", max_rank=2)
    with refused(CheckpointError, "modules_to_save", "freeze_embeddings"):
        read_lora_adapter(write_adapter(model, tmp_path / "b", train_embedding=True), model.config, name="b")
    diffusion = tiny_model("llama", mask_id=MASK, block_size=4)
    with refused(CheckpointError, OURS, "mask token"):
        read_lora_adapter(write_adapter(diffusion, tmp_path / "c"), model.config, name="c")
    set_keys(folder, use_dora=True)
    with refused(CheckpointError, "use_dora"):
        read_lora_adapter(folder, model.config, name="a")
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
        with refused(CheckpointError, name):
            read_lora_adapter(folder, model.config, name="a")


def test_a_digest_is_of_what_the_adapter_computes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folders = [write_adapter(model, tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    one, same, other = (read_lora_adapter(folder, model.config, name=folder.name).digest for folder in folders)
    assert one == same != other
    set_keys(folders[1], lora_alpha=7.0)
    assert read_lora_adapter(folders[1], model.config, name="1").digest != one
