"""Tiny random models and hand-made packed rows for tests. Knows neither checkpoints nor data sources."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unmask.engine.request import Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.config import ModelConfig, MoEConfig, RopeConfig
from unmask.models.arch.moe import MoE
from unmask.models.arch.transformer import Transformer

VOCAB = 61
MASK = 57
FAMILIES = ("llama", "qwen2", "qwen3", "llada2")


def with_params(request: Request, **changes: Any) -> Request:
    """The request with other decoding options."""
    return replace(request, params=request.params.replace(**changes))


def tiny_config(family: str, **changes: object) -> ModelConfig:
    """The smallest model that has everything `family` has; `changes` are `ModelConfig` fields."""
    base = ModelConfig(
        family="bailing_moe_v2" if family == "llada2" else family,
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_size=48,
        max_positions=128,
    )
    per_family: dict[str, dict[str, object]] = {
        "llama": {},
        "qwen2": {"qkv_bias": True, "tied_head": True},
        "qwen3": {"qk_norm": True, "num_kv_heads": 4},
        "llada2": {
            "qk_norm": True,
            "num_layers": 3,
            "rope": RopeConfig(theta=600_000.0, fraction=0.5),
            "moe": MoEConfig(num_experts=8, num_active=2, expert_size=16, num_groups=4, num_active_groups=2, routed_scale=2.5),
        },
    }
    return replace(base, **(per_family[family] | changes))  # type: ignore[arg-type]


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, *, std: float = 0.4, **changes: object
) -> Transformer:
    """A `tiny_config` model with weights N(0, std^2), large enough that predictions are decisive and varied."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(tiny_config(family, **changes))
    for name, parameter in model.named_parameters():
        if not name.endswith("norm.weight"):
            nn.init.normal_(parameter, std=std, generator=generator)
    for module in model.modules():
        if isinstance(module, MoE):
            module.expert_bias.normal_(std=0.1, generator=generator)
    return model.to(dtype).eval()


def perturb(model: Transformer) -> Transformer:
    """Change every trainable tensor as training could have done, by N(0, 0.3^2)."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.3, generator=generator))
    return model


@torch.no_grad()
def causal_logits(model: Transformer, length: int = 24) -> Tensor:
    """Next-token logits [1, T, V] of tokens 0 .. length - 1."""
    positions = torch.arange(length)[None]
    causal = torch.ones(1, length, length, dtype=torch.bool).tril()
    return model.head(model(positions, positions, DenseAttend(causal)))


def row_errors(found: Tensor, expected: Tensor) -> Tensor:
    """The relative error of every row."""
    return torch.linalg.vector_norm(found - expected, dim=-1) / torch.linalg.vector_norm(expected, dim=-1)


def request_of(length: int, max_new_tokens: int, *, priority: int = 0, start: int = 0) -> Request:
    """Blocks of four tokens, one token a step; a prompt that no other begins like, unless `start` is the same."""
    ids = tuple((start + 7 * i) % MASK for i in range(length))
    params = ResolvedParams(block_size=4, steps=4, threshold=1.0, max_new_tokens=max_new_tokens)
    return Request(ids, params, priority=priority)


def prompt_of(length: int, max_new_tokens: int, *eos: int, rules: ResolvedParams = ResolvedParams()) -> Request:
    """A random prompt, the same for every call with this length."""
    generator = torch.Generator().manual_seed(100 + length)
    ids = torch.randint(0, MASK, (length,), generator=generator).tolist()
    return Request(tuple(ids), rules.replace(max_new_tokens=max_new_tokens), frozenset(eos))


@dataclass(frozen=True)
class Doc:
    """A document of packed rows: its tokens, which of them may be masked, and its identity."""

    tokens: tuple[int, ...]
    maskable: tuple[bool, ...]
    ordinal: int
    epoch: int = 0


def text(length: int, ordinal: int, *, prompt: int = 0, epoch: int = 0) -> Doc:
    """A document of random tokens (a function of `ordinal`) whose first `prompt` tokens are never masked."""
    drawn = random.Random(ordinal)
    tokens = tuple(drawn.randrange(MASK) for _ in range(length))
    return Doc(tokens, tuple(i >= prompt for i in range(length)), ordinal, epoch)


@dataclass(frozen=True, eq=False)
class Rows:
    """What `diffusion.corrupt` reads, all [R, L]."""

    tokens_RL: Tensor
    segment_RL: Tensor
    position_RL: Tensor
    maskable_RL: Tensor
    epoch_RL: Tensor
    ordinal_RL: Tensor

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start .. stop - 1`."""
        return Rows(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))

    def places(self) -> Iterator[tuple[tuple[int, int], slice, int]]:
        """Every document: ((epoch, ordinal), where in its row, row)."""
        for row in range(len(self.tokens_RL)):
            for segment in range(1, int(self.segment_RL[row].max()) + 1):
                columns = torch.nonzero(self.segment_RL[row] == segment)[:, 0]
                at = slice(int(columns[0]), int(columns[-1]) + 1)
                yield (int(self.epoch_RL[row, at.start]), int(self.ordinal_RL[row, at.start])), at, row


def pack(docs_of_rows: Sequence[Sequence[Doc]], length: int, *, pad: int = 0) -> Rows:
    """Lay the documents of each row end to end in rows of `length` tokens, padded at the end."""
    shape = (len(docs_of_rows), length)
    tokens = torch.full(shape, pad)
    segment, position, epoch, ordinal = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
    maskable = torch.zeros(shape, dtype=torch.bool)
    for row, docs in enumerate(docs_of_rows):
        start = 0
        for number, doc in enumerate(docs, start=1):
            at = (row, slice(start, start + len(doc.tokens)))
            tokens[at], maskable[at] = torch.tensor(doc.tokens), torch.tensor(doc.maskable)
            segment[at], position[at] = number, torch.arange(len(doc.tokens))
            epoch[at], ordinal[at] = doc.epoch, doc.ordinal
            start += len(doc.tokens)
        assert start <= length, f"documents of {start} tokens do not fit a row of {length}"
    return Rows(tokens, segment, position, maskable, epoch, ordinal)
