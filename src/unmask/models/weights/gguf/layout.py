"""Tensors in GGUF files: llama.cpp's names for Hugging Face's, and its order of query and key rows.

Owns what dense models have. Knows no file and no metadata.
"""

from __future__ import annotations

from torch import Tensor

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Frequencies that llama.cpp divides those of the rotary embedding by: rope scaling of kind llama3.
ROPE_FACTORS = "rope_freqs.weight"
# Architectures whose query and key rows llama.cpp interleaves: it rotates neighbours there, and halves in the others.
_INTERLEAVED = ("llama",)
_TO_GGUF = {hf: gguf for names in (LAYER_NAMES, TOP_NAMES) for gguf, hf in names.items()}


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a tensor; None: a dense model has none of that name."""
    stem, _, suffix = gguf_name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{suffix}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in LAYER_NAMES:
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{suffix}"
    return None


def gguf_name(hf_name: str) -> str:
    """The name in a GGUF file of a dense model's tensor."""
    stem, _, suffix = hf_name.rpartition(".")
    if stem in _TO_GGUF:
        return f"{_TO_GGUF[stem]}.{suffix}"
    layer, _, module = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_TO_GGUF[module]}.{suffix}"


def heads_interleaved(hf_name: str, architecture: str, num_heads: int, num_kv_heads: int) -> int | None:
    """The heads whose rows a tensor of this name holds interleaved; None: its rows are as in Hugging Face's."""
    stem = hf_name.rpartition(".")[0]
    heads = {"self_attn.q_proj": num_heads, "self_attn.k_proj": num_kv_heads}
    of_part = (count for part, count in heads.items() if stem.endswith(part))
    return next(of_part, None) if architecture in _INTERLEAVED else None


def interleave(rows: Tensor, num_heads: int) -> Tensor:
    """The order of llama.cpp: first and second half of each head, which rotary embedding pairs, alternate."""
    return rows.view(num_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def separate(rows: Tensor, num_heads: int) -> Tensor:
    """The order of Hugging Face: the inverse of `interleave`."""
    return rows.view(num_heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
