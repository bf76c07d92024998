"""`unmask export`, and the other verbs on an adapter's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import make_tokenizer, refused
from tiny import tiny_model
from unmask.cli.export import shard_bytes
from unmask.engine.loading import load
from unmask.errors import ConfigError
from unmask.models.weights.adapter import attach_lora, save_adapter
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.loading import load_model


@pytest.fixture
def adapter_folder(diffusion_folder: Path, tmp_path: Path) -> Path:
    """An adapter of the diffusion model that changes what it answers."""
    model = load_model(diffusion_folder, dtype=torch.float32)
    attach_lora(model, rank=2, alpha=2.0, seed=0, train_embedding=False)
    for name, parameter in model.named_parameters():
        if ".lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(model, tmp_path / "adapter", base=str(diffusion_folder))
    return tmp_path / "adapter"


def answer(run, folder: Path) -> list[int]:
    """What the model says, and a look that `unmask generate` can make it."""
    result = run("generate", "Hello", "-m", folder, "--max-new-tokens", 4, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    return load(folder, dtype="float32").generate_ids(list(range(5, 15)), max_new_tokens=16)


def test_exported_model_answers_alike(run, diffusion_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("export", diffusion_folder, "--out", out, "--max-shard-size", "40 kB")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"model    {out}", "format   llama, diffusion, float32"]
    assert max(path.stat().st_size for path in out.glob("*.safetensors")) < 60_000
    assert answer(run, out) == answer(run, diffusion_folder)


def test_an_adapter_is_a_model_to_every_verb(run, diffusion_folder: Path, adapter_folder: Path, tmp_path: Path) -> None:
    adapted = answer(run, adapter_folder)
    assert adapted != answer(run, diffusion_folder)
    facts = json.loads(run("info", adapter_folder, "--json").stdout)
    assert (facts["kind"], facts["block_size"], facts["adapter_of"]) == ("diffusion", 8, str(diffusion_folder))
    assert facts["weights_on_disk"] is None
    assert f"adapter          of {diffusion_folder}" in run("info", adapter_folder).stdout.splitlines()
    assert json.loads(run("info", diffusion_folder, "--json").stdout)["adapter_of"] is None
    result = run("export", adapter_folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert answer(run, tmp_path / "out") == adapted
    (adapter_folder / "unmask_config.json").unlink()
    assert answer(run, adapter_folder) == adapted
    assert json.loads(run("info", adapter_folder, "--json").stdout)["block_size"] == 8


def test_llada2_comes_with_notes(run, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "source", mask_token="<file_sep>")
    special = {"mask_id": tokenizer.mask_id, "block_size": 8, "eos_ids": (tokenizer.eos_id,)}
    save_model(tiny_model("llada2", vocab_size=tokenizer.vocab_size, **special), tmp_path / "source")
    result = run("export", tmp_path / "source", "--out", tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1] == "format   llada2_moe, diffusion, bfloat16"
    assert [line.split()[0] for line in lines[2:]] == ["note", "note"]
    assert f"this model's is {tokenizer.mask_id}" in lines[2]
    assert "block_size: 8" in lines[3]
    assert load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_code_and_sdar(run, tmp_path: Path) -> None:
    save_model(tiny_model("qwen3", mask_id=57, block_size=8), tmp_path / "source")
    result = run("export", tmp_path / "source", "--out", tmp_path / "code", "--remote-code")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "code" / "modeling_unmask.py").is_file()
    result = run("export", tmp_path / "source", "--out", tmp_path / "sdar", "--format", "sdar")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[1] == "format   sdar, diffusion, float32"
    assert [line.split()[:2] for line in lines[2:]] == [["note", "SGLang"], ["note", "SGLang"]]
    assert (tmp_path / "sdar" / "modeling_unmask.py").is_file()


def test_mistakes(fails, ar_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fails("export", ar_folder, "--out", ar_folder, names=[ar_folder, "empty"])
    fails("export", ar_folder, "--out", out, "--dtype", "float8", names=["'float8'"])
    fails("export", ar_folder, "--out", out, "--max-shard-size", "big", names=("--max-shard-size", "'big'"))
    fails("export", "nothing", "--out", out, names=["'nothing'"])
    (tmp_path / "hollow").mkdir()
    fails("export", tmp_path / "hollow", "--out", out, names=["config.json"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5kb", 1500), ("2GiB", 2**31), ("300B", 300)]
)
def test_sizes(text: str, expected: int) -> None:
    assert shard_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "5 tons", "0GB", "0.1B", "5GB or so"])
def test_what_is_no_size(text: str) -> None:
    with refused(ConfigError, "5GB"):
        shard_bytes(text)


def test_a_gguf_file_is_written_and_is_a_model_to_every_verb(run, own_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "own.gguf"
    result = run("export", own_folder, "--format", "gguf", "--type", "f32", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [f"model    {out}", "format   GGUF, llama, f32"]
    facts = json.loads(run("info", out, "--json").stdout)
    assert (facts["architecture"], facts["kind"], facts["weights_on_disk"]) == ("llama", "autoregressive", None)
    assert load(out, dtype="float32").generate_ids([5, 6, 7], max_new_tokens=8) == load(
        own_folder, dtype="float32"
    ).generate_ids([5, 6, 7], max_new_tokens=8)
    assert run("export", out, "--out", tmp_path / "folder").exit_code == 0


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--format", "gguf", "--type", "q5_k"], ("q5_k", "q8_0")),
        (["--format", "gguf", "--dtype", "float16"], ("--dtype", "--type")),
        (["--format", "onnx"], ("--format", "onnx")),
        (["--type", "q8_0"], ("--type", "q8_0")),
        (["--format", "gguf", "--parent"], ("gated LoRA",)),
        (["--format", "gguf", "--remote-code"], ("--remote-code", "GGUF")),
        (["--format", "sdar"], ("qwen3", "'llama'")),
        (["--format", "sdar", "--type", "q8_0"], ("--type", "'sdar'")),
        (["--remote-code"], ("autoregressive",)),
    ],
)
def test_formats_and_types_are_checked(
    fails, own_folder: Path, tmp_path: Path, options: list[str], names: tuple[str, ...]
) -> None:
    fails("export", own_folder, "--out", tmp_path / "out.gguf", *options, names=names)


def test_a_damaged_gguf_file_is_one_line(fails, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    fails("info", tmp_path / "x.gguf", names=["x.gguf"])
    fails("generate", "Hello", "--model", tmp_path / "x.gguf", names=["x.gguf"])
