"""Tiny GGUF files of random models, as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
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


def packed_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A matrix of a type, quantised where the library can, else of random codes with small scales."""
    if kind.name.endswith("_K"):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
        # A float16 scale, and but for Q3_K and Q6_K a minimum, begin or end the block.
        places = {"Q2_K": slice(size - 4, size), "Q3_K": slice(size - 2, size), "Q6_K": slice(size - 2, size)}.get(
            kind.name, slice(4)
        )
        scales = rng.uniform(0.001, 0.01, (*blocks.shape[:2], 2)).astype(np.float16)
        blocks[..., places] = scales.view(np.uint8)[..., : blocks[..., places].shape[-1]]
        return blocks.reshape(shape[0], -1)
    packed: np.ndarray = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
    return packed


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    kind: str = "Q4_1",
    hidden: int = HIDDEN,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Write a random model; returns the tensors it stands for under Hugging Face names, quantization included.

    Args:
        path: the new file.
        architecture: llama.cpp's name.
        kind: type of the matrices but for the embedding.
        hidden: size of the hidden states, and of the feed-forward but for the default.
        changes: metadata to add or replace; None leaves a key out.
    """
    ffn = FFN if hidden == HIDDEN else hidden
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, hidden, ffn)
    _add_tokenizer(writer)
    expected = _add_tensors(writer, architecture, kind, hidden, ffn)
    for key, value in changes.items():
        writer.kv_data[0].pop(key, None)
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add_sizes(writer: gguf.GGUFWriter, hidden: int, ffn: int) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
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


def _add_tensors(writer: gguf.GGUFWriter, architecture: str, kind: str, hidden: int, ffn: int) -> dict[str, np.ndarray]:
    """Add random tensors; returns what they stand for, by Hugging Face names."""
    rng = np.random.default_rng(0)
    expected: dict[str, np.ndarray] = {}

    def add(name: str, hf_name: str, *shape: int, heads: int = 0) -> None:
        if len(shape) == 1:
            weight = rng.standard_normal(shape).astype(np.float32)
            writer.add_tensor(name, weight)
            expected[hf_name] = weight
            return
        of = gguf.GGMLQuantizationType["Q8_0" if name.startswith("token_embd") else kind]
        packed = packed_blocks(rng, shape, of)
        expected[hf_name] = gguf.quants.dequantize(packed, of)
        if heads and architecture == "llama":
            packed = interleave_heads(packed, heads)
        writer.add_tensor(name, packed, raw_dtype=of)

    add("token_embd.weight", "model.embed_tokens.weight", len(vocabulary()), hidden)
    kv = hidden // HEADS * KV_HEADS
    for i in range(LAYERS):
        disk = f"model.layers.{i}"
        add(f"blk.{i}.attn_norm.weight", f"{disk}.input_layernorm.weight", hidden)
        add(f"blk.{i}.attn_q.weight", f"{disk}.self_attn.q_proj.weight", hidden, hidden, heads=HEADS)
        add(f"blk.{i}.attn_k.weight", f"{disk}.self_attn.k_proj.weight", kv, hidden, heads=KV_HEADS)
        add(f"blk.{i}.attn_v.weight", f"{disk}.self_attn.v_proj.weight", kv, hidden)
        if architecture == "qwen2":
            add(f"blk.{i}.attn_q.bias", f"{disk}.self_attn.q_proj.bias", hidden)
            add(f"blk.{i}.attn_k.bias", f"{disk}.self_attn.k_proj.bias", kv)
            add(f"blk.{i}.attn_v.bias", f"{disk}.self_attn.v_proj.bias", kv)
        if architecture == "qwen3":
            add(f"blk.{i}.attn_q_norm.weight", f"{disk}.self_attn.q_norm.weight", hidden // HEADS)
            add(f"blk.{i}.attn_k_norm.weight", f"{disk}.self_attn.k_norm.weight", hidden // HEADS)
        add(f"blk.{i}.attn_output.weight", f"{disk}.self_attn.o_proj.weight", hidden, hidden)
        add(f"blk.{i}.ffn_norm.weight", f"{disk}.post_attention_layernorm.weight", hidden)
        add(f"blk.{i}.ffn_gate.weight", f"{disk}.mlp.gate_proj.weight", ffn, hidden)
        add(f"blk.{i}.ffn_up.weight", f"{disk}.mlp.up_proj.weight", ffn, hidden)
        add(f"blk.{i}.ffn_down.weight", f"{disk}.mlp.down_proj.weight", hidden, ffn)
    add("output_norm.weight", "model.norm.weight", hidden)
    return expected
