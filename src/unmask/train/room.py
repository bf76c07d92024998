"""Room for training: what a run takes of memory beside its activations, checked before the model is loaded.

Owns the sums of a run on one device. The limits are `models.weights.room`'s.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from unmask.models.arch.config import ModelConfig
from unmask.models.dtypes import dtype_name
from unmask.models.families.registry import stored_tensors
from unmask.models.families.tensors import gated_lora_tensors
from unmask.models.weights.room import check_room, weight_bytes
from unmask.train.recipe import Recipe
from unmask.train.sections import LoraSection, TrainSection

_VOCABULARY = ("embed.", "lm_head.")


def check_training_room(recipe: Recipe, config: ModelConfig, dtype: torch.dtype, device: str) -> None:
    """Refuse a run that does not fit into memory; its activations, which depend on the rows, come on top.

    Args:
        recipe: of the run.
        config: of the model.
        dtype: that it computes in.
        device: that it runs on.

    Raises:
        RoomError: it does not fit. The message names LoRA where that would.
    """

    def others() -> dict[str, int]:
        if recipe.train.lora is not None or recipe.train.gated_lora_rank is not None or config.gated_lora_rank is not None:
            return {}
        changes = {"lora": LoraSection(), "freeze_embeddings": recipe.objective.needs_reference}
        adapted = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
        return {"train.lora": sum(training_needs(adapted, config, dtype).values())}

    check_room(f"training {recipe.model}", training_needs(recipe, config, dtype), device, others)


def training_needs(recipe: Recipe, config: ModelConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the weights and of all that belongs to those that train: gradients, AdamW's moments and float32 masters."""
    num_trained, wide = num_trainable(config, recipe.train), torch.float32
    weights = weight_bytes(config, dtype)
    copies = recipe.objective.needs_reference and recipe.train.lora is None
    return {
        f"weights in {dtype_name(dtype)}": weights,
        "float32 weights": 0 if dtype == wide else num_trained * wide.itemsize,
        "gradients": num_trained * wide.itemsize,
        "AdamW's moments": 2 * num_trained * wide.itemsize,
        "the reference's weights": weights if copies else 0,
    }


def num_trainable(config: ModelConfig, train: TrainSection) -> int:
    """How many parameters train: all, those of gated LoRA, or those of adapters (and of the vocabulary)."""
    rank, stored = train.gated_lora_rank or config.gated_lora_rank, stored_tensors(replace(config, gated_lora_rank=None))
    if rank is not None:
        return sum(math.prod(each.shape) for each in gated_lora_tensors(stored, rank, config.hidden_size).values())
    tensors = [each for each in stored.values() if not each.parameter.endswith("expert_bias")]
    vocabulary = [each for each in tensors if each.parameter.startswith(_VOCABULARY)]
    if train.freeze_embeddings:
        tensors, vocabulary = [each for each in tensors if each not in vocabulary], []
    if train.lora is None:
        return sum(math.prod(each.shape) for each in tensors)
    adapted = [each for each in tensors if each.parameter.startswith("blocks.") and each.parameter.endswith(".weight")]
    adapters = sum(train.lora.rank * sum(each.shape) for each in adapted if len(each.shape) == 2)
    return adapters + sum(math.prod(each.shape) for each in vocabulary)
