"""GGUF export: what llama.cpp computes from it, the way back, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import rival_llama
from helpers import disk_full, make_sentencepiece_tokenizer, make_tokenizer, refused
from tiny import tiny_model
from unmask.data.tokenizer_files import read_tokenizer
from unmask.errors import CheckpointError, ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.config import RopeConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.gguf_export import KINDS, GGUFTokenizer, export_gguf
from unmask.models.weights.hub import resolve
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import iter_tensors

LLAMA3 = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_positions=8192)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16, "eos_ids": (0, 2)}),
    "llama tied, biases": ("llama", {"tied_head": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    "llama3 rope": ("llama", {"rope": LLAMA3, "hidden_size": 64, "head_dim": 16}),
    "llama linear": ("llama", {"rope": RopeConfig(kind="linear", factor=2.0)}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope": RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_positions=32)}),
    "qwen3": ("qwen3", {"head_dim": 16}),
}
PROMPT = list(range(5, 29))


def dense_folder(folder: Path, family: str = "llama", **changes: Any) -> Path:
    tokenizer = make_tokenizer(folder)
    options = {"vocab_size": tokenizer.vocab_size, "eos_ids": (0,), "std": 0.2, **changes}
    save_model(tiny_model(family, **options), folder)
    return folder


def export(folder: Path, out: Path, kind: str = "auto", **options: Any) -> Any:
    files = read_tokenizer(folder)
    tokenizer = GGUFTokenizer(files.backend, files.named, files.templates.get("default"))
    return export_gguf(folder, out, tokenizer, kind=kind, **options)


def causal_logits(model: Transformer, ids: list[int]) -> torch.Tensor:
    length = len(ids)
    causal = DenseAttend(torch.ones(1, length, length, dtype=torch.bool).tril())
    with torch.no_grad():
        return model.head(model(torch.tensor([ids]), torch.arange(length)[None], causal))[0]


def same_tensors(first: Path, second: Path) -> bool:
    a, b = dict(iter_tensors(first)), dict(iter_tensors(second))
    return a.keys() == b.keys() and all(torch.equal(a[name].float(), b[name].float()) for name in a)


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    files = []
    for number, (family, changes) in enumerate(CASES.values()):
        folder = dense_folder(tmp_path / str(number), family, **changes)
        files.append(tmp_path / f"{number}.gguf")
        export(folder, files[-1])
    answers = rival_llama.ask(*(rival_llama.request(file, PROMPT) for file in files))
    for number, (name, answer) in enumerate(zip(CASES, answers, strict=True)):
        expected = causal_logits(load_model(tmp_path / str(number), dtype=torch.float32), PROMPT)
        found = torch.tensor(answer["logits"])
        # llama.cpp keeps keys and values of its cache in float16.
        error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
        assert error < 2e-3, name


@pytest.mark.parametrize("case", CASES)
def test_read_again_it_is_the_same_model(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    folder = dense_folder(tmp_path / "model", family, **changes)
    export(folder, tmp_path / "out.gguf")
    again = resolve(str(tmp_path / "out.gguf"), cache=tmp_path / "cache")
    assert same_tensors(folder, again)
    before, after = read_model_config(folder), read_model_config(again)
    assert after.rope == before.rope
    assert (after.family, after.eos_ids, after.tied_head, after.norm_eps) == (family, before.eos_ids, before.tied_head, 1e-6)
    text = "The quick  brown fox\n 123 <|im_start|>naïve 你好"
    first, second = (read_tokenizer(each) for each in (folder, again))
    assert second.backend.encode(text).ids == first.backend.encode(text).ids
    assert (second.named["eos_token"], second.templates) == (first.named["eos_token"], first.templates)


@pytest.mark.parametrize("kind", KINDS)
def test_exported_again_it_is_the_same_file(kind: str, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "model", "llama", hidden_size=64, ffn_size=96, head_dim=16)
    for number in (1, 2):
        exported = export(folder, tmp_path / f"{number}.gguf", kind)
        assert (exported.kind, exported.notes) == (kind, ())
        folder = resolve(str(tmp_path / f"{number}.gguf"), cache=tmp_path / "cache")
    first, second = (gguf.GGUFReader(tmp_path / f"{number}.gguf") for number in (1, 2))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in first.tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["output_norm.weight"]) == (kind.upper(), "F32")
    assert kinds["token_embd.weight"] == ("Q8_0" if kind in ("q4_0", "q4_1") else kind.upper())
    if kind != "q4_1":  # whose scale and minimum, rounded to float16, are other numbers of the values that they give
        for ours, theirs in zip(first.tensors, second.tensors, strict=True):
            assert (ours.name, ours.tensor_type) == (theirs.name, theirs.tensor_type)
            assert np.array_equal(ours.data, theirs.data), ours.name


def test_rows_of_no_whole_blocks_are_float16(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "model", "llama", hidden_size=32, ffn_size=40)
    exported = export(folder, tmp_path / "out.gguf", "q8_0")
    assert exported.notes == ("2 matrices are F16: their rows are no whole number of 32 columns",)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert (kinds["blk.1.ffn_down.weight"], kinds["blk.1.ffn_up.weight"]) == ("F16", "Q8_0")


def test_auto_keeps_the_stored_type(tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "model", "qwen3", dtype=torch.bfloat16)
    assert export(folder, tmp_path / "out.gguf").kind == "bf16"
    again = resolve(str(tmp_path / "out.gguf"), cache=tmp_path / "cache")
    assert same_tensors(folder, again)
    assert {tensor.dtype for _, tensor in iter_tensors(again) if tensor.dim() > 1} == {torch.bfloat16}


def test_sentencepiece_tokenizers(tmp_path: Path) -> None:
    # Not one that begins with a space: to that a Metaspace adds none, llama.cpp does.
    texts = ["The quick brown fox", "12  + 34 = \n46", "naïve 你好"]
    files = {}
    for padding in ("prepend", "first", "never"):
        folder = tmp_path / padding
        tokenizer = make_sentencepiece_tokenizer(folder, padding)
        save_model(tiny_model("llama", vocab_size=tokenizer.vocab_size, eos_ids=(2,), bos_id=1), folder)
        files[padding] = tmp_path / f"{padding}.gguf"
        export(folder, files[padding])
        again = resolve(str(files[padding]), cache=tmp_path / "cache")
        first, second = (read_tokenizer(each).backend for each in (folder, again))
        for text in texts:
            ids = second.encode(text, add_special_tokens=False).ids
            assert ids == first.encode(text, add_special_tokens=False).ids, (padding, text)
            assert second.decode(ids) == first.decode(ids), (padding, text)
    answers = rival_llama.ask(*(rival_llama.request(file, texts=texts) for file in files.values()))
    for padding, answer in zip(files, answers, strict=True):
        backend = read_tokenizer(tmp_path / padding).backend
        assert answer["ids"] == [backend.encode(text, add_special_tokens=False).ids for text in texts], padding


@pytest.mark.parametrize(
    ("family", "changes", "names"),
    [
        ("llada2", {}, ("bailing_moe_v2", "llama.cpp")),
        ("llama", {"mask_id": 57, "block_size": 8}, ("denoises", "llama.cpp")),
        ("qwen3", {"qkv_bias": True, "out_bias": True}, ("attention_bias", "qwen3")),
    ],
)
def test_other_models_are_refused(family: str, changes: dict[str, Any], names: tuple[str, ...], tmp_path: Path) -> None:
    folder = dense_folder(tmp_path / "model", family, **changes)
    with refused(CheckpointError, *names):
        export(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_the_parent_of_gated_lora_is_written(tmp_path: Path) -> None:
    diffusion = {"mask_id": 57, "block_size": 8, "start_id": 1, "gated_lora_rank": 2}
    folder = dense_folder(tmp_path / "model", "llama", **diffusion)
    with refused(CheckpointError, "parent"):
        export(folder, tmp_path / "out.gguf")
    exported = export(folder, tmp_path / "out.gguf", parent=True)
    assert exported.config.mask_id is None
    again = load_model(resolve(str(tmp_path / "out.gguf"), cache=tmp_path / "cache"), dtype=torch.float32)
    source = load_model(folder, dtype=torch.float32)
    torch.testing.assert_close(causal_logits(again, PROMPT), causal_logits(source, PROMPT), rtol=0, atol=1e-5)


def test_bad_requests_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = dense_folder(tmp_path / "model"), tmp_path / "out.gguf"
    with refused(ConfigError, "type", "'q5_k'", "q8_0"):
        export(folder, out, "q5_k")
    with refused(ConfigError, "gated LoRA"):
        export(folder, out, parent=True)
    monkeypatch.setattr("os.fsync", disk_full)
    with refused(CheckpointError, "no space left", out):
        export(folder, out)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    out.write_bytes(b"mine")
    with refused(CheckpointError, out, "exists"):
        export(folder, out)
    assert out.read_bytes() == b"mine"


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tokenizer = make_tokenizer(folder)
    model = tiny_model("llama", vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        model.embed.weight[0, 0] = 1e6
    save_model(model, folder)
    with refused(CheckpointError, "model.embed_tokens.weight", "float16"):
        export(folder, tmp_path / "out.gguf", "f16")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_llama_cpp_writes_what_we_write_with_the_embedded_model(kind: str, tmp_path: Path) -> None:
    source, file = resolve("smollm2-135m"), tmp_path / "model.gguf"
    export(source, file, kind)
    backend, model = read_tokenizer(source).backend, load_model(source, dtype=torch.float32)
    texts = [
        "The capital of France is",
        "def fib(n):\n    if n < 2:\n        return 12345",
        "  naïve don't 你好 3.14159\t\n\n x",
    ]
    prompts = [backend.encode(text).ids for text in texts]
    answers = rival_llama.ask(*(rival_llama.request(file, ids, tokens=24, texts=texts) for ids in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["ids"] == prompts
        ids = list(prompt)
        for _ in range(24):
            ids.append(int(causal_logits(model, ids)[-1].argmax()))
        assert ids[len(prompt) :] == answer["greedy"]
