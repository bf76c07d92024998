"""Model configs in GGUF metadata: llama.cpp's keys for those of a Hugging Face config.json, both ways.

Owns sizes, rope scaling, and the keys that would change the computation. Token ids are `tokenizer`'s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unmask.errors import CheckpointError
from unmask.models.arch.config import RopeConfig
from unmask.models.arch.layers import rope_frequencies
from unmask.models.families.rope_keys import read_rope

ARCHITECTURES: Mapping[str, str] = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""llama.cpp's architectures that are read and written, which are called as our families, and transformers' class of each."""
# Keys of an architecture and their fields in config.json.
_SIZES: Mapping[str, str] = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
}  # fmt: skip
# Keys that change the computation, and the value with which they do not.
_NEUTRAL: Mapping[str, float] = {
    "expert_count": 0, "attention.sliding_window": 0, "logit_scale": 1, "residual_scale": 1, "embedding_scale": 1,
    "attention.scale": 0, "attn_logit_softcapping": 0, "final_logit_softcapping": 0, "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1, "rope.scaling.yarn_log_multiplier": 0, "rope.scaling.alpha": 0,
}  # fmt: skip
# What llama.cpp's converter takes for the scaling of Llama 3, which a file holds as factors of frequencies only.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_YARN_KEYS: Mapping[str, tuple[str, float]] = {"yarn_beta_fast": ("beta_fast", 32.0), "yarn_beta_slow": ("beta_slow", 1.0)}


