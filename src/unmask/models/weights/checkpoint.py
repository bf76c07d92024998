"""Models on disk: Hugging Face folders of safetensors, read strictly and written atomically.

Owns the folder layout (config.json, shards, index), streaming, and every check on them. What the names mean is `families`'.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unmask.errors import CheckpointError, ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.layers import rope_frequencies
from unmask.models.arch.transformer import Transformer
from unmask.models.families.registry import read_config, slots, tolerated, write_config
from unmask.models.weights.files import bytes_writer, disk_errors, json_bytes, staging_folder, sync_folder, write_synced

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
# The config of the adapted model, beside an adapter: transformers takes a folder with a config.json for a whole model.
ADAPTED_NAME = "unmask_config.json"
DEFAULT_SHARD_BYTES = 5 * 2**30
# Router logits decide which experts run: their inputs keep float32 whatever the model's dtype is.
_FLOAT32_SUFFIXES = (".router", ".expert_bias")
_WEIGHT_FILE = re.compile(r"model(-v\d+)?(-\d{5}-of-\d{5})?\.safetensors")
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TensorSpec(NamedTuple):
    """Shape and dtype of one tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture in `folder`/config.json; of an adapter, that of the adapted model or else of its base.

    Raises:
        CheckpointError: no config.json, or it is not a JSON object, or describes an unsupported model.
    """
    path = next((folder / name for name in (ADAPTED_NAME, CONFIG_NAME) if (folder / name).exists()), None)
    if path is None and (base := _base_folder(folder)) is not None:
        return read_model_config(base)
    path = path or folder / CONFIG_NAME
    try:
        return read_config(read_json(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; give a folder in the Hugging Face layout") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch or save the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object; fetch or save it again")
    return value


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Transformer:
    """Load a model, strictly: every tensor of the architecture, none besides.

    Memory is allocated once, in `dtype`, and filled tensor by tensor. Router weights and selection biases stay float32
    whatever `dtype` is narrower: a router rounded to bfloat16 chooses other experts.

    Args:
        folder: a Hugging Face folder, or one with an adapter, which is folded into its base.
        dtype: a floating dtype for the parameters.
        device: where they live.

    Raises:
        CheckpointError: anything missing, unexpected, misshapen or corrupt; tensors are named, all of them at once.
    """
    base = _base_folder(folder)
    if base is not None:
        from unmask.models.weights.adapter import load_adapted  # which builds on this module

        return load_adapted(folder, base, dtype=dtype, device=device)
    config = read_model_config(folder)
    wanted = slots(config)
    check_tensors(folder, config)
    with torch.device("meta"):
        model = Transformer(config)
    state = {
        name: torch.empty(tensor.shape, dtype=parameter_dtype(name, dtype), device=device)
        for name, tensor in model.state_dict().items()
    }
    for name, tensor in iter_tensors(folder, only=set(wanted)):
        slot = wanted[name]
        state[slot.parameter][slot.index].copy_(tensor)
    model.load_state_dict(state, strict=True, assign=True)
    model.inv_freq = rope_frequencies(config.rope, config.rotary_dim)[0].to(device)
    return model


def tensor_index(folder: Path) -> dict[str, Path]:
    """Which file of `folder` holds each tensor, after opening every file: a truncated one is found here.

    Raises:
        CheckpointError: no weights, an index that names an absent file or tensor, or a corrupt file.
    """
    single, index_path = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists():
        return dict.fromkeys(_names_in(single), single)
    if not index_path.exists():
        raise CheckpointError(_no_weights(folder))
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_path} has no valid 'weight_map'; fetch or save the checkpoint again")
    found: dict[str, Path] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index_path} names {file!r}; shards must lie in the same folder")
        if not (folder / file).exists():
            raise CheckpointError(f"{index_path} names {file}, which does not exist; fetch or save the checkpoint again")
        found |= dict.fromkeys(_names_in(folder / file), folder / file)
    lost = sorted(name for name, file in weight_map.items() if found.get(name) != folder / file)
    if lost:
        raise CheckpointError(f"{index_path} lists tensors that their file lacks: {', '.join(lost)}")
    return found


def iter_tensors(folder: Path, *, only: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Stream (name on disk, CPU tensor) file by file, one tensor in memory at a time; `only` keeps these names."""
    by_file: dict[Path, list[str]] = {}
    for name, path in tensor_index(folder).items():
        if only is None or name in only:
            by_file.setdefault(path, []).append(name)
    for path, names in by_file.items():
        with _open(path) as file:
            for name in names:
                yield name, file.get_tensor(name)


