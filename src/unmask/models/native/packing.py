"""Packed weights: a transformer as the kernels read it, laid out in panels; quantised and rotated, or in floats.

Owns what becomes of each matrix, bias and norm of a model, and their names. Knows no C structure and no file. Matrices are read
and packed some rows at a time, and go to a `PackedSink`, so that no float copy of a large one is ever whole.

Legend: T rows, D hidden, V vocabulary or outputs, K inputs, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.native.quantize import PANEL, PackedMatrix, RoundedMatrix, exact_dtype, pack, pack_floats, quantize
from unmask.models.native.rotation import Rotation, mix, mixed_channels
from unmask.models.weights.checkpoint import ModelParts, parts_of

Change = Callable[[Tensor], Tensor]
OnLayer = Callable[[int, int], None]
"""Called with (layers done, layers in all)."""

FLOAT_BITS = 32
"""Of weights that are packed as they are; where bfloat16 holds a matrix exactly, it takes 16."""

Rounding = Callable[[str, Tensor, int, int], RoundedMatrix]
"""Rounds rows of a matrix: its name, the rows [T, K], the first one's number, and the bits of a weight."""

_ROWS = 4096


def round_nearest(name: str, rows_TK: Tensor, first: int, bits: int) -> RoundedMatrix:
    """The `Rounding` that needs nothing but the weights."""
    return quantize(rows_TK, bits)


@dataclass(frozen=True)
class PackedWeights:
    """All that the kernels need of a model.

    Attributes:
        config: of the model.
        bits: of the layers' matrices: 8 or 4, and then those of gated LoRA and of the head have 8; or FLOAT_BITS.
        rope_factor: on cosines and sines.
        is_rotated: whether hidden states are in a rotated basis.
        matrices: by name: `blocks.N.` and one of `qkv`, `out`, `gate_up` and `down`, then `.base`, `.input` or `.output` (the
            latter two of a gated LoRA); and `head`. In a layer with experts there are `router` (floats), `shared.gate_up` and
            `shared.down`, and `experts.gate_up` and `experts.down`, each a stack: the outputs of all experts one after the
            other, each expert's padded to panels.
        vectors: biases (`NAME.bias`, padded to panels), norms (of a rotated model those of layers also as they were, `.folded`
            into matrices), `blocks.N.expert_bias`, `embed` [V, D] and `inv_freq`.
    """

    config: ModelConfig
    bits: int
    rope_factor: float
    is_rotated: bool
    matrices: dict[str, PackedMatrix]
    vectors: dict[str, Tensor]

    def mixed_channels(self, ffn_size: int) -> int:
        """How many channels of a feed-forward of this size are mixed at run time; see `rotation`."""
        return _mixed_channels(ffn_size, self.bits)


class PackedSink(ABC):
    """Takes packed matrices and vectors, whole or some rows at a time.

    Attributes:
        numbers: what is no tensor of each matrix: fields of `PackedMatrix`.
        vectors: names of the vectors.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, dict[str, Any]] = {}
        self.vectors: list[str] = []

    def add_matrix(self, name: str, part: PackedMatrix, first: int = 0, outputs: int | None = None) -> None:
        """Take rows of a matrix, a multiple of PANEL unless they are the last ones.

        Args:
            name: of the matrix.
            part: the rows, packed.
            first: number of the first one.
            outputs: rows of the matrix; None: the part is all of it.
        """
        total = part.outputs if outputs is None else outputs
        panels = -(-part.outputs // PANEL)
        numbers: dict[str, Any] = {}
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                unit = len(value) // panels
                self.put(f"{name}.{field.name}", value, first // PANEL * unit, -(-total // PANEL) * unit)
            else:
                numbers[field.name] = total if field.name == "outputs" else value
        self.numbers[name] = numbers

    def add_vector(self, name: str, part: Tensor, first: int = 0, rows: int | None = None) -> None:
        """Take a vector, or rows of the embedding; arguments as of `add_matrix`."""
        if not first:
            self.vectors.append(name)
        self.put(name, part, first, len(part) if rows is None else rows)

    @abstractmethod
    def put(self, name: str, part: Tensor, first: int, rows: int) -> None:
        """Take `part`, rows from `first` on of a tensor that has so many of them."""


def weights_of(
    description: Mapping[str, Any], numbers: Mapping[str, Any], vectors: list[str], tensors: Mapping[str, Tensor]
) -> PackedWeights:
    """The packed weights of what a sink was given; `description`: the other fields of `PackedWeights`."""
    matrices = {name: _matrix(name, given, tensors) for name, given in numbers.items()}
    return PackedWeights(**description, matrices=matrices, vectors={name: tensors[name] for name in vectors})


def _matrix(name: str, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedMatrix:
    parts: dict[str, Any] = {
        field.name: tensors.get(f"{name}.{field.name}") for field in fields(PackedMatrix) if field.name not in numbers
    }
    return PackedMatrix(**numbers, **parts)


class _Memory(PackedSink):
    """Keeps what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}

    def put(self, name: str, part: Tensor, first: int, rows: int) -> None:
        if len(part) == rows:
            self.tensors[name] = part
            return
        if name not in self.tensors:
            self.tensors[name] = part.new_empty(rows, *part.shape[1:])
        self.tensors[name][first : first + len(part)] = part


