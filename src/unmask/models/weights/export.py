"""Export of a model as a plain Hugging Face folder that other programs read.

Owns what such a folder holds beside the weights, and the conversion of dtypes. Weights go tensor by tensor from file to file.
What a family's readers need is the family's matter; what was checked against which program is in docs/export.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmask.errors import CheckpointError
from unmask.files import read_json
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.gated_lora import parent_config
from unmask.models.dtypes import dtype_name
from unmask.models.families.registry import family_of, stored_tensors, write_config
from unmask.models.families.sdar import as_sdar
from unmask.models.weights.checkpoint import GENERATION_CONFIG, check_tensors, parameter_dtype, read_model_config, token_ids
from unmask.models.weights.hub import base_folder, tokenizer_folder
from unmask.models.weights.loading import load_model
from unmask.models.weights.remote_code import remote_code_files, remote_code_keys
from unmask.models.weights.safetensors_io import DEFAULT_SHARD_BYTES, TensorFiles, TensorSpec, write_checkpoint

# Defaults of the `generate` of LLaDA2's published code, whose argument names the exported generation_config.json uses.
_BLOCK_LENGTH, _THRESHOLD = 32, 0.95
_COMPANION = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|vocab\.txt|merges\.txt|.*\.model|chat_template\.jinja"
)
_CODE = re.compile(r"(configuration|modeling)_\w+\.py")


class Exported(NamedTuple):
    """The result of an export: the config and dtype written, and notes for whoever uses the model elsewhere."""

    config: ModelConfig
    dtype: torch.dtype
    notes: tuple[str, ...]


class TensorSource(NamedTuple):
    """A model's tensors by their names on disk, read one by one."""

    config: ModelConfig
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]


