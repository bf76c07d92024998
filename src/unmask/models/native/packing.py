"""Packed weights: a dense transformer as the kernels read it, laid out in panels; quantised and rotated, or in floats.

Owns what becomes of each matrix, bias and norm of a model, and their names. Knows no C structure and no file. Vocabulary
matrices are packed some rows at a time, so that no float copy of one is ever whole.

Legend: T rows, D hidden, V vocabulary or outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.layers import FeedForward, GatedLoraLinear, RMSNorm
from unmask.models.arch.transformer import Block, Transformer
from unmask.models.native.quantize import PANEL, PackedMatrix, QuantizedMatrix, exact_dtype, pack, pack_floats, quantize
from unmask.models.native.rotation import Rotation, mix, mixed_channels
from unmask.models.weights.checkpoint import ModelParts

Change = Callable[[Tensor], Tensor]
OnLayer = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""

FLOAT_BITS = 32
"""Of weights that are packed as they are; where bfloat16 holds a matrix exactly, it takes 16."""

_ROWS = 4096


@dataclass(frozen=True)
class PackedWeights:
    """All that the kernels need of a model.

    Attributes:
        config: of the model.
        bits: of the layers' matrices: 8 or 4, and then those of gated LoRA and of the head have 8; or FLOAT_BITS.
        rope_factor: on cosines and sines.
        is_rotated: whether hidden states are in a rotated basis.
        matrices: by name: `blocks.N.` and one of `qkv`, `out`, `gate_up` and `down`, then `.base`, `.input` or `.output` (the
            latter two of a gated LoRA); and `head`.
        vectors: biases (`NAME.bias`, padded to panels), norms, `embed` [V, D] and `inv_freq`.
    """

    config: ModelConfig
    bits: int
    rope_factor: float
    is_rotated: bool
    matrices: dict[str, PackedMatrix]
    vectors: dict[str, Tensor]

    @property
    def mixed_channels(self) -> int:
        """How many channels of the feed-forward are mixed at run time; see `rotation`."""
        return _mixed_channels(self.config, self.bits)


def pack_model(model: Transformer, bits: int, *, rotate: bool | None = None) -> PackedWeights:
    """Pack a llama, qwen2 or qwen3 model for the kernels.

    Args:
        model: on the CPU, any floating dtype.
        bits: 8, or 4 for the layers and 8 for the vocabulary head, or FLOAT_BITS.
        rotate: spread outliers of the hidden states over all channels first; None: with 8 bits. With 4 bits it costs more in
            weights, which lose their quiet groups, than it gains in activations.

    Raises:
        ConfigError: a routed model, another number of bits, or a model that is not on the CPU.
    """
    return _pack(ModelParts(model, lambda prefix: None), bits, rotate=rotate, release=lambda part: None)


def pack_parts(parts: ModelParts, bits: int, on_layer: OnLayer = lambda done, total: None) -> PackedWeights:
    """Pack a model that is loaded layer by layer, as `pack_model` does; the weights of packed layers are let go of.

    Args:
        parts: used up.
        bits: as of `pack_model`.
        on_layer: sees the progress.
    """
    return _pack(parts, bits, release=lambda part: None if part is None else part.to("meta"), on_layer=on_layer)


@torch.no_grad()
def _pack(
    parts: ModelParts, bits: int, *, release: Callable[[nn.Module | None], object], rotate: bool | None = None,
    on_layer: OnLayer = lambda done, total: None,
) -> PackedWeights:  # fmt: skip
    model = parts.model
    check_packable(model.config, model.inv_freq.device, bits)
    rotates = bits == 8 if rotate is None else rotate
    packer = _Packer(model.config, bits, Rotation(model.config.hidden_size) if rotates else None)
    num_parts = len(model.blocks) + 1
    # The largest matrices first, while little else is in memory.
    for name in ("embed.", "norm.", "lm_head.", "mask_vector"):
        parts.fill(name)
    packer.add_vocabulary(model)
    for matrix in (model.embed, model.lm_head):
        release(matrix)
    on_layer(1, num_parts)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        parts.fill(f"blocks.{number}.")
        packer.add_block(f"blocks.{number}.", block)
        release(block)
        on_layer(number + 2, num_parts)
    return PackedWeights(model.config, bits, model.rope_factor, rotates, packer.matrices, packer.vectors)


def pack_matrix(weight_VK: Tensor, bits: int, change: Change = lambda rows: rows) -> PackedMatrix:
    """Pack a matrix, some rows at a time.

    Args:
        weight_VK: any floating dtype.
        bits: 8 or 4; or FLOAT_BITS, and then without a change.
        change: what becomes of rows [T, K] first.
    """
    if bits == FLOAT_BITS:
        return pack_floats(weight_VK.detach())
    parts = [quantize(change(rows), bits) for rows in weight_VK.detach().split(_ROWS)]
    if len(parts) == 1:
        return pack(parts[0])
    multiples = [part.multiple_NG for part in parts if part.multiple_NG is not None]
    integers, scale = (torch.cat(each) for each in zip(*((part.integers_NK, part.scale_N) for part in parts), strict=True))
    return pack(QuantizedMatrix(integers, scale, torch.cat(multiples) if multiples else None))


def pack_bias(bias_V: Tensor) -> Tensor:
    """A bias as the kernels read it: float32, padded to panels."""
    return F.pad(bias_V.detach().float(), (0, -len(bias_V) % PANEL))


class _Packer:
    """Collects the packed parts of one model."""

    def __init__(self, config: ModelConfig, bits: int, rotation: Rotation | None) -> None:
        self._config, self._bits, self._rotation = config, bits, rotation
        self._bits_beside = FLOAT_BITS if bits == FLOAT_BITS else 8
        self.matrices: dict[str, PackedMatrix] = {}
        self.vectors: dict[str, Tensor] = {}

    def add_block(self, prefix: str, block: Block) -> None:
        """Pack a layer."""
        assert isinstance(block.mlp, FeedForward)
        attention, mlp, count = block.attention, block.mlp, _mixed_channels(self._config, self._bits)
        self._add_gated(f"{prefix}qkv", attention.qkv, partial(self._reading, norm=block.attention_norm))
        self._add_gated(f"{prefix}out", attention.out, lambda weight: weight, self._writing)
        self._add_gated(f"{prefix}gate_up", mlp.gate_up, partial(self._reading, norm=block.mlp_norm))
        self._add_gated(f"{prefix}down", mlp.down, lambda weight: mix(weight.float(), count) / count, self._writing)
        norms = {"attention_norm": self._norm_weight(block.attention_norm), "mlp_norm": self._norm_weight(block.mlp_norm)}
        for name, norm in (("query_norm", attention.query_norm), ("key_norm", attention.key_norm)):
            if norm is not None:
                norms[name] = norm.weight
        self.vectors |= {f"{prefix}{name}": _vector(weight) for name, weight in norms.items()}

    def add_vocabulary(self, model: Transformer) -> None:
        """Pack what is not in a layer."""
        self.vectors["embed"] = self._embedding(model)
        self.vectors["inv_freq"] = _vector(model.inv_freq)
        self.vectors["norm"] = _vector(self._norm_weight(model.norm))
        self.matrices["head"] = pack_matrix(model.head_weight, self._bits_beside, partial(self._reading, norm=model.norm))

    def _embedding(self, model: Transformer) -> Tensor:
        """[V, D] of every token as rows read it: of the mask, the vector of a model that has one."""
        embed_VD, mask_id = model.embed.weight.detach(), model.config.mask_id
        kept_dtype = exact_dtype(embed_VD) if self._bits == FLOAT_BITS else embed_VD.dtype
        out_VD = torch.empty_like(embed_VD, dtype=kept_dtype if self._rotation is None else torch.float16)
        for start in range(0, len(embed_VD), _ROWS):
            rows = embed_VD[start : start + _ROWS]
            if model.mask_vector is not None and mask_id is not None and start <= mask_id < start + _ROWS:
                rows = rows.clone()
                rows[mask_id - start] = model.mask_vector
            out_VD[start : start + _ROWS] = rows if self._rotation is None else self._rotation(rows)
        return out_VD

    def _add_gated(self, name: str, layer: nn.Linear, reads: Change, writes: Change = lambda weight: weight) -> None:
        """A layer and its update, if it has one.

        Args:
            name: of the layer.
            layer: as trained.
            reads: what becomes of a matrix [., K] because of the basis its inputs are in.
            writes: what becomes of a matrix [V, .], or of a bias [V], because of the basis its outputs are in.
        """
        self.matrices[f"{name}.base"] = _packed(writes(reads(layer.weight)), self._bits)
        if layer.bias is not None:
            self.vectors[f"{name}.base.bias"] = pack_bias(writes(layer.bias))
        if isinstance(layer, GatedLoraLinear):
            self.matrices[f"{name}.input"] = _packed(reads(layer.gated_in), self._bits_beside)
            self.matrices[f"{name}.output"] = _packed(writes(layer.gated_out), self._bits_beside)

    def _reading(self, weight_ND: Tensor, norm: RMSNorm) -> Tensor:
        """A matrix behind a norm, which is left with `_norm_weight`."""
        return weight_ND if self._rotation is None else self._rotation.inputs(weight_ND, norm.weight)

    def _norm_weight(self, norm: RMSNorm) -> Tensor:
        """A norm in front of matrices that read the hidden states."""
        return norm.weight if self._rotation is None else torch.ones_like(norm.weight)

    def _writing(self, x: Tensor) -> Tensor:
        """A matrix [D, K] that adds to the hidden states, or its bias [D]."""
        if self._rotation is None:
            return x
        return self._rotation.outputs(x) if x.ndim == 2 else self._rotation(x)


def _packed(weight_VK: Tensor, bits: int) -> PackedMatrix:
    return pack_floats(weight_VK) if bits == FLOAT_BITS else pack(quantize(weight_VK, bits))


def _mixed_channels(config: ModelConfig, bits: int) -> int:
    """Floats lose nothing by outliers."""
    return 1 if bits == FLOAT_BITS else mixed_channels(config.ffn_size)


def _vector(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()


def check_packable(config: ModelConfig, device: torch.device, bits: int) -> None:
    """Raises: ConfigError: a model, a device of its weights or a width that the kernels do not run."""
    if bits not in (FLOAT_BITS, 8, 4):
        raise ConfigError(f"{bits}-bit weights are not supported by the CPU kernels; use 8 or 4")
    if config.moe is not None:
        raise ConfigError(f"the CPU kernels run dense models, not the routed layers of {config.family}; use plain PyTorch")
    if device.type != "cpu":
        raise ConfigError(f"the model is on {device}; move it to the CPU before packing it")