def pack_model(model: Transformer, bits: int, *, rotate: bool | None = None) -> PackedWeights:
    """Pack a model for the kernels.

    Args:
        model: on the CPU, any floating dtype.
        bits: 8, or 4 for the layers and 8 for the vocabulary head, or FLOAT_BITS.
        rotate: spread outliers of the hidden states over all channels first; None: with 8 bits. With 4 bits activations have a
            scale for every 32 and gain little, and weights lose more.

    Raises:
        ConfigError: another number of bits, or a model that is not on the CPU.
    """
    return pack_parts(parts_of(model), bits, rotate=rotate)


def pack_parts(
    parts: ModelParts, bits: int, on_layer: OnLayer = lambda done, total: None, *, rotate: bool | None = None
) -> PackedWeights:
    """Pack a model that is read part by part, as `pack_model` does.

    Args:
        parts: of the model.
        bits: as of `pack_model`.
        on_layer: sees the progress.
        rotate: as of `pack_model`.
    """
    packer, sink = Packer(parts, bits, rotate=rotate), _Memory()
    for number in range(packer.num_pieces):
        packer.pack(number, sink)
        on_layer(number + 1, packer.num_pieces)
    return weights_of(packer.description, sink.numbers, sink.vectors, sink.tensors)


def pack_matrix(weight_VK: Tensor, bits: int, change: Change = lambda rows: rows) -> PackedMatrix:
    """Pack a matrix, some rows at a time.

    Args:
        weight_VK: any floating dtype.
        bits: 8 or 4; or FLOAT_BITS, and then without a change.
        change: what becomes of rows [T, K] first.
    """
    if bits == FLOAT_BITS:
        return pack_floats(weight_VK.detach())
    sink = _Memory()
    for first, rows in zip(range(0, len(weight_VK), _ROWS), weight_VK.detach().split(_ROWS), strict=True):
        sink.add_matrix("", pack(quantize(change(rows), bits)), first, len(weight_VK))
    return _matrix("", sink.numbers[""], sink.tensors)


def pack_bias(bias_V: Tensor) -> Tensor:
    """A bias as the kernels read it: float32, padded to panels."""
    return F.pad(bias_V.detach().float(), (0, -len(bias_V) % PANEL))