def export_model(
    folder: Path, out: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    parent: bool = False, sdar: bool = False, remote_code: bool = False, ngrams: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:  # fmt: skip
    """Write a model as a plain Hugging Face folder.

    Tensors have the names and shapes of the family. A Ling model that was converted to diffusion becomes a LLaDA2 model, with
    the config keys that Hugging Face (by remote code), SGLang and dInfer read. An autoregressive model stays one.

    Args:
        folder: of a model, or of an adapter, which is folded into its base (and the model then held in memory, once).
        out: new or empty.
        dtype: of the weights; None keeps each tensor's own. Router weights and selection biases are stored in float32 when a
            narrower one is asked for.
        max_shard_bytes: a larger model is split into shards of at most so many bytes.
        sdar: write a block-diffusion Qwen3 as an SDAR model, for SGLang and LMDeploy, with remote code.
        remote_code: add code with which transformers runs a diffusion model.
        ngrams: table of n-grams to copy beside the weights.
        parent: leave out the gated LoRA and what makes the model a diffusion model: its autoregressive parent.
        on_progress: (tensors done, tensors in all).

    Returns:
        The architecture written, the dtype of the embedding, and notes.

    Raises:
        ConfigError: `parent` of a model without gated LoRA.
        CheckpointError: the model is incomplete, or computes what its family's readers do not; a weight is too large for
            `dtype`; `out` is not empty; or the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty; choose another folder")
    with ExitStack() as stack:
        source = open_source(folder, dtype, stack)
        config = parent_config(source.config) if parent else source.config
        config = as_sdar(config) if sdar else family_of(config).for_export(config)
        code = remote_code_keys(config, block_length=_BLOCK_LENGTH) if remote_code or sdar else {}
        specs = {
            name: TensorSpec(tensor.shape, source.dtypes[name] if dtype is None else parameter_dtype(tensor.parameter, dtype))
            for name, tensor in stored_tensors(config).items()
        }
        embedding_dtype = next(iter(specs.values())).dtype
        done = 0

        def read(name: str) -> Tensor:
            nonlocal done
            done += 1
            on_progress(done, len(specs))
            return converted_tensor(name, source.read(name), specs[name].dtype)

        files, jsons = _companions(folder, config)
        files += [] if ngrams is None else [ngrams]
        write_checkpoint(
            out, write_config(config, dtype=dtype_name(embedding_dtype)) | code, specs, read, max_shard_bytes=max_shard_bytes,
            extra_files=files, extra_jsons=jsons, extra_texts=remote_code_files(config) if code else None,
            always_index=family_of(config).index_required,
        )  # fmt: skip
    return Exported(config, embedding_dtype, () if remote_code else _notes(config))


def open_source(folder: Path, dtype: torch.dtype | None, stack: ExitStack) -> TensorSource:
    """The tensors of a model, checked; those of an adapter's base with the adapter folded in, loaded in `dtype`.

    Raises:
        CheckpointError: the model is incomplete.
    """
    return _open_files(folder, stack) if base_folder(folder) is None else _open_adapted(folder, dtype, stack)


def _open_files(folder: Path, stack: ExitStack) -> TensorSource:
    config = read_model_config(folder)
    check_tensors(folder, config)
    files = TensorFiles(folder, stack)
    return TensorSource(config, {name: files.spec(name).dtype for name in stored_tensors(config)}, files.read)


def _open_adapted(folder: Path, dtype: torch.dtype | None, stack: ExitStack) -> TensorSource:
    """The model with the adapter folded in; by default in the dtype of the base's embedding."""
    base_model = folder
    while (base := base_folder(base_model)) is not None:
        base_model = base
    if dtype == torch.float16:
        dtype = torch.float32  # loaded in float16, a value too large would become infinite unnoticed
    model = load_model(folder, dtype=dtype or next(iter(_open_files(base_model, stack).dtypes.values())))
    state = model.state_dict()
    tensors = {name: tensor.view(state) for name, tensor in stored_tensors(model.config).items()}
    return TensorSource(model.config, {name: tensor.dtype for name, tensor in tensors.items()}, tensors.__getitem__)


def converted_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the dtype of the export; raises CheckpointError where its values are beyond the range."""
    converted = tensor.to(dtype)
    if converted.dtype != tensor.dtype and not torch.isfinite(converted).all():
        limit = torch.finfo(dtype).max
        raise CheckpointError(f"{name} holds values beyond {dtype_name(dtype)}'s range ({limit:g}); export as bfloat16")
    return converted


def _companions(folder: Path, config: ModelConfig) -> tuple[list[Path], dict[str, Any]]:
    """Files to copy and JSON files to write: tokenizer, defaults of generation, an autoregressive model's own code."""
    files = tokenizer_files(folder)
    jsons: dict[str, Any] = {}
    if any(path.name == "tokenizer_config.json" for path in files):
        jsons["tokenizer_config.json"] = _tokenizer_config(read_json(files[0].parent / "tokenizer_config.json"))
    if config.mask_id is not None:
        jsons[GENERATION_CONFIG] = _generation_config(config)
        jsons |= family_of(config).export_files(config, _THRESHOLD)
    else:
        jsons[GENERATION_CONFIG] = {**generation_config(folder), **token_ids(config)}
        files += [path for path in sorted(folder.iterdir()) if _CODE.fullmatch(path.name)]
    return files, jsons


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer of a model, or of an adapter."""
    source = tokenizer_folder(folder)
    return [] if source is None else [path for path in sorted(source.iterdir()) if _COMPANION.fullmatch(path.name)]


def generation_config(folder: Path) -> dict[str, Any]:
    """The generation_config.json of a model, or of an adapter's base; empty where there is none."""
    if (folder / GENERATION_CONFIG).is_file():
        return read_json(folder / GENERATION_CONFIG)
    base = base_folder(folder)
    return {} if base is None else generation_config(base)


def _tokenizer_config(hf: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json` without the keys of transformers 5: the published code of LLaDA2 needs transformers 4."""
    changed = {key: value for key, value in hf.items() if key not in ("is_local", "local_files_only", "backend")}
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    return changed


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    """Token ids under their Hugging Face names, decoding options under the argument names of LLaDA2's `generate`."""
    block_size = config.block_size or _BLOCK_LENGTH
    return {
        **token_ids(config),
        "block_length": block_size,
        "do_sample": False,
        "mask_token_id": config.mask_id,
        "steps": block_size,
        "threshold": _THRESHOLD,
    }


def _notes(config: ModelConfig) -> tuple[str, ...]:
    """Where other programs assume what does not hold for this model."""
    if config.gated_lora_rank is not None:
        return ("other programs read its autoregressive parent only: gated LoRA is unmask's",)
    if config.start_id is not None:
        return (f"the model is shifted: position p reads token p - 1, position 0 reads token {config.start_id}",)
    return family_of(config).export_notes(config)
