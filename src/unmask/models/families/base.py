"""A model family: its config keys, its tensor names and its diffusion defaults.

Owns what all families have in common, which is a dense model with Llama's names; a family overrides what differs, in a file of
its own. Knows no file and no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.families.hf_values import eos, flag, integer, number, optional_integer, token
from unmask.models.families.rope_keys import ROPE_KEYS, read_rope, write_rope
from unmask.models.families.tensors import StoredTensor, attention_tensors, feed_forward_tensors, gated_lora_tensors

REMOTE_CODE = "remote_code"
"""The key of config.json of an exported folder with code of its own; what the code needs to know of the family."""
# Keys that every config must have, and their fields in `ModelConfig`.
_SIZES: Mapping[str, str] = {
    "hidden_size": "hidden_size", "vocab_size": "vocab_size", "intermediate_size": "ffn_size",
    "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "max_position_embeddings": "max_positions",
}  # fmt: skip
# Keys that are read, but not written for every model.
_OPTIONAL_KEYS = ROPE_KEYS | {
    "mask_token_id", "block_size", "shift_start_token_id", "gated_lora_rank", "token_editing", "torch_dtype", "dtype",
    "num_nextn_predict_layers", REMOTE_CODE,
}  # fmt: skip
# Keys that change the computation, and the only values for which they do not.
_REQUIRED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "rope_interleave": (None, False),
    "norm_head": (None, False),
    "use_rmsnorm": (None, True),
    "score_function": (None, "sigmoid"),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "moe_router_enable_expert_bias": (None, True),
    "no_rope_layers": (None, []),
    # Ling 2.5 and later: linear and latent attention, clamped experts.
    "layer_group_size": (None, 1),
    "kv_lora_rank": (None,),
    "using_split_qkv_in_self_attention": (None, False),
    "expert_swiglu_limit_list": (None, []),
    "share_expert_swiglu_limit_list": (None, []),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}


class ModelFamily:
    """A family of models as published on Hugging Face; instances hold no state.

    Class attributes: `name` is the `model_type` in config.json, unless the family writes another one, and `architecture` the
    class that transformers runs. `head_dim`,
    `rotary_fraction` (the share of the head that rotates) and `token_editing` are defaults for absent keys. `embedding` and
    `attention` are names of modules on disk, `attention_names` those of the layers inside (see `tensors.attention_tensors`).
    `published` are published sizes: the Hugging Face config of each by name. `optional_keys` are keys of the family's own that
    are not written for every model. `index_required`: programs that read exported
    models look tensors up in the index, so a single file needs one too.
    """

    name: ClassVar[str]
    architecture: ClassVar[str]
    head_dim: ClassVar[int | None] = None
    rotary_fraction: ClassVar[float] = 1.0
    token_editing: ClassVar[bool] = False
    embedding: ClassVar[str] = "model.embed_tokens"
    attention: ClassVar[str] = "self_attn"
    attention_names: ClassVar[Mapping[str, str]] = {
        "q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj", "query_norm": "q_norm", "key_norm": "k_norm",
    }  # fmt: skip
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    optional_keys: ClassVar[frozenset[str]] = frozenset()
    index_required: ClassVar[bool] = False

    def read_own_keys(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """`ModelConfig` fields that this family reads in its own way; they override the shared ones. A key that would
        change the computation is refused here, by name; mind what transformers takes for an absent key."""
        return {}

    def write_own_keys(self, config: ModelConfig) -> dict[str, Any]:
        """The family's own keys of config.json, all that `read_own_keys` reads."""
        return {}

    def for_export(self, config: ModelConfig) -> ModelConfig:
        """The config under which other programs read the same tensors.

        Raises:
            CheckpointError: no other program computes what the model does.
        """
        return config

    def export_notes(self, config: ModelConfig) -> tuple[str, ...]:
        """Where other programs assume what is not so in the exported model."""
        return ()

    def export_files(self, config: ModelConfig, threshold: float) -> dict[str, Any]:
        """Contents, by name, of the JSON files beside an exported diffusion model that other programs take options from."""
        return {}

    def read_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """See `registry.read_config`."""
        _refuse_unsupported(hf)
        sizes = {field: integer(hf, key) for key, field in _SIZES.items()}
        hidden_size, num_heads, max_positions = sizes["hidden_size"], sizes["num_heads"], sizes["max_positions"]
        fields: dict[str, Any] = {
            **sizes,
            "num_kv_heads": integer(hf, "num_key_value_heads", num_heads),
            "head_dim": integer(hf, "head_dim", self.head_dim or hidden_size // max(num_heads, 1)),
            "norm_eps": number(hf, "rms_norm_eps", 1e-6),
            "rope": read_rope(hf, max_positions=max_positions, default_fraction=self.rotary_fraction),
            "tied_head": flag(hf, "tie_word_embeddings", False),
            "bos_id": token(hf, "bos_token_id"),
            "eos_ids": eos(hf, vocab_size=sizes["vocab_size"]),
            "pad_id": token(hf, "pad_token_id"),
            "mask_id": token(hf, "mask_token_id"),
            "block_size": optional_integer(hf, "block_size"),
            "start_id": token(hf, "shift_start_token_id"),
            "gated_lora_rank": optional_integer(hf, "gated_lora_rank"),
            "token_editing": flag(hf, "token_editing", self.token_editing),
        }
        config = ModelConfig(family=self.name, **(fields | self.read_own_keys(hf)))
        if self.rotary_fraction == 1.0 and config.rope.fraction != 1.0:
            raise ConfigError(
                f"partial_rotary_factor is {config.rope.fraction}; family '{self.name}' rotates the whole head (1.0)"
            )
        rotary_dim = optional_integer(hf, "rotary_dim")
        if rotary_dim not in (None, config.rotary_dim):
            raise ConfigError(
                f"rotary_dim is {rotary_dim}, but head_dim x partial_rotary_factor is {config.rotary_dim}; they must agree"
            )
        known_keys = _OPTIONAL_KEYS | self.optional_keys | self.write_config(config, None).keys()
        if REMOTE_CODE in hf:
            known_keys |= {"auto_map"}
        return replace(config, hf_extras={key: value for key, value in hf.items() if key not in known_keys})

    def write_config(self, config: ModelConfig, dtype: str | None) -> dict[str, Any]:
        """See `registry.write_config`."""
        optional = {
            "mask_token_id": config.mask_id,
            "block_size": config.block_size,
            "shift_start_token_id": config.start_id,
            "gated_lora_rank": config.gated_lora_rank,
            "token_editing": None if config.token_editing == self.token_editing else config.token_editing,
            "torch_dtype": dtype,
        }
        return {
            **config.hf_extras,
            "architectures": [self.architecture],
            "model_type": self.name,
            **{key: getattr(config, field) for key, field in _SIZES.items()},
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tied_head,
            "bos_token_id": config.bos_id,
            "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
            "pad_token_id": config.pad_id,
            **write_rope(config.rope, default_fraction=self.rotary_fraction),
            **self.write_own_keys(config),
            **{key: value for key, value in optional.items() if value is not None},
        }

    def remote_code_keys(self, config: ModelConfig) -> dict[str, Any]:
        """What `models.remote_code` needs to know beside the other keys of config.json: names of modules, and their kinds."""
        return {
            "embedding": self.embedding.removeprefix("model."),
            "attention": self.attention,
            "attention_names": dict(self.attention_names),
            "qkv_bias": config.qkv_bias,
            "out_bias": config.out_bias,
            "mlp_bias": config.mlp_bias,
            "qk_norm": config.qk_norm,
            "rotary_dim": config.rotary_dim,
        }

    def tensors(self, config: ModelConfig) -> dict[str, StoredTensor]:
        """See `registry.stored_tensors`."""
        vocabulary, norm = (config.vocab_size, config.hidden_size), (config.hidden_size,)
        tensors = {f"{self.embedding}.weight": StoredTensor("embed.weight", (), vocabulary)}
        for layer in range(config.num_layers):
            disk, ours = f"model.layers.{layer}", f"blocks.{layer}"
            tensors[f"{disk}.input_layernorm.weight"] = StoredTensor(f"{ours}.attention_norm.weight", (), norm)
            tensors |= attention_tensors(config, f"{disk}.{self.attention}", f"{ours}.attention", self.attention_names)
            tensors[f"{disk}.post_attention_layernorm.weight"] = StoredTensor(f"{ours}.mlp_norm.weight", (), norm)
            tensors |= self.mlp_tensors(config, layer, f"{disk}.mlp", f"{ours}.mlp")
        tensors["model.norm.weight"] = StoredTensor("norm.weight", (), norm)
        if not config.tied_head:
            tensors["lm_head.weight"] = StoredTensor("lm_head.weight", (), vocabulary)
        if config.gated_lora_rank is not None:
            tensors |= gated_lora_tensors(tensors, config.gated_lora_rank, config.hidden_size)
        return tensors

    def mlp_tensors(self, config: ModelConfig, layer: int, disk: str, ours: str) -> dict[str, StoredTensor]:
        """The feed-forward of layer `layer`, under the prefixes `disk` and `ours`."""
        return feed_forward_tensors(config.hidden_size, config.ffn_size, disk, ours, bias=config.mlp_bias)

    def ignored_tensors(self, config: ModelConfig) -> re.Pattern[str]:
        """Names that may lie in a checkpoint and are skipped: rotary tables, a tied head, layers for next-token prediction."""
        names = [r"(.*\.)?rotary_emb\.inv_freq"]
        if config.tied_head:
            names.append(r"lm_head\.weight")
        if config.moe is not None:
            # Ling stores its multi-token-prediction layers after the last decoder layer; the main model never runs them.
            names.append(rf"model\.layers\.{config.num_layers}\..*")
        return re.compile("|".join(names))


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    """Raises: ConfigError: a key, of whichever family, whose value changes the computation."""
    for key, allowed in _REQUIRED_VALUES.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise ConfigError(f"{key} is {hf[key]!r}; only {' or '.join(repr(value) for value in allowed)} is supported")
    layer_types = hf.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise ConfigError(f"layer_types is {layer_types!r}; it must be a list")
    other = [kind for kind in layer_types if kind != "full_attention"]
    if other:
        raise ConfigError(f"layer_types holds {other[0]!r}; only 'full_attention' is supported")
    # Qwen switches its window on by `use_sliding_window` from layer `max_window_layers` on; `layer_types` overrides both.
    in_use = hf.get("use_sliding_window", "use_sliding_window" not in hf) and hf.get("sliding_window") is not None
    windowless = optional_integer(hf, "max_window_layers")
    if windowless is not None and windowless >= integer(hf, "num_hidden_layers"):
        in_use = False
    if in_use and not layer_types:
        raise ConfigError(f"sliding_window is {hf['sliding_window']!r} and in use; only full attention is supported")