class Metadata:
    """The metadata of a GGUF file; what lacks or does not fit is an error that names key and file."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self._source = source

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise self.error(f"lacks the metadata key {key!r}; get it again")
        return self.values[key]

    def error(self, what: str) -> CheckpointError:
        """The error of a file that `what` is said of."""
        return CheckpointError(f"{self._source} {what}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; layers that differ have a list there."""
        value = default if default is not None and key not in self.values else self[key]
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(f"has {key} {value!r}; only one whole number for all layers can be read")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number: of float32, the shortest decimal that rounds to it, which is what the authors wrote (1e-05)."""
        value = default if default is not None and key not in self.values else self[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"has {key} {value!r}; it must be a number")
        return float(np.format_float_scientific(np.float32(value)))

    def architecture(self) -> str:
        """The architecture, one of `ARCHITECTURES`, of a file that is whole."""
        name = self["general.architecture"]
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise self.error(f"holds architecture {name!r}; only dense models of {known} can be read")
        parts = self.integer("split.count", 1)
        if parts > 1:
            raise self.error(f"is one of {parts} parts; join them first: llama-gguf-split --merge")
        for key, neutral in _NEUTRAL.items():
            if self.values.get(f"{name}.{key}", neutral) != neutral:
                value = self.values[f"{name}.{key}"]
                raise self.error(f"has {name}.{key} {value!r}, which is not supported; take another model")
        return str(name)

    def hf_config(
        self, *, vocab_size: int, biased: Collection[str], tied_head: bool, factors: NDArray[Any] | None
    ) -> dict[str, Any]:
        """The Hugging Face config but for token ids.

        Args:
            vocab_size: rows of the embedding.
            biased: Hugging Face's names of the projections of a layer that have biases.
            tied_head: there is no head in the file.
            factors: what the file divides rotary frequencies by, if anything.
        """
        arch = self.architecture()
        sizes = {field: self.integer(f"{arch}.{key}") for key, field in _SIZES.items()}
        heads = sizes["num_attention_heads"]
        head_dim = self.integer(f"{arch}.attention.key_length", sizes["hidden_size"] // max(heads, 1))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.integer(f"{arch}.{key}", head_dim) != head_dim:
                value = self[f"{arch}.{key}"]
                raise self.error(f"has {arch}.{key} {value}; it must be the head's size, {head_dim}")
        return {
            "architectures": [ARCHITECTURES[arch]],
            "model_type": arch,
            "vocab_size": vocab_size,
            **sizes,
            "num_key_value_heads": self.integer(f"{arch}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.number(f"{arch}.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.number(f"{arch}.rope.freq_base", 10_000.0),
            "rope_scaling": self._rope_scaling(arch, head_dim, factors),
            "tie_word_embeddings": tied_head,
            # Those of Qwen2 are there without a key.
            **({} if arch == "qwen2" else {"attention_bias": "q_proj" in biased}),
            **({"mlp_bias": "up_proj" in biased} if arch == "llama" else {}),
        }

    def _rope_scaling(self, arch: str, head_dim: int, factors: NDArray[Any] | None) -> dict[str, Any] | None:
        """The rope scaling of a Hugging Face config; None: positions are as they are."""
        prefix = f"{arch}.rope.scaling"
        kind = self.values.get(f"{prefix}.type", "none")
        if factors is not None and kind in ("none", "llama3"):
            scaling = _LLAMA3 | {"rope_type": "llama3", "factor": round(float(factors.max()), 4)}
            original = f"{prefix}.original_context_length"
            scaling["original_max_position_embeddings"] = self.integer(
                original, int(_LLAMA3["original_max_position_embeddings"])
            )
            keys = {"rope_theta": self.number(f"{arch}.rope.freq_base", 10_000.0), "rope_scaling": scaling}
            expected = llama3_factors(read_rope(keys, max_positions=0, default_fraction=1.0), head_dim)
            if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-3):
                raise self.error("scales its rotary frequencies by factors other than Llama 3's; not supported")
            return scaling
        if kind == "none" and f"{arch}.rope.scale_linear" not in self.values:
            return None
        if kind not in ("none", "linear", "yarn") or factors is not None:
            raise self.error(f"has {prefix}.type {kind!r}; only none, linear, yarn and Llama 3's can be read")
        if kind != "yarn":
            return {
                "rope_type": "linear",
                "factor": self.number(f"{prefix}.factor", self.values.get(f"{arch}.rope.scale_linear")),
            }
        factor = self.number(f"{prefix}.factor")
        yarn: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        yarn["original_max_position_embeddings"] = self.integer(f"{prefix}.original_context_length")
        if f"{prefix}.attn_factor" in self.values:
            yarn["attention_factor"] = self.number(f"{prefix}.attn_factor") * _yarn_factor(factor)
        return yarn | {field: self.number(f"{prefix}.{key}", default) for key, (field, default) in _YARN_KEYS.items()}


def llama3_factors(rope: RopeConfig, rotary_dim: int) -> NDArray[np.float32]:
    """What rope scaling of kind llama3 divides the frequency of each rotating pair by."""
    plain, scaled = (rope_frequencies(each, rotary_dim)[0] for each in (RopeConfig(theta=rope.theta), rope))
    factors: NDArray[np.float32] = (plain / scaled).numpy()
    return factors


def _yarn_factor(factor: float) -> float:
    """YaRN's own attention factor: llama.cpp multiplies it by the file's, transformers takes the product."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def gguf_metadata(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a dense model's config, but for its tokenizer: whole numbers, floats and texts by llama.cpp's keys.

    Args:
        hf: as `registry.write_config` writes it for a family in `ARCHITECTURES`.
    """
    arch, head_dim = hf["model_type"], hf["head_dim"]
    own: dict[str, Any] = {key: hf[field] for key, field in _SIZES.items()} | {
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "rope.freq_base": float(hf["rope_theta"]),
        "rope.dimension_count": head_dim,
        "vocab_size": hf["vocab_size"],
    }
    scaling = hf["rope_scaling"] or {}
    kind = scaling.get("rope_type")
    if kind == "llama3":
        # llama.cpp reads the factors (`layout.ROPE_FACTORS`); this says for which length they were made.
        own["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    elif kind is not None:
        own |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        own["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
        own |= {f"rope.scaling.{key}": float(scaling[field]) for key, (field, _) in _YARN_KEYS.items()}
        if "attention_factor" in scaling:
            own["rope.scaling.attn_factor"] = scaling["attention_factor"] / _yarn_factor(scaling["factor"])
    return {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in own.items()}}
