"""Checkpoints of any size that take no disk space: true headers, and tensors that are holes, which read as zeros."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unmask.models.families.registry import read_config, stored_tensors


def sparse_checkpoint(folder: Path, hf_config: Mapping[str, Any], *, num_shards: int = 7) -> Path:
    """A folder in the Hugging Face layout whose bfloat16 weights are all zero.

    Args:
        folder: new.
        hf_config: content of config.json.
        num_shards: files that the weights are divided over.

    Returns:
        `folder`.
    """
    shapes = {name: tensor.shape for name, tensor in stored_tensors(read_config(hf_config)).items()}
    folder.mkdir(parents=True)
    names, file_of = list(shapes), {}
    for number in range(num_shards):
        shard = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        header, offset = {}, 0
        for name in names[number::num_shards]:
            end = offset + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [offset, end]}
            offset, file_of[name] = end, shard
        encoded = json.dumps(header, separators=(",", ":")).encode()
        with (folder / shard).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            file.truncate(8 + len(encoded) + offset)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    (folder / "config.json").write_text(json.dumps(hf_config))
    return folder
