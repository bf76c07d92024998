"""A dense transformer over quantised weights, run by the C++ kernels.

Owns packing a model and one forward of it. Knows nothing of requests or decoding: who attends to whom comes in as segments, and
keys and values live in the caller's KV cache.

Legend: T tokens, C segments, N sequences or selected rows, D hidden, V vocabulary, K inputs of a matrix or keys of a sequence,
L layers, G kv heads, P slots, S head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof, byref
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.layers import FeedForward, GatedLoraLinear, RMSNorm, rope_cos_sin
from unmask.models.arch.transformer import Block, Transformer
from unmask.models.native import interface
from unmask.models.native.linear import PackedLinear
from unmask.models.native.rotation import Rotation, mix, mixed_channels

Change = Callable[[Tensor], Tensor]
Ints = NDArray[np.int64]


class PackedTransformer:
    """Inference of a llama, qwen2 or qwen3 model with 8- or 4-bit weights and 8-bit activations on the CPU.

    Weights have one scale per output channel (4-bit ones also one small integer per 32 inputs), activations one per row and
    product; sums are exact integers, everything else is float32. Gated LoRA always has 8 bits. A row's result is the same
    bits whatever the other rows and the number of threads. Calls from several threads
    may overlap: each thread has a workspace of its own.

    Args:
        model: on the CPU, any floating dtype. It can be dropped afterwards.
        bits: 8, or 4 for the layers and 8 for the vocabulary head.
        kernels: the compiled library.
        rotate: spread outliers of the hidden states over all channels first; None: with 8 bits. With 4 bits it costs more in
            weights, which lose their quiet groups, than it gains in activations.

    Raises:
        ConfigError: a routed model, another number of bits, or a model that is not on the CPU.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, bits: int, kernels: interface.Kernels, *, rotate: bool | None = None) -> None:
        check_packable(model, bits)
        rotates = bits == 8 if rotate is None else rotate
        self.config: ModelConfig = model.config
        self.bits = bits
        self._kernels = kernels
        self._rotation = Rotation(model.config.hidden_size) if rotates else None
        embed_VD = _embedding(model)
        self._embed_VD = embed_VD if self._rotation is None else self._rotation(embed_VD).half()
        self._inv_freq, self._rope_factor = model.inv_freq.float(), model.rope_factor
        # What the C structures point to.
        self._linears: list[PackedLinear] = []
        self._norms: list[Tensor] = []
        self._layers = (interface.Layer * len(model.blocks))(*(self._layer(block) for block in model.blocks))
        self._head = PackedLinear(self._reading(model.head_weight, model.norm), None, 8, kernels)
        config = model.config
        self._model = interface.Model(
            addressof(self._layers), self._norm_weight(model.norm), config.num_layers, config.hidden_size, config.num_heads,
            config.num_kv_heads, config.head_dim, config.rotary_dim, config.ffn_size, mixed_channels(config.ffn_size),
            config.gated_lora_rank or 0, config.norm_eps,
        )  # fmt: skip
        self._workspace = interface.Workspace()

    @torch.no_grad()
    def run(self, tokens_T: Tensor, positions_T: Tensor, segments_C6: Ints, slots_NK: Ints, kv_cache: Tensor) -> Tensor:
        """Hidden states after the final norm; keys and values are written to their slots.

        Args:
            tokens_T: int64 ids.
            positions_T: int64 positions.
            segments_C6: by segment: start, stop (tokens of the forward), first position, mask block size, noisy (0 or 1),
                sequence. A token attends block-causally to its sequence's keys; noisy ones pass the gated LoRA.
            slots_NK: contiguous slots of each sequence's keys, by position.
            kv_cache: float32 [L, 2, G, P, S], contiguous.

        Returns:
            float32 [T, D], in this model's own basis: for its `logits` and `greedy`.

        Raises:
            ConfigError: a KV cache of another type or layout.
        """
        config = self.config
        expected = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
        if (
            kv_cache.dtype != torch.float32
            or not kv_cache.is_contiguous()
            or (*kv_cache.shape[:3], *kv_cache.shape[4:]) != expected
        ):
            raise ConfigError(
                f"the KV cache is {kv_cache.dtype} {tuple(kv_cache.shape)}; it must be contiguous float32 [L, 2, G, P, S]"
            )
        hidden_TD = F.embedding(tokens_T, self._embed_VD).float()
        cos, sin = rope_cos_sin(positions_T[None], self._inv_freq, self._rope_factor, torch.float32)
        # `Segment` of attention.h is six 64-bit numbers, the last one the address of the slots.
        segments = segments_C6.copy()
        segments[:, 5] = slots_NK.ctypes.data + segments_C6[:, 5] * slots_NK.strides[0]
        step = interface.ForwardBatch(
            len(hidden_TD), len(segments), segments.ctypes.data, cos.data_ptr(), sin.data_ptr(), hidden_TD.data_ptr(),
            kv_cache.data_ptr(), kv_cache.shape[3],
        )  # fmt: skip
        threads = torch.get_num_threads()
        buffer = self._workspace.address(self._kernels.forward_bytes(byref(self._model), len(hidden_TD), threads))
        self._kernels.forward(byref(self._model), byref(step), buffer, threads)
        return hidden_TD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """float32 [N, V] logits of hidden states [N, D]."""
        return self._head(hidden_ND)

    def greedy(self, hidden_ND: Tensor, banned_id: int | None = None) -> tuple[Tensor, Tensor]:
        """The likeliest token of each row and its probability, without writing logits.

        Args:
            hidden_ND: hidden states.
            banned_id: a token that is never chosen and has no probability.

        Returns:
            int64 [N] tokens, the lowest of equals, and float32 [N] probabilities.
        """
        return self._head.greedy(hidden_ND, banned_id)

    def _layer(self, block: nn.Module) -> interface.Layer:
        assert isinstance(block, Block)
        assert isinstance(block.mlp, FeedForward)
        attention, mlp, count = block.attention, block.mlp, mixed_channels(self.config.ffn_size)
        head_norms = (attention.query_norm, attention.key_norm)
        return interface.Layer(
            self._gated(attention.qkv, reads=partial(self._reading, norm=block.attention_norm)),
            self._gated(attention.out, writes=self._writing),
            self._gated(mlp.gate_up, reads=partial(self._reading, norm=block.mlp_norm)),
            self._gated(mlp.down, reads=lambda weight: mix(weight.float(), count) / count, writes=self._writing),
            self._norm_weight(block.attention_norm),
            self._norm_weight(block.mlp_norm),
            *(None if norm is None else self._norm(norm.weight) for norm in head_norms),
        )

    def _gated(self, layer: nn.Linear, *, reads: Change = lambda x: x, writes: Change = lambda x: x) -> interface.GatedLinear:
        """A layer and its update, if it has one.

        Args:
            layer: as trained.
            reads: what becomes of a matrix [., K] because of the basis its inputs are in.
            writes: what becomes of a matrix [V, .], or of a bias [V], because of the basis its outputs are in.
        """
        bias = None if layer.bias is None else writes(layer.bias)
        structs = [self._linear(writes(reads(layer.weight)), bias, self.bits)]
        if isinstance(layer, GatedLoraLinear):
            structs += [self._linear(reads(layer.gated_in), None, 8), self._linear(writes(layer.gated_out), None, 8)]
        return interface.GatedLinear(*structs)

    def _reading(self, weight_ND: Tensor, norm: RMSNorm) -> Tensor:
        """A matrix behind a norm, which is left with `_norm_weight`."""
        return weight_ND if self._rotation is None else self._rotation.inputs(weight_ND, norm.weight)

    def _norm_weight(self, norm: RMSNorm) -> int:
        """A norm in front of matrices that read the hidden states."""
        return self._norm(norm.weight if self._rotation is None else torch.ones_like(norm.weight))

    def _writing(self, x: Tensor) -> Tensor:
        """A matrix [D, K] that adds to the hidden states, or its bias [D]."""
        if self._rotation is None:
            return x
        return self._rotation.outputs(x) if x.ndim == 2 else self._rotation(x)

    def _linear(self, weight: Tensor, bias: Tensor | None, bits: int) -> interface.Linear:
        self._linears.append(PackedLinear(weight, bias, bits, self._kernels))
        return self._linears[-1].struct

    def _norm(self, weight: Tensor) -> int:
        self._norms.append(weight.detach().float().contiguous())
        return self._norms[-1].data_ptr()


def _embedding(model: Transformer) -> Tensor:
    """[V, D] of every token as rows read it: of the mask, the vector of a model that has one."""
    embed_VD = model.embed.weight.detach()
    if model.mask_vector is None:
        return embed_VD
    assert model.config.mask_id is not None
    embed_VD = embed_VD.clone()
    embed_VD[model.config.mask_id] = model.mask_vector.detach()
    return embed_VD


def check_packable(model: Transformer, bits: int) -> None:
    """Raises: ConfigError: a model or a width that the kernels do not run."""
    if bits not in (8, 4):
        raise ConfigError(f"{bits}-bit weights are not supported by the CPU kernels; use 8 or 4")
    if model.config.moe is not None:
        raise ConfigError(
            f"the CPU kernels run dense models, not the routed layers of {model.config.family}; use plain PyTorch"
        )
    if model.embed.weight.device.type != "cpu":
        raise ConfigError(f"the model is on {model.embed.weight.device}; move it to the CPU before packing it")
