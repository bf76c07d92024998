"""Folders of quantised models: packed weights in files, one for each layer and one for the rest, mapped together.

Owns how such a folder is opened. How one is made is `quantization_job`'s; its manifest is `weights.manifest`'s. The files are
the same for every processor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from unmask.errors import CheckpointError
from unmask.models.arch.config import ModelConfig
from unmask.models.native.packed_file import map_tensors
from unmask.models.native.packing import PackedWeights, weights_of
from unmask.models.native.quantize import padded_depth
from unmask.models.native.sizes import matrix_sizes
from unmask.models.weights.manifest import MANIFEST, Manifest, check_header


def piece_name(number: int, count: int) -> str:
    """Name of the file of a piece."""
    return f"packed-{number + 1:05d}-of-{count:05d}.safetensors"


def map_folder(folder: Path, manifest: Manifest, config: ModelConfig) -> PackedWeights:
    """The packed weights in a folder, mapped: read when they are used, shared between processes, and evictable.

    Args:
        folder: of a quantised model.
        manifest: its own.
        config: its own.

    Raises:
        CheckpointError: a file is missing, cut short, or does not belong to the others. Bytes within are not looked at: see
            `manifest.verify`.
    """
    numbers: dict[str, Any] = {}
    vectors: list[str] = []
    tensors: dict[str, Tensor] = {}
    for piece in manifest.pieces:
        check_header(folder, piece)
        found = map_tensors(folder / piece.file)
        if found is None:
            raise CheckpointError(f"{folder / piece.file} is no file of packed weights; copy it again, or quantise again")
        description, mapped = found
        numbers |= description["matrices"]
        vectors += description["vectors"]
        tensors |= mapped
    try:
        weights = weights_of({**manifest.weights, "config": config}, numbers, vectors, tensors)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error}); copy it again, or quantise again") from error
    if len(manifest.pieces) != 1 + config.num_layers or not _fits_config(weights):
        raise CheckpointError(f"{folder / MANIFEST} and config.json are of different models; copy both again")
    return weights


def _fits_config(weights: PackedWeights) -> bool:
    """Whether all sizes are those of the config: kernels that went by others would read beyond the files."""
    config, matrices, vectors = weights.config, weights.matrices, weights.vectors
    embed_VD, inv_freq = vectors.get("embed"), vectors.get("inv_freq")
    if embed_VD is None or embed_VD.shape != (config.vocab_size, config.hidden_size):
        return False
    if inv_freq is None or 2 * len(inv_freq) != config.rotary_dim:
        return False
    sizes = matrix_sizes(config)
    if matrices.keys() != sizes.keys():
        return False
    expected = {name: (outputs, padded_depth(inputs, matrices[name].bits)) for name, (outputs, inputs) in sizes.items()}
    return {name: (matrix.outputs, matrix.depth) for name, matrix in matrices.items()} == expected


def bytes_of_a_token(weights: PackedWeights) -> int:
    """Bytes of weights that one token alone reads: all but the embeddings of other tokens and experts it is not routed to."""
    total, moe = 0, weights.config.moe
    for name, matrix in weights.matrices.items():
        size = matrix.num_bytes
        total += size * moe.num_active // moe.num_experts if moe is not None and ".experts." in name else size
    return total + sum(vector.nbytes for name, vector in weights.vectors.items() if name != "embed")
