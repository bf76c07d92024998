"""`LoraAdapter`: the updates of a LoRA adapter apart from its base, read from the files of PEFT and checked against the base.

Owns which adapters can be applied by row, beside others and beside the base itself: those that change linear layers and nothing
else. `adapter` attaches and folds.

Legend: K inputs, V outputs of a layer; R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.errors import CheckpointError, ConfigError
from unmask.files import read_json
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.gated_lora import parent_config
from unmask.models.arch.row_lora import LayerUpdate
from unmask.models.families.registry import stored_tensors
from unmask.models.weights.adapter import (
    ADAPTER_WEIGHTS,
    adaptable_layers,
    adapter_loras,
    check_fit,
    tensor_names,
    vocabulary_names,
)
from unmask.models.weights.checkpoint import read_model_config, with_generation_ends
from unmask.models.weights.hub import ADAPTED_CONFIG, ADAPTER_CONFIG
from unmask.models.weights.peft_keys import ModuleLora
from unmask.models.weights.safetensors_io import read_tensors

_BESIDE_WEIGHTS = ("eos_ids", "bos_id", "pad_id", "hf_extras", "vocab_size")
"""Fields of a config in which an adapter's may differ from its base's: its rows compute the same in any case."""


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """A LoRA adapter that rows of a forward may have or not.

    Attributes:
        name: what requests call it.
        digest: of its files, 16 bytes: what keys and values computed with it depend on.
        rank: the largest of its modules.
        eos_ids: further tokens that end its answers.
        updates: by the layer's name in the model, float32, alpha / rank in B. A layer that fuses several modules has their A
            one below the other, and a B with theirs along its diagonal.
    """

    name: str
    digest: bytes
    rank: int
    eos_ids: tuple[int, ...] = ()
    updates: Mapping[str, LayerUpdate] = field(default_factory=dict, repr=False)


def read_lora_adapter(folder: Path, config: ModelConfig, *, name: str, max_rank: int | None = None) -> LoraAdapter:
    """Read and check an adapter.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`, ours or of the peft library; where there is an
            `unmask_config.json`, it must be of the same model. Adapters of an autoregressive model fit the self-speculative
            model made of it by gated LoRA.
        config: of the base.
        name: what to call it.
        max_rank: rank of a module that is still accepted; None: any.

    Raises:
        CheckpointError: a file is missing or damaged; a setting is not supported; the rank is too large; or tensors are
            missing, unexpected, misshaped, not finite, or of embedding and head. All of them are named.
    """
    settings, tensors = read_json(folder / ADAPTER_CONFIG), read_tensors(folder / ADAPTER_WEIGHTS)
    eos_ids = _check_config(folder, config)
    loras = adapter_loras(folder, config, settings)
    rank = max(lora.rank for lora in loras.values())
    if max_rank is not None and rank > max_rank:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: the rank is {rank}; at most {max_rank} is accepted (max_lora_rank)")
    if settings.get("modules_to_save") or not tensors.keys().isdisjoint(vocabulary_names(config)):
        raise CheckpointError(
            f"{folder} brings an embedding or head of its own (modules_to_save), and all requests share one: train it with "
            "train.freeze_embeddings, or load the folder as a model"
        )
    check_fit(folder, config, settings, loras, tensors)
    strange = [key for key, tensor in tensors.items() if not tensor.is_floating_point() or not torch.isfinite(tensor).all()]
    if strange:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} holds numbers that are not finite: {', '.join(sorted(strange))}")
    updates = {}
    for layer, parts in adaptable_layers(config).items():
        if any(module in loras for module, _ in parts):
            updates[layer] = _fused(parts, loras, tensors)
    return LoraAdapter(name, _digest(folder), rank, eos_ids, updates)


def check_adapter(adapter: LoraAdapter, config: ModelConfig) -> None:
    """Raises: ConfigError: the adapter is of another model, whose layers are others or have other sizes."""
    sizes = _layer_sizes(config)
    for name, (a_RK, b_VR) in adapter.updates.items():
        if sizes.get(name) != (len(b_VR), a_RK.shape[1]):
            raise ConfigError(
                f"adapter {adapter.name} changes a layer {name} [{len(b_VR)}, {a_RK.shape[1]}], which this model "
                "does not have; take one of its own"
            )


def _layer_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers that can be adapted."""
    stored = stored_tensors(config)
    return {
        layer: (sum(rows for _, rows in parts), stored[f"{parts[0][0]}.weight"].shape[1])
        for layer, parts in adaptable_layers(config).items()
    }


def _check_config(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """Compare the config of the adapted model, where there is one, with the base; returns the tokens that end answers."""
    if not (folder / ADAPTED_CONFIG).is_file():
        return with_generation_ends(config, folder).eos_ids
    adapted = read_model_config(folder)
    bases = [config]
    if config.gated_lora_rank is not None:
        bases.append(parent_config(config))
    if not any(_comparable(adapted) == _comparable(base) for base in bases):
        raise CheckpointError(
            f"{folder / ADAPTED_CONFIG} is of another model than the base (architecture, mask token, block size or start token "
            "differ); load the folder as a model"
        )
    return adapted.eos_ids


def _comparable(config: ModelConfig) -> dict[str, Any]:
    plain = {name: value for name, value in vars(config).items() if name not in _BESIDE_WEIGHTS}
    moe = config.moe
    return plain | {"moe": None if moe is None else replace(moe, expert_capacity=None)}


def _fused(parts: Sequence[tuple[str, int]], loras: Mapping[str, ModuleLora], tensors: Mapping[str, Tensor]) -> LayerUpdate:
    """The update of a layer whose modules on disk have these names and rows."""
    a_parts, b_parts = list[Tensor](), list[Tensor]()
    for module, rows in parts:
        lora = loras.get(module)
        if lora is None:
            b_parts.append(torch.zeros(rows, 0))
            continue
        a, b = (tensors[name].float() for name in tensor_names(module))
        a_parts.append(a)
        b_parts.append(b * lora.scale)
    return LayerUpdate(torch.cat(a_parts).contiguous(), torch.block_diag(*b_parts))


def _digest(folder: Path) -> bytes:
    digest = blake2b(digest_size=16)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {folder / name}: {error.strerror}") from error
    return digest.digest()