class Packer:
    """Packs a model piece by piece: what is not in a layer first, then each layer.

    Args:
        parts: of the model.
        bits: as of `pack_model`.
        rotate: as of `pack_model`.
        width: bits of a matrix of a layer, by its packed name; None: `bits`, of all.
        rounding: of what is quantised.

    Raises:
        ConfigError: as of `pack_model`.
    """

    def __init__(
        self, parts: ModelParts, bits: int, *, rotate: bool | None = None, width: Callable[[str], int] | None = None,
        rounding: Rounding = round_nearest,
    ) -> None:  # fmt: skip
        model = parts.model
        check_packable(model.inv_freq.device, bits)
        self._parts, self._config, self._bits, self._rounding = parts, model.config, bits, rounding
        self._width = width or (lambda name: bits)
        self._bits_beside = FLOAT_BITS if bits == FLOAT_BITS else 8
        rotates = bits == 8 if rotate is None else rotate
        self._rotation = Rotation(model.config.hidden_size) if rotates else None
        self.description: dict[str, Any] = {
            "config": model.config, "bits": bits, "rope_factor": model.rope_factor, "is_rotated": rotates,
        }  # fmt: skip
        self.num_pieces = 1 + model.config.num_layers

    @torch.no_grad()
    def pack(self, number: int, sink: PackedSink) -> None:
        """Pack a piece; 0: what is not in a layer."""
        if number == 0:
            self._add_vocabulary(sink)
        else:
            self._add_layer(f"blocks.{number - 1}.", sink)

    def _add_layer(self, prefix: str, sink: PackedSink) -> None:
        attention_norm, mlp_norm = (self._parts.read(f"{prefix}{name}.weight") for name in ("attention_norm", "mlp_norm"))
        self._add_linear(sink, f"{prefix}qkv", f"{prefix}attention.qkv", partial(self._reading, norm_K=attention_norm))
        self._add_linear(sink, f"{prefix}out", f"{prefix}attention.out", writes=True)
        if f"{prefix}mlp.router" in self._parts.shapes:
            self._add_experts(sink, prefix, mlp_norm)
        else:
            self._add_feed_forward(sink, prefix, f"{prefix}mlp.", mlp_norm)
        for name, norm in (("attention_norm", attention_norm), ("mlp_norm", mlp_norm)):
            sink.add_vector(f"{prefix}{name}", _vector(self._norm_weight(norm)))
            if self._rotation is not None:
                sink.add_vector(f"{prefix}{name}.folded", _vector(norm))
        for name in ("query_norm", "key_norm"):
            if (parameter := f"{prefix}attention.{name}.weight") in self._parts.shapes:
                sink.add_vector(f"{prefix}{name}", _vector(self._parts.read(parameter)))

    def _add_feed_forward(self, sink: PackedSink, prefix: str, layer: str, norm_D: Tensor) -> None:
        """A dense layer's, or the shared expert; `layer` is the prefix of its names in the model."""
        self._add_linear(sink, f"{prefix}gate_up", f"{layer}gate_up", partial(self._reading, norm_K=norm_D))
        self._add_linear(sink, f"{prefix}down", f"{layer}down", self._behind_mixed, writes=True)

    def _add_experts(self, sink: PackedSink, prefix: str, norm_D: Tensor) -> None:
        router_ED = self._parts.read(f"{prefix}mlp.router")
        sink.add_matrix(f"{prefix}router.base", pack_floats(self._reading(router_ED, norm_D)))
        sink.add_vector(f"{prefix}expert_bias", _vector(self._parts.read(f"{prefix}mlp.expert_bias")))
        self._add_stack(sink, f"{prefix}experts.gate_up.base", f"{prefix}mlp.gate_up", partial(self._reading, norm_K=norm_D))
        self._add_stack(sink, f"{prefix}experts.down.base", f"{prefix}mlp.down", self._behind_mixed, writes=True)
        if f"{prefix}mlp.shared.down.weight" in self._parts.shapes:
            self._add_feed_forward(sink, f"{prefix}shared.", f"{prefix}mlp.shared.", norm_D)

    def _add_stack(self, sink: PackedSink, name: str, parameter: str, reads: Change, *, writes: bool = False) -> None:
        """Matrices [E, V, K] of experts, one at a time; arguments as of `_add_linear`."""
        experts, outputs, _ = self._parts.shapes[parameter]
        pads = (0, 0, 0, -outputs % PANEL)
        if self._bits == FLOAT_BITS:
            sink.add_matrix(name, pack_floats(F.pad(self._parts.read(parameter), pads).flatten(0, 1)))
            return
        for expert in range(experts):
            rows = reads(self._parts.read(parameter, (expert,)))
            if writes and self._rotation is not None:
                rows = self._rotation.outputs(rows)
            rows, first = F.pad(rows, pads), expert * (outputs + pads[3])
            sink.add_matrix(name, pack(self._rounding(name, rows, first, self._width(name))), first, experts * len(rows))

    def _behind_mixed(self, weight_TK: Tensor) -> Tensor:
        """Rows of a matrix that reads a feed-forward's channels, mixed at run time."""
        count = _mixed_channels(weight_TK.shape[1], self._bits)
        return mix(weight_TK.float(), count) / count

    def _add_vocabulary(self, sink: PackedSink) -> None:
        norm = self._parts.read("norm.weight")
        self._add_embedding(sink)
        sink.add_vector("inv_freq", _vector(self._parts.model.inv_freq))
        sink.add_vector("norm", _vector(self._norm_weight(norm)))
        head = "embed.weight" if self._config.tied_head else "lm_head.weight"
        self._add_matrix(sink, "head", head, self._bits_beside, partial(self._reading, norm_K=norm))

    def _add_embedding(self, sink: PackedSink) -> None:
        """[V, D] of every token as rows read it: of the mask, the vector of a model that has one."""
        count, mask_id = self._parts.shapes["embed.weight"][0], self._config.mask_id
        mask_vector = self._parts.read("mask_vector") if "mask_vector" in self._parts.shapes else None
        dtype = exact_dtype(self._parts.read("embed.weight")) if self._bits == FLOAT_BITS else torch.float16
        for first in range(0, count, _ROWS):
            rows = self._parts.read("embed.weight", (slice(first, min(first + _ROWS, count)),))
            if mask_vector is not None and mask_id is not None and first <= mask_id < first + len(rows):
                rows = rows.clone()
                rows[mask_id - first] = mask_vector
            sink.add_vector("embed", (rows if self._rotation is None else self._rotation(rows)).to(dtype), first, count)

    def _add_linear(
        self, sink: PackedSink, name: str, layer: str, reads: Change = lambda rows: rows, *, writes: bool = False
    ) -> None:
        """A layer and its update, if it has one.

        Args:
            sink: takes it.
            name: of the layer, packed.
            layer: its name in the model.
            reads: what becomes of rows [T, K] because of the basis its inputs are in.
            writes: its outputs are added to the hidden states.
        """
        base = f"{name}.base"
        self._add_matrix(sink, base, f"{layer}.weight", self._width(base), reads, writes=writes)
        if (bias := f"{layer}.bias") in self._parts.shapes:
            bias_V = self._parts.read(bias)
            if writes and self._rotation is not None:
                bias_V = self._rotation(bias_V)
            sink.add_vector(f"{base}.bias", pack_bias(bias_V))
        if f"{layer}.gated_in" in self._parts.shapes:
            self._add_matrix(sink, f"{name}.input", f"{layer}.gated_in", self._bits_beside, reads)
            self._add_matrix(sink, f"{name}.output", f"{layer}.gated_out", self._bits_beside, writes=writes)

    def _add_matrix(
        self, sink: PackedSink, name: str, parameter: str, bits: int, reads: Change = lambda rows: rows, *, writes: bool = False
    ) -> None:
        """A matrix [V, K], some rows at a time unless all are needed at once; arguments as of `_add_linear`."""
        outputs = self._parts.shapes[parameter][0]
        if bits == FLOAT_BITS:
            sink.add_matrix(name, pack_floats(self._parts.read(parameter)))
            return
        rotation = self._rotation if writes else None
        step = _ROWS if rotation is None else outputs
        for first in range(0, outputs, step):
            rows = reads(self._parts.read(parameter, (slice(first, min(first + step, outputs)),)))
            if rotation is not None:
                rows = rotation.outputs(rows)
            sink.add_matrix(name, pack(self._rounding(name, rows, first, bits)), first, outputs)

    def _reading(self, weight_TK: Tensor, norm_K: Tensor) -> Tensor:
        """Rows of a matrix behind a norm, which is left with `_norm_weight`."""
        return weight_TK if self._rotation is None else self._rotation.inputs(weight_TK, norm_K)

    def _norm_weight(self, norm_D: Tensor) -> Tensor:
        """A norm in front of matrices that read the hidden states."""
        return norm_D if self._rotation is None else torch.ones_like(norm_D)


def _mixed_channels(ffn_size: int, bits: int) -> int:
    """Floats lose nothing by outliers, and activations with a scale for every 32 little."""
    return mixed_channels(ffn_size) if bits == 8 else 1


def _vector(weight: Tensor) -> Tensor:
    return weight.detach().float().contiguous()


def check_packable(device: torch.device, bits: int) -> None:
    """Raises: ConfigError: a device of the weights or a width that the kernels do not run."""
    if bits not in (FLOAT_BITS, 8, 4):
        raise ConfigError(f"{bits}-bit weights are not supported by the CPU kernels; use 8 or 4")
    if device.type != "cpu":
        raise ConfigError(f"the model is on {device}; move it to the CPU before packing it")