def save_model(
    model: Transformer, folder: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, extra_files: Iterable[Path] = ()
) -> None:
    """Save `model` as a Hugging Face folder; `load_model` in the same dtype gives it back bit for bit.

    Args:
        model: whole (not sharded over ranks).
        folder: new, or an existing checkpoint to replace.
        max_shard_bytes: a larger model is split into shards of at most this many bytes, plus an index.
        extra_files: copied into the folder under their own names (tokenizer files).

    Raises:
        CheckpointError: the disk is full or refuses; an older checkpoint in `folder` is then untouched.
    """
    save_state(model.state_dict(), model.config, folder, max_shard_bytes=max_shard_bytes, extra_files=extra_files)


def save_state(
    state: Mapping[str, Tensor], config: ModelConfig, folder: Path, *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES, extra_files: Iterable[Path] = (),
) -> None:  # fmt: skip
    """`save_model` for a state dict in our names (one gathered from several ranks)."""
    places = slots(config)
    specs = {name: TensorSpec(slot.shape, state[slot.parameter].dtype) for name, slot in places.items()}
    write_checkpoint(
        folder,
        write_config(config, dtype=str(state["embed.weight"].dtype).removeprefix("torch.")),
        specs,
        lambda name: state[places[name].parameter][places[name].index],
        max_shard_bytes=max_shard_bytes,
        extra_files=extra_files,
    )


def write_checkpoint(
    folder: Path, hf_config: Mapping[str, Any], specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES, extra_files: Iterable[Path] = (), extra_jsons: Mapping[str, Any] | None = None,
    always_index: bool = False,
) -> None:  # fmt: skip
    """Write a checkpoint from tensors made on demand, one in memory at a time.

    Everything is written and forced to disk aside before the first old file is touched; then files move in by renames
    ordered so that whoever opens the folder at any moment reads all old or all new weights.

    Args:
        folder: new, or an existing checkpoint to replace.
        hf_config: content of config.json.
        specs: the tensors to store, under their names on disk.
        read: gives the tensor of a name, in the spec's shape and dtype, on any device.
        max_shard_bytes: see `save_model`.
        extra_files: see `save_model`.
        extra_jsons: more files, by name; they replace extra files of the same name.
        always_index: write numbered shards and an index even where one file would do.

    Raises:
        CheckpointError: the disk is full or refuses; nothing is left behind.
    """
    extra = {path.name: _read_extra(path) for path in extra_files}
    with staging_folder(folder) as stage, disk_errors(folder):
        shards = plan_shards(specs, max_shard_bytes)
        indexed = always_index or len(shards) > 1
        names = _shard_names(folder, len(shards)) if indexed else [SINGLE_NAME]
        for name, shard in zip(names, shards, strict=True):
            write_synced(stage / name, partial(write_safetensors, specs=specs, names=shard, read=read))
        jsons = {**(extra_jsons or {}), CONFIG_NAME: dict(hf_config)}
        if indexed:
            jsons[INDEX_NAME] = _index_json(specs, dict(zip(names, shards, strict=True)))
        for name, content in {**extra, **{name: json_bytes(value) for name, value in jsons.items()}}.items():
            write_synced(stage / name, bytes_writer(content))
        sync_folder(stage)
        if stage.parent == folder:
            _replace(folder, stage, set(names))
        else:
            os.rename(stage, folder)
        sync_folder(folder.parent)


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Split names, in their order, into runs of at most `max_shard_bytes` (a larger tensor gets a shard to itself)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _num_bytes(spec) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _num_bytes(spec)
    return shards


