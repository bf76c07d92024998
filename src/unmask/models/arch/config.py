"""Model configuration: the architecture as one frozen record.

Owns `ModelConfig` and its validation. Knows nothing of files, of Hugging Face key names (see `families`), or of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from unmask.errors import ConfigError

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base, share of the head that rotates, and context-length scaling."""

    theta: float = 10_000.0
    fraction: float = 1.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _positive("rope theta", self.theta)
        _positive("rope factor", self.factor)
        if not 0.0 < self.fraction <= 1.0:
            raise ConfigError(f"partial rotary factor is {self.fraction}; it must lie in (0, 1]")
        if self.kind in ("llama3", "yarn") and self.original_max_positions is None:
            raise ConfigError(f"rope scaling '{self.kind}' needs original_max_position_embeddings")
        for name in ("original_max_positions", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if value is not None:
                _positive(name, value)
        if self.kind == "yarn" and not self.theta > 1:
            raise ConfigError(f"rope theta is {self.theta}; with YaRN it must be more than 1")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor is {self.low_freq_factor}; it must be less than high_freq_factor, {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts with the group-limited sigmoid router of Ling 2.0: group, select, normalise, scale.

    With block routing (LLaDA2.2) `expert_capacity` experts are open to the tokens of a block, in place of the groups; None: it
    is off.
    """

    num_experts: int
    num_active: int
    expert_size: int
    num_shared: int = 1
    num_groups: int = 1
    num_active_groups: int = 1
    routed_scale: float = 1.0
    normalize: bool = True
    num_dense_layers: int = 1
    expert_capacity: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_active", "expert_size", "num_groups", "num_active_groups"):
            _positive(name, getattr(self, name))
        if self.num_experts % self.num_groups:
            raise ConfigError(f"{self.num_experts} experts do not split into {self.num_groups} equal groups")
        eligible = self.num_experts // self.num_groups * self.num_active_groups
        if self.num_active_groups > self.num_groups or self.num_active > eligible:
            raise ConfigError(
                f"top {self.num_active} of {self.num_active_groups}/{self.num_groups} groups of {self.num_experts} "
                f"experts: only {eligible} are eligible"
            )
        if self.expert_capacity is not None and not self.num_active <= self.expert_capacity <= self.num_experts:
            raise ConfigError(
                f"expert_capacity is {self.expert_capacity}; it must lie between the {self.num_active} experts of a token and "
                f"all {self.num_experts}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of any supported family.

    `mask_id` and `block_size` are None for an autoregressive model. A diffusion model with a `start_id` is *shifted*: at
    position p it reads token p - 1 (the start token at position 0) and predicts token p, as its autoregressive parent did, and
    attention is causal before the block being decoded. Without a `start_id` it reads and predicts token p, and attention is
    bidirectional in every block. A `gated_lora_rank` adds LoRA of that rank to every linear layer, for noisy rows only
    (`arch.gated_lora`). `token_editing` says that it was trained to replace decided tokens (LLaDA2.1), and `delete_id` and
    `insert_id` are the tokens by which one was trained to delete and insert them (LLaDA2.2). `hf_extras`
    holds Hugging Face keys that change no result (initializer range, dropout 0, ...) so that a saved config keeps them.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    norm_eps: float = 1e-6
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    moe: MoEConfig | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    mask_id: int | None = None
    block_size: int | None = None
    start_id: int | None = None
    gated_lora_rank: int | None = None
    token_editing: bool = False
    delete_id: int | None = None
    insert_id: int | None = None
    hf_extras: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size",
            "max_positions", "norm_eps",
        ):  # fmt: skip
            _positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} attention heads are not a multiple of {self.num_kv_heads} kv heads")
        if self.rotary_dim % 2:
            raise ConfigError(f"rotary dimension {self.rotary_dim} is odd; head_dim x partial_rotary_factor must be even")
        named = {"mask": self.mask_id, "start": self.start_id, "delete": self.delete_id, "insert": self.insert_id}
        for name, token in named.items():
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(f"{name} token id {token} is outside the embedding (0..{self.vocab_size - 1})")
        if self.shifted and self.mask_id is None:
            raise ConfigError(f"start token id is {self.start_id}, but mask_id is None; only diffusion models are shifted")
        if self.block_size is not None:
            _positive("block_size", self.block_size)
        if self.gated_lora_rank is not None:
            _positive("gated_lora_rank", self.gated_lora_rank)
            if not self.shifted or self.moe is not None:
                raise ConfigError(
                    f"gated_lora_rank is {self.gated_lora_rank}; only a dense, shifted diffusion model has gated LoRA"
                )

    @property
    def shifted(self) -> bool:
        """Whether the model reads token p - 1 at position p, and its context causally."""
        return self.start_id is not None

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that rotate."""
        return int(self.head_dim * self.rope.fraction)

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query-key-value projection."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) routes through experts."""
        return self.moe is not None and layer >= self.moe.num_dense_layers

    def with_diffusion(self, *, mask_id: int, block_size: int, start_id: int | None = None) -> ModelConfig:
        """The same architecture as a block-diffusion model; with a `start_id` a shifted one."""
        return replace(self, mask_id=mask_id, block_size=block_size, start_id=start_id)

    def with_expert_capacity(self, expert_capacity: int) -> ModelConfig:
        """The same mixture of experts with block routing.

        Raises:
            ConfigError: the model is dense, or the capacity lies outside its range.
        """
        if self.moe is None:
            raise ConfigError(f"expert_capacity is {expert_capacity}; only mixtures of experts have block routing")
        return replace(self, moe=replace(self.moe, expert_capacity=expert_capacity))

    def inputs(self, tokens: Sequence[int], start: int, stop: int) -> Sequence[int]:
        """Input tokens at positions `start..stop` of a sequence; of a shifted model, the tokens one position earlier."""
        if self.start_id is None:
            return tokens[start:stop]
        return [self.start_id, *tokens[: stop - 1]] if start == 0 else tokens[start - 1 : stop - 1]


_LARGEST = 2**31 - 1
_MOST = {
    "num_layers": 10_000, "num_experts": 10_000, "vocab_size": _LARGEST, "max_positions": _LARGEST,
    "original_max_positions": _LARGEST,
}  # fmt: skip
"""Bounds for damaged configs: every layer and expert has names in tables, and sizes become numbers of 64 bits."""


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} is {value}; it must be positive")
    if value > _MOST.get(name, value):
        raise ConfigError(f"{name} is {value}; it must be at most {_MOST[name]:,}")
