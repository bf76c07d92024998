"""Layouts of tensor parallelism: which part of each parameter a tensor rank computes with.

Owns the rules, and the way between a whole parameter of `Transformer` and its parts. Knows nothing of processes.

Linear layers come in pairs, Megatron's way: the first (`qkv`, `gate_up`) is split by outputs, the second (`out`, `down`) by
inputs, so that a pair sums over ranks once. A fused layer is split within each of its sections: a rank holds the queries, keys
and values of its kv heads, and the gate and up rows of its features. Embedding and head are split over the vocabulary, which is
padded with zeros where it does not divide.

Source: Megatron-LM (1909.08053) section 3; sequence-parallel norms 2205.05198.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.models.arch.attention import Attention
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.layers import FeedForward, GatedLoraLinear, RMSNorm
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.adapter import LoraLinear


@dataclass(frozen=True)
class Layout:
    """Layout of one parameter over tensor ranks.

    Attributes:
        dim: dimension that is split; None: every rank holds all of it.
        sections: sizes of the fused parts along `dim`, in order; each is split evenly (the last rank's share may be padded).
        partial: a rank's gradient is a part of the sum (of an unsplit parameter).
        once: only the first rank adds it: the bias of a layer that is split by inputs.
    """

    dim: int | None = None
    sections: tuple[int, ...] = ()
    partial: bool = False
    once: bool = False

    def widths(self, size: int) -> list[int]:
        """A rank's share of each section, with padding, among `size` ranks."""
        return [-(-section // size) for section in self.sections]

    def spans(self, rank: int, size: int) -> list[tuple[int, int]]:
        """Of each section, the range of the whole parameter (along `dim`) that a rank holds; without padding."""
        starts = [sum(self.sections[:number]) for number in range(len(self.sections))]
        shares = zip(starts, self.sections, self.widths(size), strict=True)
        return [(start + min(rank * width, length), start + min((rank + 1) * width, length)) for start, length, width in shares]

    def part(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """A rank's part of a whole parameter, in memory of its own."""
        if self.dim is None:
            return whole.detach().clone()
        pieces = []
        for (start, stop), width in zip(self.spans(rank, size), self.widths(size), strict=True):
            piece = whole.detach().narrow(self.dim, start, stop - start)
            padding = (0, 0) * (whole.ndim - 1 - self.dim) + (0, width - (stop - start))
            pieces.append(F.pad(piece, padding))
        return torch.cat(pieces, dim=self.dim)

    def runs(self, size: int) -> list[tuple[int, int, int]]:
        """Runs of all ranks' parts one behind the other: (start among them, start in the whole parameter, length)."""
        runs, own = [], 0
        for rank in range(size):
            for (start, stop), width in zip(self.spans(rank, size), self.widths(size), strict=True):
                if stop > start:
                    runs.append((own, start, stop - start))
                own += width
        return runs

    def restore(self, gathered: Tensor, size: int) -> Tensor:
        """The whole parameter as `Transformer` has it, of all ranks' parts one behind the other (along `dim`)."""
        if self.dim is None:
            return gathered
        in_order = sorted(self.runs(size), key=lambda run: run[1])
        return torch.cat([gathered.narrow(self.dim, own, length) for own, _, length in in_order], self.dim)


def tensor_layouts(model: Transformer) -> dict[str, Layout]:
    """Layout of every parameter, by name, but for routed experts, routers and the mask vector.

    Those stay plain parameters: every tensor rank has all of them, and computes all of their gradient.
    The same before and after the model is split: sizes are those of its config.
    """
    config = model.config
    vocabulary = Layout(0, (config.vocab_size,))
    layouts = {"embed.weight": vocabulary}
    if model.lm_head is not None:
        layouts["lm_head.weight"] = vocabulary
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            layouts[f"{name}.weight"] = Layout(partial=True)
        elif isinstance(module, Attention):
            features = config.num_heads * config.head_dim
            kv = config.num_kv_heads * config.head_dim
            layouts |= _prefixed(f"{name}.qkv", _by_outputs(module.qkv, (features, kv, kv)))
            layouts |= _prefixed(f"{name}.out", _by_inputs(module.out, features))
        elif isinstance(module, FeedForward):
            size = _ffn_size(config, shared=name.endswith(".shared"))
            layouts |= _prefixed(f"{name}.gate_up", _by_outputs(module.gate_up, (size, size)))
            layouts |= _prefixed(f"{name}.down", _by_inputs(module.down, size))
    return layouts


def _ffn_size(config: ModelConfig, *, shared: bool) -> int:
    """Features of a dense feed-forward, or of the shared expert."""
    if not shared:
        return config.ffn_size
    assert config.moe is not None
    return config.moe.expert_size * config.moe.num_shared


def _by_outputs(layer: nn.Linear, sections: tuple[int, ...]) -> dict[str, Layout]:
    """Layouts of a linear layer that is split by outputs."""
    split, shared = Layout(0, sections), Layout(partial=True)
    layouts = {"weight": split, **({} if layer.bias is None else {"bias": split})}
    if isinstance(layer, GatedLoraLinear):
        layouts |= {"gated_in": shared, "gated_out": split}
    if isinstance(layer, LoraLinear):
        fused = len(layer.parts) == 1
        assert fused or len(layer.parts) == len(sections), "an adapter has a part for the layer, or for each section of it"
        layouts |= {f"lora_a.{number}": shared for number in layer.lora_a}
        layouts |= {f"lora_b.{number}": split if fused else Layout(0, (sections[int(number)],)) for number in layer.lora_b}
    return layouts


def _by_inputs(layer: nn.Linear, size: int) -> dict[str, Layout]:
    """Layouts of a linear layer that is split by inputs."""
    split, shared = Layout(1, (size,)), Layout(partial=True)
    layouts = {"weight": split, **({} if layer.bias is None else {"bias": Layout(partial=True, once=True)})}
    if isinstance(layer, GatedLoraLinear):
        layouts |= {"gated_in": split, "gated_out": shared}
    if isinstance(layer, LoraLinear):
        layouts |= {f"lora_a.{number}": split for number in layer.lora_a}
        layouts |= {f"lora_b.{number}": shared for number in layer.lora_b}
    return layouts


def _prefixed(prefix: str, layouts: dict[str, Layout]) -> dict[str, Layout]:
    return {f"{prefix}.{name}": layout for name, layout in layouts.items()}
