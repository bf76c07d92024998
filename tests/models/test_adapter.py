"""LoRA: starts as the identity, trains what it should, folds into exactly what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tiny import FAMILIES, tiny_model
from unmask.errors import ConfigError
from unmask.models.adapter import LoraLinear, attach_lora, folded_state
from unmask.models.attention import DenseAttend
from unmask.models.transformer import Transformer


def logits(model: Transformer) -> Tensor:
    tokens = torch.arange(12)[None] % 50
    causal = torch.ones(1, 12, 12, dtype=torch.bool).tril()
    return model.head(model(tokens, torch.arange(12)[None], DenseAttend(causal)))


def perturb(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_b" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_base_and_folds_into_what_it_computes(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    before = logits(model)
    attach_lora(model, rank=3, alpha=6.0, seed=0, train_embedding=True)
    assert torch.equal(logits(model), before)
    perturb(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1
    folded = tiny_model(family, dtype=torch.float64)
    folded.load_state_dict(folded_state(model))
    assert torch.allclose(logits(folded), adapted, atol=1e-4)


def test_fused_projections_have_one_pair_per_part() -> None:
    model = attach_lora(tiny_model("llama"), rank=2, alpha=4.0, seed=0, train_embedding=False)
    config = model.config
    qkv, gate_up = model.blocks[0].attention.qkv, model.blocks[0].mlp.gate_up
    assert isinstance(qkv, LoraLinear)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    assert [b.shape[0] for b in qkv.lora_b] == [count * config.head_dim for count in heads]
    assert [b.shape[0] for b in gate_up.lora_b] == [config.ffn_size] * 2
    assert torch.linalg.matrix_rank(gate_up.delta()) == 0
    perturb(model)
    assert torch.linalg.matrix_rank(gate_up.delta()[: config.ffn_size]) == 2


@pytest.mark.parametrize("train_embedding", [True, False])
def test_only_adapters_and_the_embedding_train(train_embedding: bool) -> None:
    model = attach_lora(tiny_model("llada2"), rank=2, alpha=4.0, seed=0, train_embedding=train_embedding)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"embed.weight", "lm_head.weight"} if train_embedding else set()
    assert {name for name in trainable if ".lora_" not in name} == expected
    assert not any("experts" in name or ".router" in name for name in trainable)


def test_base_weights_keep_their_names() -> None:
    plain = set(tiny_model("qwen2").state_dict())
    model = attach_lora(tiny_model("qwen2"), rank=2, alpha=4.0, seed=0, train_embedding=True)
    assert {name for name in model.state_dict() if ".lora_" not in name} == plain
    assert set(folded_state(model)) == plain


def test_rank_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="rank is 0"):
        attach_lora(tiny_model("llama"), rank=0, alpha=1.0, seed=0, train_embedding=True)
