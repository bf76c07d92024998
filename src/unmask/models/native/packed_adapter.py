"""`PackedAdapter`: a LoRA adapter as the kernels read it, in floats, beside the packed weights of its base.

Owns what becomes of its matrices where the base is rotated. Knows neither files nor requests.

Legend: K inputs, V outputs of a matrix; R rank.
"""

from __future__ import annotations

from ctypes import addressof

from torch import Tensor

from unmask.errors import ConfigError
from unmask.models.arch.row_lora import LayerUpdate
from unmask.models.native import interface
from unmask.models.native.linear import linear_struct
from unmask.models.native.packing import PackedWeights
from unmask.models.native.quantize import PackedMatrix, pack_floats
from unmask.models.native.rotation import Rotation, mix
from unmask.models.weights.lora_adapter import LoraAdapter, check_adapter

_MATRICES = {
    "qkv": ("attention.qkv",),
    "out": ("attention.out",),
    "gate_up": ("mlp.gate_up", "mlp.shared.gate_up"),
    "down": ("mlp.down", "mlp.shared.down"),
}
"""Names of the kernels' matrices in the model; a layer has one of those with two."""
_NORMS = {"qkv": "attention_norm", "gate_up": "mlp_norm"}


class PackedAdapter:
    """An adapter for the kernels.

    Args:
        adapter: of this model.
        weights: of the base.

    Attributes:
        rank: the largest of its layers, those of fused modules added up.
        address: of an `interface.LoraLayer` for each layer.

    Raises:
        ConfigError: the adapter is of another model, or the packed weights were made without what it needs of them.
    """

    def __init__(self, adapter: LoraAdapter, weights: PackedWeights) -> None:
        config = weights.config
        check_adapter(adapter, config)
        self.rank = max(len(a_RK) for a_RK, _ in adapter.updates.values())
        self._rotation = Rotation(config.hidden_size) if weights.is_rotated else None
        self._matrices: list[PackedMatrix] = []
        self._layers = (interface.LoraLayer * config.num_layers)()
        for number in range(config.num_layers):
            for matrix, names in _MATRICES.items():
                updates = (adapter.updates.get(f"blocks.{number}.{name}") for name in names)
                update = next((each for each in updates if each is not None), None)
                if update is not None:
                    packed = (pack_floats(each) for each in self._changed(update, matrix, number, weights))
                    setattr(self._layers[number], matrix, interface.LoraUpdate(*map(self._struct, packed)))
        self.address = addressof(self._layers)

    def _struct(self, matrix: PackedMatrix) -> interface.Linear:
        """The C structure of a matrix, which lives as long as the adapter."""
        self._matrices.append(matrix)
        return linear_struct(matrix, None, by_group=False)

    def _changed(self, update: LayerUpdate, matrix: str, number: int, weights: PackedWeights) -> tuple[Tensor, Tensor]:
        """A and B for inputs and outputs in the basis of the base's, as `Packer` changes its matrices."""
        a_RK, b_VR = update
        if matrix == "down":
            count = weights.mixed_channels(a_RK.shape[1])
            a_RK = mix(a_RK, count) / count
        if self._rotation is None:
            return a_RK, b_VR
        if (norm := _NORMS.get(matrix)) is None:
            return a_RK, self._rotation.outputs(b_VR)
        norm_K = weights.vectors.get(f"blocks.{number}.{norm}.folded")
        if norm_K is None:
            raise ConfigError("these int8 weights were packed before adapters were served; quantise the model again")
        return self._rotation.inputs(a_RK, norm_K), b_VR
