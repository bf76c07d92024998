"""GGUF files of the llama architecture: weights, config and tokenizer in Hugging Face's format.

Owns llama.cpp's names, its permutation of query and key rows, and its tokenizer metadata. Knows nothing of where files
come from or of our parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from unmask.errors import CheckpointError

# gguf.constants.TokenType.CONTROL: a token that plain text never becomes.
_CONTROL = 3
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# How llama.cpp splits text before merging, by its name for it; only what the embedded model needs.
_PRE_TOKENIZER = "smollm"


class GGUFFile:
    """One GGUF file of the llama architecture with a byte-level BPE tokenizer.

    Raises:
        CheckpointError: the file is not GGUF, is cut short, or is of another architecture.
    """

    def __init__(self, path: Path) -> None:
        # Imported where it is used: only the first unpacking of the embedded model needs it, and it costs every start.
        from gguf import GGUFReader

        self.path = path
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not a complete GGUF file ({error}); get it again") from error
        self.metadata: Mapping[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        architecture = self._get("general.architecture")
        if architecture != "llama":
            raise CheckpointError(f"{path} holds architecture {architecture!r}; only 'llama' GGUF files can be read")
        self._tensors = {self._disk_name(tensor.name): tensor for tensor in reader.tensors}

    def names(self) -> list[str]:
        """Hugging Face names of the tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, outermost dimension first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> Tensor:
        """The float32 tensor of a Hugging Face name, dequantized, with Hugging Face's order of query and key rows."""
        from gguf.quants import dequantize

        stored = self._tensors[name]
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).reshape(self.shape(name))
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return values
        num_heads = int(self._get("llama.attention.head_count" + ("_kv" if name.endswith("k_proj.weight") else "")))
        # llama.cpp interleaves the two halves of a head that rotary embedding pairs; Hugging Face keeps them apart.
        return values.view(num_heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)

    def hf_config(self) -> dict[str, Any]:
        """The file's config in Hugging Face keys."""
        heads, hidden = int(self._get("llama.attention.head_count")), int(self._get("llama.embedding_length"))
        if self.metadata.get("llama.rope.scaling.type", "none") != "none":
            raise CheckpointError(f"{self.path} scales its rotary embedding; only unscaled GGUF files can be read")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(self._get("tokenizer.ggml.tokens")),
            "hidden_size": hidden,
            "intermediate_size": int(self._get("llama.feed_forward_length")),
            "num_hidden_layers": int(self._get("llama.block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._get("llama.attention.head_count_kv")),
            "head_dim": int(self.metadata.get("llama.attention.key_length", hidden // heads)),
            "max_position_embeddings": int(self._get("llama.context_length")),
            "hidden_act": "silu",
            # GGUF keeps float32; the shortest decimal that rounds to it is the number the authors wrote (1e-05).
            "rms_norm_eps": float(f"{self._get('llama.attention.layer_norm_rms_epsilon'):.7g}"),
            "rope_theta": float(self._get("llama.rope.freq_base")),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
            "torch_dtype": "float32",
        }

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, rebuilt from the metadata: byte-level BPE over single digits, control tokens special."""
        kind = (self._get("tokenizer.ggml.model"), self._get("tokenizer.ggml.pre"))
        if kind != ("gpt2", _PRE_TOKENIZER):
            raise CheckpointError(f"{self.path} has tokenizer {kind}; only ('gpt2', '{_PRE_TOKENIZER}') can be read")
        tokens = self._get("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._get("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self._get("tokenizer.ggml.token_type")
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        return tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """Content of tokenizer_config.json: named tokens and the chat template."""
        tokens = self._get("tokenizer.ggml.tokens")
        named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: self.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in named.items()}
        template = self.metadata.get("tokenizer.chat_template")
        return {
            **{name: tokens[id_] for name, id_ in ids.items() if id_ is not None},
            "add_prefix_space": False,
            **({} if template is None else {"chat_template": template}),
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(self._get("llama.context_length")),
            # The generic class takes tokenizer.json as it is; GPT2's own would replace the digit splitting.
            "tokenizer_class": "PreTrainedTokenizerFast",
        }

    def _get(self, key: str) -> Any:
        if key not in self.metadata:
            raise CheckpointError(f"{self.path} lacks the metadata key {key!r}; get it again")
        return self.metadata[key]

    def _disk_name(self, gguf_name: str) -> str:
        stem, _, suffix = gguf_name.rpartition(".")
        if stem in _TOP_NAMES:
            return f"{_TOP_NAMES[stem]}.{suffix}"
        parts = stem.split(".")
        if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
            return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{suffix}"
        raise CheckpointError(f"{self.path} holds an unknown tensor {gguf_name!r}; only plain llama models can be read")
