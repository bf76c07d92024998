"""Figures of a step: the utilisation of a known GPU, and the memory of the rank that has most."""

from __future__ import annotations

from pathlib import Path

import pytest

from runs import stage_recipe, tiny_folder, tiny_jsonl, tiny_recipe
from tiny import tiny_config
from unmask.train.loop import Trainer
from unmask.train.plan.gpus import GIB, find_gpu, gpu_of_device
from unmask.train.plan.work import model_flops, row_works
from unmask.train.run import build_components
from unmask.train.speed import Utilisation, peak_memory, speed_figures

H100 = find_gpu("h100")


def test_memory_is_that_of_the_rank_that_has_most() -> None:
    figures = speed_figures(100, 2.0, [2**20, 2**40])
    assert figures["memory_gib"] == 2**40 / GIB
    assert (figures["tokens_per_second"], figures["tokens_per_second_per_device"]) == (50, 25)
    assert 0 < peak_memory() < 1000 * GIB


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H100 80GB HBM3", "h100-80gb"), ("NVIDIA H200", "h200"), ("NVIDIA H100 PCIe", None), ("NVIDIA GeForce", None)],
)
def test_a_gpu_is_known_by_the_name_of_its_device(device: str, name: str | None) -> None:
    gpu = gpu_of_device(device)
    assert (None if gpu is None else gpu.name) == name


def test_utilisation_is_the_rows_work_over_the_peak_of_all_devices() -> None:
    recipe, config = tiny_recipe(Path("x"), Path("x")), tiny_config("llama")
    found = Utilisation.of_run(recipe, config, H100, 8)
    assert found is not None
    rows = row_works(recipe)
    assert len(rows) == len(recipe.blocks.phases)
    for index, row in enumerate(rows):
        assert found.mfu(index, 0.5) == pytest.approx(model_flops(config, row, recipe.train.batch_rows) / 0.5 / (8 * 989e12))
    assert Utilisation.of_run(recipe, config, None, 8) is None


def test_no_utilisation_where_the_work_is_not_known() -> None:
    recipe = stage_recipe(Path("x"), Path("x"), objective={"kind": "joint", "align": 1.0})
    assert Utilisation.of_run(recipe, tiny_config("llama"), H100, 1) is None


def test_a_gated_lora_that_is_trained_further_counts_as_one_of_the_recipe() -> None:
    config = tiny_config("llama", mask_id=3, start_id=0, gated_lora_rank=1)
    further, named = (stage_recipe(Path("x"), Path("x"), **train) for train in ({}, {"gated_lora_rank": 1}))
    assert Utilisation.of_run(further, config, H100, 1) == Utilisation.of_run(named, config, H100, 1)


def test_a_step_on_a_known_gpu_has_its_utilisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tiny_folder(tmp_path / "model"), tiny_jsonl(tmp_path / "data.jsonl"))
    components = build_components(recipe)
    assert "mfu" not in Trainer(components, tmp_path / "cpu").train_step()
    monkeypatch.setattr("unmask.train.loop.gpu_of", lambda device: H100)
    record = Trainer(components, tmp_path / "gpu").train_step()
    (row, *_) = row_works(recipe)
    work = model_flops(components.model.config, row, recipe.train.batch_rows)
    assert record["mfu"] == pytest.approx(work / record["seconds"] / H100.flops)
