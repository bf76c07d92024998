"""Room for training: what a run takes of memory beside its activations, checked before the model is loaded.

Owns the sums of a run, on one device or divided over ranks. The limits are `models.weights.room`'s.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from unmask.errors import RoomError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.gated_lora import is_target
from unmask.models.dtypes import dtype_name
from unmask.models.families.registry import stored_tensors
from unmask.models.families.tensors import StoredTensor, gated_lora_tensors
from unmask.models.weights.checkpoint import parameter_dtype
from unmask.models.weights.room import check_room
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.world import World
from unmask.train.recipe import Recipe
from unmask.train.sections import LoraSection, TrainSection

_VOCABULARY = ("embed.", "lm_head.")
_EXPERTS = (".mlp.gate_up", ".mlp.down")


def check_training_room(
    recipe: Recipe, config: ModelConfig, dtype: torch.dtype, device: str, world: World, local_ranks: int = 1
) -> None:
    """Refuse a run that does not fit into memory; its activations, which depend on the rows, come on top.

    Args:
        recipe: of the run.
        config: of the model.
        dtype: of the weights: that it computes in; of several ranks float32.
        device: that it runs on.
        world: the ranks.
        local_ranks: those on this machine, which share the memory of its CPUs.

    Raises:
        RoomError: it does not fit; on every rank. The message names LoRA where that would.
    """
    together = 1 if device.startswith("cuda") else local_ranks
    what = f"training {recipe.model}"
    if world.size > 1:
        what += f" on {together} of {world.size} ranks"

    def others() -> dict[str, int]:
        if recipe.train.lora is not None or recipe.train.gated_lora_rank is not None or config.gated_lora_rank is not None:
            return {}
        changes = {"lora": LoraSection(), "freeze_embeddings": recipe.objective.needs_reference}
        adapted = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
        return {"train.lora": sum(needs_together(adapted).values())}

    def needs_together(recipe: Recipe) -> dict[str, int]:
        return {name: together * size for name, size in training_needs(recipe, config, dtype, world.dims).items()}

    error: RoomError | None = None
    try:
        check_room(what, needs_together(recipe), device, others)
    except RoomError as caught:
        error = caught
    # No rank loads before all have looked.
    error = next((each for each in world.gather_all(error) if each is not None), None)
    if error is not None:
        raise error


def training_needs(
    recipe: Recipe, config: ModelConfig, dtype: torch.dtype, dims: ParallelDims = ParallelDims()
) -> dict[str, int]:
    """Bytes of the weights, and of gradients, AdamW's moments and float32 masters of those that train, on a rank of so many."""
    num_trained, wide = num_trainable(config, recipe.train, dims), torch.float32
    stored = stored_tensors(config).values()
    weights = sum(_own(each, dims) * parameter_dtype(each.parameter, dtype).itemsize for each in stored)
    copies = recipe.objective.needs_reference and recipe.train.lora is None
    return {
        f"weights in {dtype_name(dtype)}": weights,
        "float32 weights": 0 if dtype == wide else num_trained * wide.itemsize,
        "gradients": num_trained * wide.itemsize,
        "AdamW's moments": 2 * num_trained * wide.itemsize,
        "the reference's weights": weights if copies else 0,
    }


def num_trainable(config: ModelConfig, train: TrainSection, dims: ParallelDims = ParallelDims()) -> int:
    """How many parameters train on a rank: all, those of gated LoRA, or those of adapters (and of the vocabulary)."""
    rank, stored = train.gated_lora_rank or config.gated_lora_rank, stored_tensors(replace(config, gated_lora_rank=None))
    if rank is not None:
        gated = gated_lora_tensors(stored, rank, config.hidden_size).values()
        return sum(_own(each, dims) for each in gated if is_target(each.parameter, train.gated_lora_targets))
    tensors = [each for each in stored.values() if not each.parameter.endswith("expert_bias")]
    vocabulary = [each for each in tensors if each.parameter.startswith(_VOCABULARY)]
    if train.freeze_embeddings:
        tensors, vocabulary = [each for each in tensors if each not in vocabulary], []
    if train.lora is None:
        return sum(_own(each, dims) for each in tensors)
    adapted = [each for each in tensors if each.parameter.startswith("blocks.") and each.parameter.endswith(".weight")]
    adapters = sum(train.lora.rank * sum(each.shape) for each in adapted if len(each.shape) == 2)
    return adapters // (dims.shards * dims.pipeline) + sum(_own(each, dims) for each in vocabulary)


def _own(tensor: StoredTensor, dims: ParallelDims) -> int:
    """A rank's part of a tensor; a pipeline's layers are taken to be divided evenly."""
    name, ranks = tensor.parameter, dims.shards * dims.tensor * dims.pipeline
    if name.startswith(_VOCABULARY):
        ranks = dims.shards * dims.tensor
    elif ".mlp.router" in name:
        ranks = dims.pipeline
    elif name.endswith(_EXPERTS):
        ranks = dims.shards * dims.pipeline
    return math.ceil(math.prod(tensor.shape) / ranks)
