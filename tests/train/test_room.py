"""Room for training: as many parameters as train, and a run that does not fit is refused before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import limit_memory, refused
from runs import stage_recipe, tiny_folder, tiny_jsonl, tiny_preferences
from tiny import tiny_model
from unmask.errors import RoomError
from unmask.models.arch.gated_lora import add_gated_lora, train_gated_lora
from unmask.models.weights.adapter import attach_lora
from unmask.models.weights.room import RESERVE, Memory, weight_bytes
from unmask.train.optim import MasterAdamW
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.world import World
from unmask.train.room import check_training_room, num_trainable, training_needs
from unmask.train.run import build_components
from unmask.train.sections import TrainSection


def section(**changes: Any) -> TrainSection:
    return TrainSection(tokens=1, **changes)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "llada2"])
def test_as_many_parameters_as_train(family: str) -> None:
    assert num_trainable(tiny_model(family).config, section()) == tiny_model(family).num_parameters()
    for train_embedding in (True, False):
        adapted = attach_lora(tiny_model(family), rank=3, alpha=1.0, seed=0, train_embedding=train_embedding)
        count = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        assert num_trainable(adapted.config, section(lora={"rank": 3}, freeze_embeddings=not train_embedding)) == count


def test_of_gated_lora_only_itself() -> None:
    model = tiny_model("qwen2", mask_id=1, block_size=4, start_id=0)
    gated = add_gated_lora(model, 3, seed=0)
    count = sum(parameter.numel() for parameter in gated.parameters() if parameter.requires_grad)
    assert num_trainable(model.config, section(gated_lora_rank=3)) == num_trainable(gated.config, section()) == count
    targets = ["out", "gate_up"]
    count = sum(parameter.numel() for parameter in train_gated_lora(gated, targets).parameters() if parameter.requires_grad)
    assert num_trainable(model.config, section(gated_lora_rank=3, gated_lora_targets=targets)) == count


def test_what_the_optimiser_holds(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    optimiser = MasterAdamW(model.named_parameters(), betas=(0.9, 0.9), weight_decay=0.0)
    for parameter in optimiser.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step(0.1)
    tensors = optimiser.state_tensors()
    sizes = {kind: sum(t.nbytes for name, t in tensors.items() if name.startswith(kind)) for kind in ("master", "moment")}
    needs = training_needs(stage_recipe(tmp_path, tmp_path), model.config, torch.bfloat16)
    assert needs["float32 weights"] == needs["gradients"] == sizes["master"]
    assert needs["AdamW's moments"] == sizes["moment"]
    assert training_needs(stage_recipe(tmp_path, tmp_path), model.config, torch.float32)["float32 weights"] == 0


def test_a_preference_needs_a_reference(tmp_path: Path) -> None:
    config, objective = tiny_model("llama").config, {"kind": "preference"}
    full, lora = (
        training_needs(stage_recipe(tmp_path, tmp_path, objective=objective, **train), config, torch.float32)
        for train in ({}, {"lora": {"rank": 2}, "freeze_embeddings": True})
    )
    assert full["the reference's weights"] == weight_bytes(config, torch.float32)
    assert lora["the reference's weights"] == 0


@pytest.mark.parametrize("family", ["llama", "llada2"])
def test_ranks_hold_their_shards(tmp_path: Path, family: str) -> None:
    config, recipe = tiny_model(family).config, stage_recipe(tmp_path, tmp_path)
    whole = sum(training_needs(recipe, config, torch.float32).values())
    routers = 0 if config.moe is None else 2 * config.moe.num_experts * config.hidden_size * 4 * torch.float32.itemsize
    own = sum(training_needs(recipe, config, torch.float32, ParallelDims(data_shard=4)).values())
    assert own == pytest.approx((whole - routers) / 4 + routers, rel=0.01)


class OneOfFour(World):
    """A rank whose others find the same."""

    dims = ParallelDims(data_shard=4)


def test_ranks_of_a_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, recipe = tiny_model("llama").config, stage_recipe(tmp_path, tmp_path)
    need = sum(training_needs(recipe, config, torch.float32, OneOfFour.dims).values())
    monkeypatch.setattr("unmask.models.weights.room.available_memory", lambda device: Memory(RESERVE + 2 * need, "memory"))
    check_training_room(recipe, config, torch.float32, "cpu", OneOfFour(), 2)
    with refused(RoomError, f"training {tmp_path}", "3 of 4 ranks", "gradients"):
        check_training_room(recipe, config, torch.float32, "cpu", OneOfFour(), 3)


def test_a_run_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_folder(tmp_path / "model", mask_id=3, block_size=4)
    monkeypatch.setattr("unmask.train.run.load_model", None)
    recipe = stage_recipe(model, tiny_jsonl(tmp_path / "chats.jsonl"))
    limit_memory(monkeypatch, 1)
    with refused(RoomError, f"training {model}", "gradients", "AdamW's moments", "even train.lora"):
        build_components(recipe)
    pairs = stage_recipe(model, tiny_preferences(tmp_path / "pairs.jsonl"), objective={"kind": "preference"})
    with refused(RoomError, "the reference's weights"):
        build_components(pairs)
