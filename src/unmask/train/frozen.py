"""The result of a run with gated LoRA: its updates beside the parent's weights as the parent's files hold them.

Owns how it is put together. Training holds the frozen weights in its own dtype, and would save them rounded to it: another
parent than the one whose text is promised.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from unmask.files import read_json
from unmask.models.arch.gated_lora import is_gated_lora
from unmask.models.families.registry import stored_tensors
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.safetensors_io import CONFIG_NAME, INDEX_NAME, TensorFiles, TensorSpec, write_checkpoint


def save_with_parent(checkpoint: Path, parent: Path, out: Path) -> None:
    """Write a model of gated LoRA, its frozen weights from the parent.

    Args:
        checkpoint: folder of the model as training saved it.
        parent: folder of the model that the run began with. Rows that training added to its vocabulary are the checkpoint's;
            so is everything if the parent is an adapter's folder, or has no such weights.
        out: folder to write to.

    Raises:
        CheckpointError: the disk is full or refuses, or a file is damaged.
    """
    config = read_model_config(checkpoint)
    with ExitStack() as stack:
        trained = TensorFiles(checkpoint, stack)
        frozen = TensorFiles(parent, stack) if (parent / CONFIG_NAME).exists() else trained
        stored = stored_tensors(config)
        is_kept = {name: name in frozen.names and not is_gated_lora(stored[name].parameter) for name in trained.names}

        def read(name: str) -> Tensor:
            own = trained.read(name)
            if not is_kept[name]:
                return own
            theirs = frozen.read(name)
            return torch.cat((theirs, own[len(theirs) :].to(theirs.dtype)))

        dtypes = {name: (frozen if kept else trained).spec(name).dtype for name, kept in is_kept.items()}
        specs = {name: TensorSpec(trained.spec(name).shape, dtype) for name, dtype in dtypes.items()}
        others = [path for path in checkpoint.iterdir() if path.suffix != ".safetensors" and path.is_file()]
        extra = [path for path in others if path.name not in (CONFIG_NAME, INDEX_NAME)]
        write_checkpoint(out, read_json(checkpoint / CONFIG_NAME), specs, read, extra_files=extra)
