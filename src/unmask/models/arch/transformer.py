"""The transformer of every family, for training and inference.

Owns the forward pass from token ids to hidden states, the vocabulary head and its size. The attention pattern and any KV cache
come in as `Attend`; weights come from `weights`; family differences are fields of `ModelConfig`.

Legend: B batch, T tokens, D hidden, V vocabulary, N selected positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from unmask.errors import ConfigError
from unmask.models.arch.attention import Attend, Attention
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.layers import FeedForward, RMSNorm, apply, rope_cos_sin, rope_frequencies
from unmask.models.arch.moe import MoE, TokenBlocks

T = TypeVar("T")

Checkpointing = bool | Literal["selective"]
"""Activation checkpointing: True recomputes each layer for its gradient; selective all but attention and its large products."""


class Layers(Protocol):
    """Hidden states of a stream, or of a part of it: a `Transformer`, or some of its layers."""

    def __call__(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attend: Attend,
        *,
        input_noise: Tensor | None = None,
        noisy_BT: Tensor | None = None,
    ) -> Tensor: ...


class Block(nn.Module):
    """Pre-norm decoder layer: attention, then a dense or routed feed-forward."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp: nn.Module
        if config.moe is not None and config.is_moe_layer(layer):
            self.mlp = MoE(config.hidden_size, config.moe)
        else:
            self.mlp = FeedForward(config.hidden_size, config.ffn_size, bias=config.mlp_bias, rank=config.gated_lora_rank)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend, noisy_BT: Tensor | None = None,
        token_blocks: TokenBlocks | None = None,
    ) -> Tensor:  # fmt: skip
        """One layer; `cos` and `sin` [B, 1, T, R] belong to the positions of `x_BTD`; the others as in `Transformer`."""
        heads = self.before_attention(x_BTD, cos, sin, noisy_BT)
        return self.after_attention(x_BTD, attend(self.layer, *heads), noisy_BT, token_blocks)

    def before_attention(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, noisy_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the layer, as `Attention.project` returns them."""
        return self.attention.project(self.attention_norm(x_BTD), cos, sin, noisy_BT)

    def after_attention(
        self, x_BTD: Tensor, heads_BHTS: Tensor, noisy_BT: Tensor | None = None, token_blocks: TokenBlocks | None = None
    ) -> Tensor:
        """What the layer makes of its input and the attended heads."""
        x_BTD = x_BTD + self.attention.merge(heads_BHTS, noisy_BT)
        normed_BTD = self.mlp_norm(x_BTD)
        if token_blocks is not None and isinstance(self.mlp, MoE):
            routed_BTD: Tensor = self.mlp(normed_BTD, token_blocks)
            return x_BTD + routed_BTD
        return x_BTD + apply(self.mlp, normed_BTD, noisy_BT)


def embed_tokens(
    embed: nn.Embedding, mask_vector: Tensor | None, config: ModelConfig, tokens_BT: Tensor, input_noise: Tensor | None
) -> Tensor:
    """What the first layer reads; a `mask_vector` replaces the embedding of the mask token, `input_noise` is added."""
    x_BTD: Tensor = embed(tokens_BT)
    if mask_vector is not None:
        assert config.mask_id is not None
        x_BTD = torch.where(tokens_BT.eq(config.mask_id)[..., None], mask_vector, x_BTD)
    return x_BTD if input_noise is None else x_BTD + input_noise.to(x_BTD.dtype)


_PRODUCTS = {
    torch.ops.aten.mm.default: 1,
    torch.ops.aten.addmm.default: 2,
    torch.ops.aten.bmm.default: 1,
    torch.ops.aten._grouped_mm.default: 1,
}
"""Matrix products, and which argument is the matrix."""


def keep_products(block: Block) -> Callable[..., CheckpointPolicy]:
    """The policy of selective activation checkpointing: attention and the products of a layer that are costly to recompute.

    Those read hidden states or attended heads. The products behind a feed-forward's gate are recomputed: a dense layer's needs
    nobody, and experts' are wide and cheap.
    """
    attention = block.attention
    inner = {block.attention_norm.weight.shape[0], attention.num_heads * attention.head_dim}

    def policy(_: object, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        matrix = _PRODUCTS.get(op)
        if "attention" in op.name() or (matrix is not None and args[matrix].shape[-2] in inner):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def run_blocks(
    blocks: Iterable[nn.Module],
    x_BTD: Tensor,
    rope: tuple[Tensor, Tensor],
    attend: Attend,
    noisy_BT: Tensor | None,
    token_blocks: TokenBlocks | None = None,
    *,
    checkpointing: Checkpointing,
) -> Tensor:
    """Hidden states after some layers; `rope` are cosines and sines."""
    for block in blocks:
        if checkpointing and torch.is_grad_enabled():
            x_BTD = run_checkpointed(block, x_BTD, *rope, attend, noisy_BT, token_blocks, checkpointing=checkpointing)
        else:
            x_BTD = block(x_BTD, *rope, attend, noisy_BT, token_blocks)
    return x_BTD


def run_checkpointed(block: nn.Module, *args: Any, checkpointing: Checkpointing) -> Tensor:
    """The output of a layer, which runs again, as far as it is not kept, when its gradient is computed."""
    options: dict[str, Any] = {}
    if checkpointing == "selective":
        assert isinstance(block, Block)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep_products(block))
    out: Tensor = checkpoint(block, *args, use_reentrant=False, **options)
    return out


class Transformer(nn.Module):
    """Decoder-only transformer. `forward` computes hidden states; `head` turns selected ones into logits.

    Logits at a position predict the token *at* that position in a diffusion model, the *next* token in an autoregressive one.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # On the meta device there is nothing to compute, and PyTorch would import its compiler to do so: seconds and 70 MB.
        embed_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed: nn.Embedding = nn.Embedding.from_pretrained(
            embed_VD if embed_VD.is_meta else nn.init.normal_(embed_VD), freeze=False
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        # Replaces the embedding of the mask token, so that the parent's embedding matrix stays unchanged.
        self.mask_vector = None if config.gated_lora_rank is None else nn.Parameter(torch.zeros(config.hidden_size))
        self.lm_head = None if config.tied_head else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.device("cpu"):
            inv_freq, self.rope_factor = rope_frequencies(config.rope, config.rotary_dim)
        self.register_buffer("inv_freq", inv_freq.to(embed_VD.device), persistent=False)
        self.activation_checkpointing: Checkpointing = False

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection [V, D], the embedding itself when tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attend: Attend,
        *,
        input_noise: Tensor | None = None,
        noisy_BT: Tensor | None = None,
        token_blocks: TokenBlocks | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens_BT: int64 token ids.
            positions_BT: int64 position of each token, counted from the start of its document.
            attend: attention pattern and cache.
            input_noise: [B, T, D], added to the embedding layer's output (mask-embedding noise).
            noisy_BT: bool, the rows that denoise: gated LoRA applies to them, and nothing else depends on it. None: no row.
            token_blocks: block of each token, in order, for a model with block routing.

        Returns:
            [B, T, D] hidden states in the compute dtype.
        """
        x_BTD = embed_tokens(self.embed, self.mask_vector, self.config, tokens_BT, input_noise)
        if self.mask_vector is None:
            noisy_BT = None
        rope = rope_cos_sin(positions_BT, self.inv_freq, self.rope_factor, x_BTD.dtype)
        x_BTD = run_blocks(
            self.blocks, x_BTD, rope, attend, noisy_BT, token_blocks, checkpointing=self.activation_checkpointing
        )
        out: Tensor = self.norm(x_BTD)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D], in their dtype."""
        return F.linear(hidden, self.head_weight)

    def with_head(self, score: Callable[[Callable[[Tensor], Tensor], Tensor], T], hidden: Tensor) -> T:
        """What `score` makes, in any number of calls, of `head` and hidden states [..., D].

        To FSDP it is one forward pass: how often its ranks communicate does not depend on the number of calls.
        """
        return score(self.head, hidden)

    def num_parameters(self) -> int:
        """Parameters, each counted once (a tied head is free)."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one token touches: all but the experts it is not routed to."""
        idle = 0
        for block in self.blocks:
            if isinstance(block.mlp, MoE):
                per_expert = (block.mlp.gate_up.numel() + block.mlp.down.numel()) // block.mlp.moe.num_experts
                idle += per_expert * (block.mlp.moe.num_experts - block.mlp.moe.num_active)
        return self.num_parameters() - idle


def reconfigured(model: Transformer, config: ModelConfig) -> Transformer:
    """The model of another config that shares the weights of `model`; those that `model` lacks are on the meta device.

    The rotary frequencies are those of `model`.
    """
    with torch.device("meta"):
        other = Transformer(config)
    state = model.state_dict()
    shared = {name: state.get(name, empty) for name, empty in other.state_dict().items()}
    other.load_state_dict(shared, strict=True, assign=True)
    other.inv_freq = model.inv_freq
    return other


def untie_head(model: Transformer) -> None:
    """Give a model with a tied head one of its own, in place: a copy of the embedding."""
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False, device="meta")
    weight = model.embed.weight
    model.lm_head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config = replace(model.config, tied_head=False)


def resize_vocabulary(model: Transformer, new_size: int) -> None:
    """Append tokens to `model` in place; new rows of embedding and head are the mean of the old ones.

    Args:
        model: its embedding and head parameters are replaced, so build optimizers afterwards.
        new_size: number of tokens, at least the present one.

    Raises:
        ConfigError: `new_size` would drop tokens.
    """
    old_size = model.config.vocab_size
    if new_size < old_size:
        raise ConfigError(f"vocabulary size {new_size} is below the model's {old_size}; it can only grow")
    for module in (model.embed, model.lm_head):
        if module is not None:
            rows = module.weight.detach()
            wide = torch.promote_types(rows.dtype, torch.float32)
            mean = rows.mean(0, keepdim=True, dtype=wide).to(rows.dtype)
            grown = torch.cat((rows, mean.expand(new_size - old_size, -1)))
            module.weight = nn.Parameter(grown, requires_grad=module.weight.requires_grad)
    model.embed.num_embeddings = new_size
    if model.lm_head is not None:
        model.lm_head.out_features = new_size
    model.config = replace(model.config, vocab_size=new_size)
