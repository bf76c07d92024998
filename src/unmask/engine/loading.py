"""`load`: a `LanguageModel` from a folder, a Hugging Face id or the name of an embedded model.

Owns which weights are read: packed ones, from the folder of a quantised model or from the cache, where the CPU kernels decode,
and then no others until somebody asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.engine.backends.native import NativeBackend, open_packed
from unmask.engine.llm import LanguageModel
from unmask.engine.quantization import decoding_weights, for_dtype, kernels_compute
from unmask.engine.room import DecodingRoom
from unmask.errors import ConfigError, UnmaskNote, UnmaskWarning
from unmask.models.arch.config import ModelConfig
from unmask.models.dtypes import parse_dtype
from unmask.models.native.library import load_kernels
from unmask.models.native.packed_file import prefault
from unmask.models.native.packed_folder import map_folder
from unmask.models.native.packing import check_packable
from unmask.models.weights.checkpoint import ModelParts, read_model_config
from unmask.models.weights.hub import base_folder, resolve, tokenizer_folder
from unmask.models.weights.loading import load_model, load_parts
from unmask.models.weights.manifest import is_quantized, read_manifest


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    quantize: str | None = "auto",
    on_packing: Callable[[int, int], None] = lambda done, total: None,
    expert_capacity: int | None = None,
) -> LanguageModel:
    """Load a model for generation.

    Args:
        model: a folder (of a model, an adapter, or a quantised model), a Hugging Face id, or an embedded model
            (`smollm2-135m`, or that with `-diffusion`, `-joint` or `-converted`).
        dtype: "float32", "bfloat16", "float16", a torch dtype, or "auto": bfloat16 where the device computes it natively.
        device: "cpu", "cuda", ...
        quantize: what decodes. "int8" or "int4": quantised weights (on the CPU); the others are read from the
            folder when `transformer`, `logits` or `score` need them. "none": the weights as they are, by the CPU kernels where
            they run the model, else by PyTorch. "auto": int8 where the CPU kernels run the model and no dtype is asked for,
            else none.
        on_packing: called with (parts done, parts in all) while weights are packed for the kernels, which happens once a model.
        expert_capacity: of a mixture of experts, those that the tokens of a block may use, all together, in each layer (block
            routing): fewer are read in a forward. None: as the model was trained.

    Returns:
        The model; its tokenizer is None when the folder has none.

    Raises:
        CheckpointError: unknown, incomplete or damaged model.
        ConfigError: unsupported architecture, dtype or quantisation.
        RoomError: the model does not fit into memory; no weight has been read.
    """
    folder, read_dtype = resolve(str(model)), parse_dtype(dtype, device)
    config, where = read_model_config(folder), torch.device(device)
    if config.delete_id is not None:
        edits = f"tokens {config.delete_id} and {config.insert_id}, which delete and insert (LLaDA2.2)"
        warnings.warn(
            f"{edits}, are never chosen: edits replace tokens, and blocks keep their length", UnmaskNote, stacklevel=2
        )
    if is_quantized(folder):
        return _load_quantized(str(model), folder, config, dtype, device, quantize, expert_capacity)
    kind = decoding_weights(for_dtype(quantize, dtype), where)
    room = DecodingRoom(config, read_dtype, where)
    read = partial(load_model, folder, dtype=read_dtype, device=device)

    def parts() -> ModelParts:
        room.check_packing(str(model), kind, whole=base_folder(folder) is not None)
        return load_parts(folder, dtype=read_dtype)

    is_packed = kernels_compute(kind, where, read_dtype)
    if not is_packed:
        room.check_loading(str(model))
    tokenizer = _tokenizer(folder)
    weights = open_packed(folder, kind, read_dtype, parts, on_packing) if is_packed else read()
    if isinstance(weights, NativeBackend) and room.check_mapped(str(model), kind):
        prefault(weights.weights)
    return LanguageModel(weights, tokenizer, name=str(model), reload=read, folder=folder, expert_capacity=expert_capacity)


def _load_quantized(
    name: str, folder: Path, config: ModelConfig, dtype: str | torch.dtype, device: str, quantize: str | None,
    expert_capacity: int | None,
) -> LanguageModel:  # fmt: skip
    """The model in a folder of `unmask quantize`, mapped; arguments as of `load`."""
    manifest, where = read_manifest(folder), torch.device(device)
    if quantize not in ("auto", manifest.quantize):
        raise ConfigError(
            f"quantize is {quantize or 'none'}; {folder} holds {manifest.quantize} weights: leave it out, or load the model "
            f"that they were made from, {manifest.source.model}"
        )
    if dtype != "auto":
        raise ConfigError(f"dtype is {dtype}; {folder} holds {manifest.quantize} weights, which have no other: leave it out")
    check_packable(where, 8)
    if config.num_layers < manifest.source.num_layers:
        warnings.warn(
            f"{folder} holds {config.num_layers} of {manifest.source.num_layers} layers: it is for measurements, not for use",
            UnmaskWarning,
            stacklevel=2,
        )
    fits = DecodingRoom(config, torch.float16, where).check_mapped(name, manifest.quantize, manifest.num_bytes)
    weights = NativeBackend(map_folder(folder, manifest, config), load_kernels())
    if fits:
        prefault(weights.weights)
    reload = partial(load_model, folder, dtype=torch.float32)
    return LanguageModel(
        weights, _tokenizer(folder), name=name, reload=reload, folder=folder, digest=manifest.digest(),
        expert_capacity=expert_capacity,
    )  # fmt: skip


def _tokenizer(folder: Path) -> Tokenizer | None:
    source = tokenizer_folder(folder)
    return None if source is None else load_tokenizer(source)
