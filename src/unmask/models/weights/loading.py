"""Loading a model: the one entrance, for a folder, an adapter, a Hugging Face id or the name of an embedded model.

Owns what a reference means and folding an adapter into its base.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from unmask.errors import CheckpointError
from unmask.models.arch.transformer import Transformer, resize_vocabulary
from unmask.models.weights.adapter import fold_adapter, load_adapter, stored_vocab_size
from unmask.models.weights.checkpoint import (
    ModelParts,
    load_checkpoint,
    open_parts,
    parts_of,
    read_model_config,
    with_generation_ends,
)
from unmask.models.weights.hub import ADAPTED_CONFIG, base_folder, resolve
from unmask.models.weights.room import check_weights


def load_model(model: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Transformer:
    """Load a model, strictly: every tensor of the architecture, none besides.

    Memory is allocated once, in `dtype`, and filled tensor by tensor. Router weights and selection biases stay float32
    whatever `dtype` is narrower: a router rounded to bfloat16 chooses other experts. An adapter is folded into its base.

    Args:
        model: a folder (of a model or an adapter); as a string also a Hugging Face id or the name of an embedded model.
        dtype: a floating dtype for the parameters.
        device: where they live.

    Raises:
        CheckpointError: there is no such model; an adapter does not fit its base; or anything is missing, unexpected,
            misshapen or corrupt. Tensors are named, all of them at once.
        RoomError: the weights do not fit into memory; none has been touched.
    """
    folder = resolve(model) if isinstance(model, str) else model
    base = base_folder(folder)
    if base is None:
        check_weights(folder, read_model_config(folder), dtype, device)
        return load_checkpoint(folder, dtype=dtype, device=device)
    return _load_adapted(folder, load_model(base, dtype=dtype, device=device))


def load_parts(folder: Path, *, dtype: torch.dtype) -> ModelParts:
    """The model in a folder, to be loaded part by part on the CPU; that of an adapter is loaded at once. See `load_model`."""
    if base_folder(folder) is None:
        return open_parts(folder, dtype=dtype)
    return parts_of(load_model(folder, dtype=dtype))


def _load_adapted(folder: Path, model: Transformer) -> Transformer:
    """The adapter in `folder` folded into its base.

    An `unmask_config.json` there names other special tokens and vocabulary, a `generation_config.json` further end ids.
    """
    adapted = read_model_config(folder) if (folder / ADAPTED_CONFIG).exists() else None
    config = adapted or with_generation_ends(model.config, folder)
    eos_ids = tuple(dict.fromkeys((*config.eos_ids, *model.config.eos_ids)))
    vocab_size = stored_vocab_size(folder, config) or config.vocab_size
    if vocab_size > model.config.vocab_size:
        resize_vocabulary(model, vocab_size)
    model.config = replace(
        model.config, mask_id=config.mask_id, block_size=config.block_size, start_id=config.start_id, bos_id=config.bos_id,
        eos_ids=eos_ids, pad_id=config.pad_id, hf_extras=config.hf_extras,
    )  # fmt: skip
    if adapted is not None and model.config != replace(adapted, eos_ids=eos_ids):
        raise CheckpointError(f"{folder / ADAPTED_CONFIG} is of another architecture than the base; name its own base")
    return fold_adapter(load_adapter(model, folder))