def write_safetensors(
    file: BinaryIO, specs: Mapping[str, TensorSpec], names: Iterable[str], read: Callable[[str], Tensor]
) -> None:
    """Write one safetensors file tensor by tensor (the library would hold the whole file in memory)."""
    # Wide dtypes first: readers view the bytes in place, so every tensor must start at a multiple of its item size.
    ordered = sorted(names, key=lambda name: -specs[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        end = offset + _num_bytes(specs[name])
        entry = {"dtype": DTYPE_NAMES[specs[name].dtype], "shape": list(specs[name].shape), "data_offsets": [offset, end]}
        header[name] = entry
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for name in ordered:
        tensor = read(name).detach()
        assert (tuple(tensor.shape), tensor.dtype) == specs[name], f"{name}: {tensor.shape} {tensor.dtype} != {specs[name]}"
        file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def resize_vocabulary(model: Transformer, new_size: int) -> None:
    """Append tokens to `model` in place; new rows of embedding and head are the mean of the old ones.

    Args:
        model: its embedding and head parameters are replaced, so build optimizers afterwards.
        new_size: number of tokens, at least the present one.

    Raises:
        ConfigError: `new_size` would drop tokens.
    """
    old_size = model.config.vocab_size
    if new_size < old_size:
        raise ConfigError(f"vocabulary size {new_size} is below the model's {old_size}; it can only grow")
    for module in (model.embed, model.lm_head):
        if module is not None:
            rows = module.weight.detach()
            wide = torch.promote_types(rows.dtype, torch.float32)
            mean = rows.mean(0, keepdim=True, dtype=wide).to(rows.dtype)
            grown = torch.cat((rows, mean.expand(new_size - old_size, -1)))
            module.weight = nn.Parameter(grown, requires_grad=module.weight.requires_grad)
    model.embed.num_embeddings = new_size
    if model.lm_head is not None:
        model.lm_head.out_features = new_size
    model.config = replace(model.config, vocab_size=new_size)


def check_tensors(folder: Path, config: ModelConfig) -> None:
    """Compare the headers of all weight files with the architecture.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshaped or not floating point; all of them are named.
    """
    index, wanted, skipped = tensor_index(folder), slots(config), tolerated(config)
    problems = [f"missing: {name}" for name in wanted if name not in index]
    problems += [f"unexpected: {name}" for name in index if name not in wanted and not skipped.fullmatch(name)]
    for path in sorted(set(index.values())):
        with _open(path) as file:
            for name in (name for name in index if index[name] == path and name in wanted):
                view = file.get_slice(name)
                if tuple(view.get_shape()) != wanted[name].shape:
                    problems.append(f"wrong shape: {name} is {view.get_shape()}, must be {list(wanted[name].shape)}")
                if view.get_dtype() not in DTYPE_NAMES.values():
                    problems.append(f"wrong dtype: {name} is {view.get_dtype()}, must be floating point")
    if problems:
        raise CheckpointError(f"{folder} does not fit family '{config.family}' as in its config.json: {'; '.join(problems)}")


def _base_folder(folder: Path) -> Path | None:
    from unmask.models.weights.hub import base_folder  # which builds on this module

    return base_folder(folder)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); fetch or save the checkpoint again"
        ) from error


def _names_in(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; give one in the Hugging Face layout"
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        return f"{folder} holds {pickled[0]} but no safetensors weights; convert it to safetensors first"
    return f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}; give a folder in the Hugging Face layout"


def parameter_dtype(parameter: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but at least float32 for what decides on a token's experts (names as in our state dict)."""
    return torch.promote_types(dtype, torch.float32) if parameter.endswith(_FLOAT32_SUFFIXES) else dtype


def _index_json(specs: Mapping[str, TensorSpec], shards: Mapping[str, list[str]]) -> dict[str, Any]:
    place = {tensor: name for name, shard in shards.items() for tensor in shard}
    total = sum(_num_bytes(spec) for spec in specs.values())
    return {"metadata": {"total_size": total}, "weight_map": {tensor: place[tensor] for tensor in sorted(place)}}


def _read_extra(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path} to copy it: {error.strerror or error}; save without it") from error


def _num_bytes(spec: TensorSpec) -> int:
    return int(torch.Size(spec.shape).numel()) * spec.dtype.itemsize


def _shard_names(folder: Path, count: int) -> list[str]:
    """Names that collide with no present shard, so that old and new weights can lie side by side during the exchange."""
    generation = 1
    while True:
        stem = "model" if generation == 1 else f"model-v{generation}"
        names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if not any((folder / name).exists() for name in names):
            return names
        generation += 1


def _replace(folder: Path, stage: Path, weights: set[str]) -> None:
    """Exchange the checkpoint in `folder` for the one in `stage`; a reader prefers the single file to the index."""
    old = {path for path in folder.iterdir() if _WEIGHT_FILE.fullmatch(path.name) and path.name not in weights}
    staged = {path.name for path in stage.iterdir()}
    last = [SINGLE_NAME] if SINGLE_NAME in staged else [INDEX_NAME]
    for name in [*sorted(staged - set(last)), *last]:
        os.replace(stage / name, folder / name)
    if SINGLE_NAME in staged:
        (folder / INDEX_NAME).unlink(missing_ok=True)
    # An old single file hides the new index until it is gone: its removal is then the moment of exchange.
    for path in sorted(old):
        path.unlink()
    sync_folder(folder)
