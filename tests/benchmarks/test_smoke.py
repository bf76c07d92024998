"""Every benchmark runs: `--smoke` on tiny random models. Figures are not looked at, only that they are there."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from runs import tiny_folder

BLOCK_SIZE = 6
"""None of the row counts that decode.py measures anyway."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An autoregressive model and a diffusion model."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "autoregressive": str(tiny_folder(folder / "autoregressive")),
        "diffusion": str(tiny_folder(folder / "diffusion", mask_id=3, block_size=BLOCK_SIZE)),
    }


def smoke(script: str, results: Path, *arguments: str) -> None:
    importlib.import_module(script).main(["--smoke", "--results", str(results), *arguments])


def test_decode(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("decode", tmp_path, "--model", models["diffusion"], "--json")
    figures = json.loads(capsys.readouterr().out)
    assert {name.split()[0] for name in figures} == {"D3", "D4", "D5", "D6"}
    assert all(figure["value"] >= 0 for figure in figures.values())
    assert figures["D5 identical"] == {"value": 8, "target": 8.0, "met": True}
    assert list(tmp_path.glob("decode_quick_*.json"))


def test_everyday(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape: dict[str, Any] = {"mask_id": 3, "block_size": 4, "start_id": 0, "gated_lora_rank": 2, "max_positions": 1024}
    model = tiny_folder(tmp_path / "model", **shape)
    smoke("everyday", tmp_path, "--model", str(model), "--json")
    figures = json.loads(capsys.readouterr().out)
    assert len(figures) == 3 * 2 * 4  # sections, sides, figures
    assert figures["everyday_speculative_identical"] == {"value": 1.0, "target": 1.0, "met": True}
    assert figures["copying_lookup_tokens_per_forward"]["value"] > 0
    (result,) = tmp_path.glob("everyday_*.json")
    rows = json.loads(result.read_text())["sections"]["everyday"]["rows"]
    assert rows["lookup all"]["prompts"] == 10


def test_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape: dict[str, Any] = {"mask_id": 3, "block_size": 4, "start_id": 0, "gated_lora_rank": 2, "max_positions": 1024}
    smoke("load", tmp_path, "--model", str(tiny_folder(tmp_path / "model", **shape)), "--sides", "auto", "always", "--json")
    figures = json.loads(capsys.readouterr().out)
    names = {f"{clients}_{side}" for clients in (1, 4) for side in ("auto", "always")}
    assert set(figures) == names | {f"{name}_uncertainty" for name in names}
    assert [figures[f"{clients}_auto"]["target"] for clients in (1, 4)] == [0.97, 0.97]
    (result,) = tmp_path.glob("load_*.json")
    assert json.loads(result.read_text())["clients"]["4"]["always"]["identical"] == 1.0


@pytest.mark.slow
def test_contention(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("contention", tmp_path, "--model", models["diffusion"], "--json")
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"decode", "decode_eager", "train"}
    assert all(figure["value"] > 0 and figure["target"] == 2.2 for figure in figures.values())
    assert list(tmp_path.glob("contention_*.json"))


@pytest.mark.slow
def test_gemm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("gemm", tmp_path, "--shapes", "out", "--json")
    assert json.loads(capsys.readouterr().out)["figures"]


def test_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("attention", tmp_path, "--json")
    assert json.loads(capsys.readouterr().out).keys() == {"head_2", "attention_2_32"}


def test_quality(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("quality", tmp_path, "--model", models["diffusion"], "--autoregressive", models["autoregressive"])
    assert "tokens per forward" in capsys.readouterr().out


def test_sampling(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("sampling", tmp_path, *(word for kind, model in models.items() for word in (f"--{kind}", model)), "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["diffusion"]["top_p"].keys() == {"milliseconds", "ratio"}
    assert figures["autoregressive"]["greedy"]["ratio"] == 1.0


def test_soak(tmp_path: Path) -> None:
    smoke("soak", tmp_path)
    (result,) = tmp_path.glob("soak_*.json")
    assert json.loads(result.read_text())["requests"] == 20


@pytest.mark.slow
def test_startup(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("startup", tmp_path, "--model", models["diffusion"], "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["first_token_cpu_s"]["target"] > figures["import_torch_cpu_s"]["value"] > 0
    assert all(figure["value"] > 0 for figure in figures.values())
    assert list(tmp_path.glob("startup_*.json"))


def test_tools(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", mask_id=3, block_size=4, max_positions=4096)
    smoke("tools", tmp_path, "--model", str(model))
    (result,) = tmp_path.glob("tools_*.json")
    assert json.loads(result.read_text())["required"]["calls"] <= 1


@pytest.mark.parametrize("script", [pytest.param("cap", marks=pytest.mark.slow), "dpo"])
def test_training_benchmarks(script: str, models: dict[str, str], tmp_path: Path) -> None:
    smoke(script, tmp_path, "--model", models["diffusion"], "--out", str(tmp_path / "out"))
    (result,) = tmp_path.glob(f"{script}_*.json")
    assert json.loads(result.read_text())
    assert result.with_suffix(".png").stat().st_size > 0


@pytest.mark.slow
def test_train_step(models: dict[str, str], tmp_path: Path) -> None:
    smoke("train_step", tmp_path, "--model", models["diffusion"], "--batches", "sft", "--threads", str(torch.get_num_threads()))
    (result,) = tmp_path.glob("train_step_*.json")
    figures = json.loads(result.read_text())["results"]["sft"]
    assert figures["check"]["relative_gradient_difference"] < 1e-3
    assert figures["memory"]["ours"]["step_mib"] >= 0


@pytest.mark.slow
def test_scaling(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("scaling", tmp_path, "--model", models["diffusion"], "--json")
    assert json.loads(capsys.readouterr().out)["T4 weak scaling"]["target"] == 1.7
    (result,) = tmp_path.glob("scaling_*.json")
    assert json.loads(result.read_text())["tokens_per_second"]["several"][0] > 0


@pytest.mark.slow
def test_serve(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("serve", tmp_path, "--model", models["diffusion"], "--autoregressive", models["autoregressive"], "--json")
    for figures in json.loads(capsys.readouterr().out)["clients"]["1"].values():
        assert figures["requests"] == 1


@pytest.mark.slow
def test_memory(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("memory", tmp_path, "--model", models["diffusion"], "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["after_requests_mb"] >= figures["ready_mb"] > 0
    assert figures["longest_wait_beside"] > 0


FAKE_LLAMA = """
import ctypes, shutil
__version__, LLAMA_FTYPE_MOSTLY_Q4_0, LLAMA_FTYPE_MOSTLY_Q8_0 = "fake", 2, 7

class Params(ctypes.Structure):
    _fields_ = [("ftype", ctypes.c_int), ("allow_requantize", ctypes.c_bool)]

llama_model_quantize_default_params = Params

def llama_model_quantize(source, out, params):
    shutil.copyfile(source, out)
    return 0

class Llama:
    def __init__(self, path, **options):
        assert open(path).read() == "weights"

    def reset(self):
        pass

    def generate(self, ids, temp):
        while True:
            yield 1
"""


def test_vs_llamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a llama.cpp that answers at once."""
    model = str(tiny_folder(tmp_path / "model", max_positions=4096))
    (tmp_path / "llama_cpp.py").write_text(FAKE_LLAMA)
    (tmp_path / "weights.gguf").write_text("weights")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    named = {"model": model, "autoregressive": model, "llama-python": sys.executable}
    arguments = {**named, "gguf": str(tmp_path / "weights.gguf"), "cache": str(tmp_path / "cache")}
    smoke("vs_llamacpp", tmp_path, *(word for name, value in arguments.items() for word in (f"--{name}", value)), "--json")
    figures = json.loads(capsys.readouterr().out)
    assert {name for name in figures if "llama.cpp" in name} == {
        f"tokens/s, llama.cpp {kind}" for kind in ("Q4_1", "Q4_0", "Q8_0")
    }
    assert figures["D1 ours, default model"]["target"] == 4.0


def test_vs_llamacpp_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="llama-cpp-python"):
        smoke("vs_llamacpp", tmp_path)


def test_quantization(models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("quantization", tmp_path, "--models", ",".join(models.values()), "--json")
    figures = json.loads(capsys.readouterr().out)
    assert len(figures) == len(models) * 2 * 2
    assert all(0 <= figure["value"] <= 1 for name, figure in figures.items() if name.endswith("agreement"))


def test_mini16b(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    smoke("mini16b", tmp_path, "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["32 rows with block routing experts"]["value"] == 4
    assert figures["32 rows experts"]["value"] > 12
    assert all(figure["value"] >= 0 and figure["target"] is None for figure in figures.values())
    assert not (tmp_path / "mini16b").exists()
    assert list(tmp_path.glob("mini16b_*.json"))


@pytest.mark.slow
def test_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_folder(tmp_path / "model", mask_id=3, block_size=4, max_positions=1024)
    smoke("cluster", tmp_path, "--model", str(model), "--json")
    figures = json.loads(capsys.readouterr().out)
    assert figures["2x1_capacity"]["value"] > 0
    (result,) = tmp_path.glob("cluster_*.json")
    assert json.loads(result.read_text())["sides"]["2x1"]["levels"]["1.2"]["requests"] >= 1
