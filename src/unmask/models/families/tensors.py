"""Tensor names on disk: where each tensor of a checkpoint lies inside our fused parameters.

Owns the layers that families share. Which names a family uses is told by `base.ModelFamily`; knows no file and no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from unmask.models.arch.config import ModelConfig


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor on disk belongs: `state_dict()[parameter][index]`, which has shape `shape`."""

    parameter: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]

    def view(self, state: Mapping[str, Tensor]) -> Tensor:
        """The tensor as a view of our state dict."""
        return state[self.parameter][self.index]


def misfits(expected: Mapping[str, StoredTensor], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with the tensors of a file or folder, for messages; empty: they are those of an architecture.

    Args:
        expected: of the architecture, by names on disk.
        found: shapes by name.
    """
    problems = [f"missing: {name}" for name in expected if name not in found]
    problems += [f"unexpected: {name}" for name in found if name not in expected]
    for name, shape in found.items():
        if name in expected and tuple(shape) != expected[name].shape:
            problems.append(f"wrong shape: {name} is {list(shape)}, must be {list(expected[name].shape)}")
    return problems


def attention_tensors(config: ModelConfig, disk: str, ours: str, names: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Projections and norms of one attention layer.

    Args:
        config: sizes, biases and whether there are query and key norms.
        disk: prefix of the names on disk.
        ours: prefix of our parameters.
        names: what the family calls `out`, `query_norm` and `key_norm`, and `qkv` or each of `q`, `k` and `v`.
    """
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows_of = {
        "qkv": (0, config.qkv_size),
        "q": (0, q_rows),
        "k": (q_rows, q_rows + kv_rows),
        "v": (q_rows + kv_rows, config.qkv_size),
    }
    hidden = config.hidden_size
    tensors: dict[str, StoredTensor] = {}
    for part, rows in rows_of.items():
        if part in names:
            tensors |= _linear_tensors(f"{disk}.{names[part]}", f"{ours}.qkv", rows, hidden, bias=config.qkv_bias)
    tensors |= _linear_tensors(f"{disk}.{names['out']}", f"{ours}.out", (0, hidden), q_rows, bias=config.out_bias)
    if config.qk_norm:
        for norm in ("query_norm", "key_norm"):
            tensors[f"{disk}.{names[norm]}.weight"] = StoredTensor(f"{ours}.{norm}.weight", (), (config.head_dim,))
    return tensors


def feed_forward_tensors(hidden: int, ffn: int, disk: str, ours: str, *, bias: bool = False) -> dict[str, StoredTensor]:
    """Gate, up and down projections of one dense feed-forward layer."""
    return {
        **_linear_tensors(f"{disk}.gate_proj", f"{ours}.gate_up", (0, ffn), hidden, bias=bias),
        **_linear_tensors(f"{disk}.up_proj", f"{ours}.gate_up", (ffn, 2 * ffn), hidden, bias=bias),
        **_linear_tensors(f"{disk}.down_proj", f"{ours}.down", (0, hidden), ffn, bias=bias),
    }


def _linear_tensors(disk: str, ours: str, rows: tuple[int, int], columns: int, *, bias: bool) -> dict[str, StoredTensor]:
    """Weight and bias of a linear layer on disk, which is rows `rows[0]..rows[1]` of ours."""
    index, count = (slice(*rows),), rows[1] - rows[0]
    tensors = {f"{disk}.weight": StoredTensor(f"{ours}.weight", index, (count, columns))}
    if bias:
        tensors[f"{disk}.bias"] = StoredTensor(f"{ours}.bias", index, (count,))
    return tensors


def gated_lora_tensors(tensors: Mapping[str, StoredTensor], rank: int, hidden: int) -> dict[str, StoredTensor]:
    """The gated LoRA of every linear layer among `tensors`, and the mask vector; on disk they keep the names they have here."""
    sizes = dict[str, tuple[int, int]]()
    for tensor in tensors.values():
        if tensor.parameter.startswith("blocks.") and len(tensor.shape) == 2:
            layer = tensor.parameter.removesuffix(".weight")
            sizes[layer] = (sizes.get(layer, (0, 0))[0] + tensor.shape[0], tensor.shape[1])
    gated = {"gated.mask_vector": StoredTensor("mask_vector", (), (hidden,))}
    for layer, (outputs, inputs) in sizes.items():
        gated[f"gated.{layer}.in"] = StoredTensor(f"{layer}.gated_in", (), (rank, inputs))
        gated[f"gated.{layer}.out"] = StoredTensor(f"{layer}.gated_out", (), (outputs, rank))
    return gated
