"""A transformer over packed weights, run by the C++ kernels.

Owns one forward of packed weights (`packing`). Knows nothing of requests or decoding: who attends to whom comes in as segments,
and keys and values live in the caller's KV cache.

Legend: T tokens, C segments, N sequences or selected rows, D hidden, V vocabulary, K inputs of a matrix or keys of a sequence,
L layers, G kv heads, P slots or positions, R rotated dims, S head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig, MoEConfig
from unmask.models.arch.layers import rope_cos_sin
from unmask.models.native import interface
from unmask.models.native.linear import PackedLinear, linear_struct
from unmask.models.native.packed_adapter import PackedAdapter
from unmask.models.native.packing import PackedWeights

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
_FIRST_POSITIONS = 512
"""Whose cosines and sines are at hand from the start."""


class PackedTransformer:
    """Inference of a model on the CPU: 8- or 4-bit weights and 8-bit activations, or all in floats.

    Weights of 8 bits have one scale per output channel, and their activations one per row and product. Weights of 4 bits have a
    scale and a minimum for every 32 inputs, and the activations of a model with such, those of its 8-bit weights included, a
    scale for every 32. Sums under one scale are exact integers, everything
    else is float32, routers of experts included. Gated LoRA has 8 bits where a model is quantised. Float weights are float32 or
    bfloat16, and their sums have one order. A row's result is the same bits whatever the other rows and the number of threads.
    Calls from several threads may overlap: each thread has a workspace of its own.

    Args:
        weights: of the model; they stay in use.
        kernels: the compiled library.
    """

    def __init__(self, weights: PackedWeights, kernels: interface.Kernels) -> None:
        config, moe = weights.config, weights.config.moe
        self.config: ModelConfig = config
        self.bits, self._by_group = weights.bits, weights.bits == 4
        self._kernels, self.weights = kernels, weights
        self._embed_VD, self._inv_freq = weights.vectors["embed"], weights.vectors["inv_freq"]
        self._rope_factor = weights.rope_factor
        self._rope_PR = self._rope_table(_FIRST_POSITIONS)
        self._experts = [self._experts_of(f"blocks.{number}.") for number in range(config.num_layers)]
        self._layers = (interface.Layer * config.num_layers)(*(self._layer(number) for number in range(config.num_layers)))
        self._head = PackedLinear(weights.matrices["head"], kernels, by_group=self._by_group)
        self._model = interface.Model(
            addressof(self._layers), weights.vectors["norm"].data_ptr(), config.num_layers, config.hidden_size,
            config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim, config.gated_lora_rank or 0,
            config.norm_eps,
            interface.Routing() if moe is None else routing_of(moe, weights.mixed_channels(moe.expert_size)),
        )  # fmt: skip
        self._workspace = interface.Workspace()

    def run(
        self, tokens_T: Tensor, positions_T: Ints, segments_C6: Ints, slots_NK: Ints, kv_cache: Tensor,
        *, adapted: Sequence[tuple[int, int, PackedAdapter]] = (), touched_L: Ints | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states after the final norm; keys and values are written to their slots.

        Args:
            tokens_T: int64 ids.
            positions_T: int64 positions, on the host.
            segments_C6: by segment: start, stop (tokens of the forward), first position, mask block size, noisy (0 or 1),
                sequence. A token attends block-causally to its sequence's keys; noisy ones pass the gated LoRA.
            slots_NK: contiguous slots of each sequence's keys, by position.
            kv_cache: float32 [L, 2, G, P, S], contiguous.
            adapted: consecutive tokens that have an adapter: start, stop, and which.
            touched_L: where the number of experts that tokens have chosen is written, by layer.

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
        hidden_TD = self._embed_VD.index_select(0, tokens_T).float()
        cos_TR, sin_TR = self._cos_sin(positions_T)
        # `Segment` of attention.h is six 64-bit numbers, the last one the address of the slots.
        segments = segments_C6.copy()
        segments[:, 5] = slots_NK.ctypes.data + segments_C6[:, 5] * slots_NK.strides[0]
        runs = (interface.LoraRun * len(adapted))(
            *(interface.LoraRun(start, stop, each.address) for start, stop, each in adapted)
        )
        model = interface.Model.from_buffer_copy(self._model) if adapted else self._model
        model.lora_rank = max((each.rank for _, _, each in adapted), default=0)
        step = interface.ForwardBatch(
            len(positions_T), len(segments), *(array.ctypes.data for array in (segments, cos_TR, sin_TR)), hidden_TD.data_ptr(),
            kv_cache.data_ptr(), kv_cache.shape[3], None if touched_L is None else touched_L.ctypes.data,
            len(adapted), addressof(runs),
        )  # fmt: skip
        threads = torch.get_num_threads()
        buffer = self._workspace.address(self._kernels.forward_bytes(byref(model), len(positions_T), threads))
        self._kernels.forward(byref(model), byref(step), buffer, threads)
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

    def _cos_sin(self, positions_T: Ints) -> tuple[Floats, Floats]:
        """Cosines and sines at these positions, each [T, R], from tables that grow with the positions seen. Calls from several
        threads may replace them meanwhile."""
        tables = self._rope_PR
        if (longest := int(positions_T.max())) >= len(tables[0]):
            tables = self._rope_PR = self._rope_table(2 * longest)
        cos_PR, sin_PR = tables
        return cos_PR.take(positions_T, 0), sin_PR.take(positions_T, 0)

    def _rope_table(self, count: int) -> tuple[Floats, Floats]:
        cos, sin = rope_cos_sin(torch.arange(count)[None], self._inv_freq, self._rope_factor, torch.float32)
        return cos[0, 0].numpy(), sin[0, 0].numpy()

    def _layer(self, number: int) -> interface.Layer:
        config, experts = self.config, self._experts[number]
        prefix, norms = f"blocks.{number}.", ("attention_norm", "mlp_norm", "query_norm", "key_norm")
        vectors = (self.weights.vectors.get(f"{prefix}{name}") for name in norms)
        mlp, ffn_size = prefix, config.ffn_size
        if config.moe is not None and experts is not None:
            mlp, ffn_size = f"{prefix}shared.", config.moe.num_shared * config.moe.expert_size
        return interface.Layer(
            *(self._gated(f"{prefix}{name}") for name in ("qkv", "out")),
            *(self._gated(f"{mlp}{name}") for name in ("gate_up", "down")),
            ffn_size, self.weights.mixed_channels(ffn_size) if ffn_size else 1,
            *(None if vector is None else vector.data_ptr() for vector in vectors),
            None if experts is None else addressof(experts),
        )  # fmt: skip

    def _experts_of(self, prefix: str) -> interface.Experts | None:
        """The routed experts of a layer that has some."""
        bias = self.weights.vectors.get(f"{prefix}expert_bias")
        if bias is None:
            return None
        router, gate_up, down = (
            linear_struct(self.weights.matrices[f"{prefix}{name}.base"], None, by_group=self._by_group)
            for name in ("router", "experts.gate_up", "experts.down")
        )
        return interface.Experts(router, bias.data_ptr(), gate_up, down)

    def _gated(self, name: str) -> interface.GatedLinear:
        """A layer and its update, if it has one."""
        matrices, vectors = self.weights.matrices, self.weights.vectors
        parts = (f"{name}.{part}" for part in ("base", "input", "output"))
        return interface.GatedLinear(
            *(
                linear_struct(matrices[part], vectors.get(f"{part}.bias"), by_group=self._by_group)
                for part in parts
                if part in matrices
            )
        )


def routing_of(moe: MoEConfig, mixed_channels: int) -> interface.Routing:
    """The C structure of a router and the size of its experts."""
    groups = (moe.num_groups, moe.num_active_groups) if moe.expert_capacity is None else (1, 1)
    return interface.Routing(
        moe.num_experts, moe.num_active, *groups, moe.normalize, moe.expert_capacity or 0, moe.expert_size, mixed_channels,
        moe.routed_scale,
    )  # fmt: skip
