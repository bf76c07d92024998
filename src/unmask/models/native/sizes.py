"""Sizes of packed weights, from the config alone: of every matrix, of all of them in bytes, and of packing them.

Owns which matrices there are. How many bytes one takes is `quantize`'s; what becomes of a model's, `packing`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from unmask.models.arch.config import ModelConfig
from unmask.models.families.registry import stored_tensors
from unmask.models.native.packing import FLOAT_BITS
from unmask.models.native.quantize import PANEL, matrix_bytes
from unmask.models.weights.room import weight_bytes


def matrix_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every matrix, by packed name; stacks of experts have each expert's outputs padded."""
    sizes, rank = {"head": (config.vocab_size, config.hidden_size)}, config.gated_lora_rank
    for number in range(config.num_layers):
        for name, (outputs, inputs) in _layer_sizes(config, number).items():
            layer = f"blocks.{number}.{name}"
            sizes[f"{layer}.base"] = (outputs, inputs)
            if rank is not None:
                sizes |= {f"{layer}.input": (rank, inputs), f"{layer}.output": (outputs, rank)}
    return sizes


def _layer_sizes(config: ModelConfig, number: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of a layer, by packed name; stacks of experts have each expert's outputs padded."""
    hidden, moe = config.hidden_size, config.moe
    sizes = {"qkv": (config.qkv_size, hidden), "out": (hidden, config.num_heads * config.head_dim)}
    if moe is None or not config.is_moe_layer(number):
        return sizes | {"gate_up": (2 * config.ffn_size, hidden), "down": (hidden, config.ffn_size)}
    sizes |= {
        "router": (moe.num_experts, hidden),
        "experts.gate_up": (moe.num_experts * (2 * moe.expert_size + -2 * moe.expert_size % PANEL), hidden),
        "experts.down": (moe.num_experts * (hidden + -hidden % PANEL), moe.expert_size),
    }
    if (shared := moe.num_shared * moe.expert_size) > 0:
        sizes |= {"shared.gate_up": (2 * shared, hidden), "shared.down": (hidden, shared)}
    return sizes


def packed_bytes(config: ModelConfig, dtype: torch.dtype, bits: int, width: Callable[[str], int] | None = None) -> int:
    """Bytes of the weights of the CPU kernels, at most.

    Layers have `bits` or what `width` says; gated LoRA and the head have 8; the embedding is float16; vectors and routers are
    float32.

    Args:
        config: of the model.
        dtype: of the weights that are quantised.
        bits: 8 or 4; or 32, the weights as they are, where the head is a matrix of its own even if it is tied.
        width: as of `Packer`.
    """
    embed = config.vocab_size * config.hidden_size
    if bits == FLOAT_BITS:
        return weight_bytes(config, dtype) + (embed * dtype.itemsize if config.tied_head else 0)

    def bits_of(name: str) -> int:
        if name.endswith(".router.base"):
            return FLOAT_BITS
        if not name.endswith(".base"):
            return 8
        return bits if width is None else width(name)

    matrices = sum(matrix_bytes(*size, bits_of(name)) for name, size in matrix_sizes(config).items())
    # Norms are kept twice where hidden states are rotated.
    vectors = sum(8 * tensor.shape[0] for tensor in stored_tensors(config).values() if len(tensor.shape) == 1)
    return matrices + vectors + 2 * embed


def packing_bytes(config: ModelConfig, dtype: torch.dtype, bits: int, *, whole: bool = False) -> int:
    """Bytes at the peak of packing a model: the packed weights, what is loaded, and float32 copies of the largest matrix.

    Args:
        config: of the model.
        dtype: in which it is loaded.
        bits: as of `packed_bytes`.
        whole: it is loaded at once, as an adapter's is, and not layer by layer.
    """
    embed = config.vocab_size * config.hidden_size
    vocabulary = embed * dtype.itemsize * (1 if config.tied_head else 2) + 3 * embed
    last = f"blocks.{config.num_layers - 1}."  # the first ones may be dense among mixtures of experts
    layer = [tensor for tensor in stored_tensors(config).values() if tensor.parameter.startswith(last)]
    numels = [math.prod(tensor.shape) for tensor in layer]
    # A fused matrix has several parts on disk: gate and up, query, key and value.
    largest = 3 * max(numels, default=0)
    loaded = weight_bytes(config, dtype) if whole else sum(numels) * dtype.itemsize
    return packed_bytes(config, dtype, bits) + max(vocabulary, loaded + 12 * largest)
