"""LoRA: low-rank updates of the linear layers, folded back into the weights for saving.

Owns the adapted layer and its attachment. Knows nothing of training or files.

Legend: D inputs, F outputs, R rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.errors import ConfigError
from unmask.models.config import ModelConfig
from unmask.models.transformer import Transformer


class LoraLinear(nn.Linear):
    """A linear layer plus `alpha / rank * B A` for each of its fused parts.

    Fused projections (query-key-value, gate-up) get an independent pair per part, as if the parts were separate layers.
    The frozen weight keeps its name, so a checkpoint of the base still fits.
    """

    def __init__(self, base: nn.Linear, parts: tuple[int, ...], *, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        assert sum(parts) == base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scale = alpha / rank
        like = base.weight
        bound = math.sqrt(3.0 / base.in_features)
        self.lora_a = nn.ParameterList(
            torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator).to(like) for _ in parts
        )
        self.lora_b = nn.ParameterList(torch.zeros(rows, rank).to(like) for rows in parts)

    def forward(self, x: Tensor) -> Tensor:
        updates = [F.linear(F.linear(x, a), b) for a, b in zip(self.lora_a, self.lora_b, strict=True)]
        return F.linear(x, self.weight, self.bias) + torch.cat(updates, dim=-1) * self.scale

    def delta(self) -> Tensor:
        """The update of the weight, float32 [F, D]."""
        products = [b.float() @ a.float() for a, b in zip(self.lora_a, self.lora_b, strict=True)]
        return torch.cat(products) * self.scale


def fused_parts(name: str, layer: nn.Linear, config: ModelConfig) -> tuple[int, ...]:
    """Output rows of each projection fused into `layer` (its name's last part says which)."""
    if name.endswith("attention.qkv"):
        return (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
    if name.endswith("gate_up"):
        return (layer.out_features // 2, layer.out_features // 2)
    return (layer.out_features,)


def attach_lora(model: Transformer, *, rank: int, alpha: float, seed: int, train_embedding: bool) -> Transformer:
    """Freeze the model and adapt every linear layer of attention and the dense feed-forwards, in place.

    Args:
        model: whose linear layers are replaced; routed experts stay frozen.
        rank: R.
        alpha: the update is scaled by alpha / rank.
        seed: of A; B starts at zero, so the model computes what it did before.
        train_embedding: leave the embedding (and an untied head) trainable: a new mask token needs it.

    Returns:
        `model`.

    Source: LoRA (2106.09685) Eq. 3.
    """
    if rank < 1:
        raise ConfigError(f"LoRA rank is {rank}; it must be at least 1")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks." in name]
    for name, layer in linears:
        parent, _, child = name.rpartition(".")
        parts = fused_parts(name, layer, model.config)
        setattr(model.get_submodule(parent), child, LoraLinear(layer, parts, rank=rank, alpha=alpha, generator=generator))
    if train_embedding:
        model.embed.weight.requires_grad_(True)
        model.head_weight.requires_grad_(True)
    return model


@torch.no_grad()
def folded_state(model: Transformer) -> dict[str, Tensor]:
    """The model's state with every adapter folded into its weight: names and shapes of the model without adapters."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            state[f"{name}.weight"] = (layer.weight.float() + layer.delta()).to(layer.weight.dtype)
    return state
