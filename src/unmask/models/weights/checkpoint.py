"""Models on disk: Hugging Face folders of safetensors, read strictly and written atomically.

Owns the checks of a folder against the architecture in its config.json. How weight files are laid out is `safetensors_io`'s
matter, what tensors are called on disk `families`'.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

from unmask.errors import CheckpointError, ConfigError, UnmaskWarning
from unmask.files import read_json
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.layers import rope_frequencies
from unmask.models.arch.transformer import Transformer
from unmask.models.dtypes import dtype_name
from unmask.models.families.hf_values import eos
from unmask.models.families.registry import family_of, read_config, stored_tensors, write_config
from unmask.models.families.tensors import StoredTensor, misfits
from unmask.models.weights.adapter import folded_state
from unmask.models.weights.boxes import Box, BoxedTensor
from unmask.models.weights.hub import ADAPTED_CONFIG, base_folder
from unmask.models.weights.manifest import is_quantized, read_manifest
from unmask.models.weights.safetensors_io import (
    CONFIG_NAME,
    DEFAULT_SHARD_BYTES,
    INDEX_NAME,
    SINGLE_NAME,
    TensorFiles,
    specs_of,
    tensor_index,
    write_checkpoint,
)

# Router logits decide which experts run: their inputs keep float32 whatever the model's dtype is.
_FLOAT32_SUFFIXES = (".router", ".expert_bias")
GENERATION_CONFIG = "generation_config.json"
_HEAD = "lm_head.weight"
_VOCABULARY = ("embed.weight", "lm_head.weight")
_READ_BYTES = 2**26
"""Of files that stay mapped."""


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture in `folder`/config.json; of an adapter, that of the adapted model or else of its base.

    End ids are those of config.json and of generation_config.json, if there is one. A head that is tied by config.json but
    has weights of its own in the files is untied, with a warning, as by transformers.

    Raises:
        CheckpointError: no config.json, or it is not a JSON object, or describes an unsupported model.
    """
    path = next((folder / name for name in (ADAPTED_CONFIG, CONFIG_NAME) if (folder / name).exists()), None)
    if path is None and (base := base_folder(folder)) is not None:
        return with_generation_ends(read_model_config(base), folder)
    path = path or folder / CONFIG_NAME
    if not path.exists() and is_quantized(folder):
        read_manifest(folder)  # it says that the folder is not finished
    try:
        config = read_config(read_json(path))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if config.tied_head and path.name == CONFIG_NAME and _has_own_head(folder, config):
        warnings.warn(
            f"{path} ties the head to the embedding, but {_HEAD} in the files differs from it: the head is kept apart "
            "(tie_word_embeddings: false)",
            UnmaskWarning,
            stacklevel=1,  # one place, so that it is said once
        )
        config = replace(config, tied_head=False)
    return with_generation_ends(config, folder)


def load_checkpoint(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Transformer:
    """Load the whole model in `folder`, strictly: every tensor of the architecture, none besides. See `loading.load_model`."""
    parts = open_parts(folder, dtype=dtype, device=device)
    state = {
        name: torch.empty(shape, dtype=parameter_dtype(name, dtype), device=device) for name, shape in parts.shapes.items()
    }
    with ExitStack() as stack:
        files = TensorFiles(folder, stack)
        for name, tensor in stored_tensors(parts.model.config).items():
            tensor.view(state).copy_(files.read(name))
    parts.model.load_state_dict(state, assign=True)
    return parts.model


@dataclass(frozen=True)
class ModelParts:
    """A model whose weights are loaded part by part.

    Attributes:
        model: on the meta device, unless all of it has been loaded.
        shapes: of its parameters, by name.
        read: a part of a parameter, by its name and an index of numbers and slices with both ends; nothing else is read.
    """

    model: Transformer
    shapes: Mapping[str, torch.Size]
    read: ReadPart


class ReadPart(Protocol):
    """Reads `parameter[index]`."""

    def __call__(self, parameter: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor: ...


def parts_of(model: Transformer) -> ModelParts:
    """The parts of a model that is loaded."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    return ModelParts(model, shapes, lambda parameter, index=(): state[parameter][index])


def open_parts(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> ModelParts:
    """The model in `folder`, checked as by `load_checkpoint`, its weights still to be loaded."""
    config = read_model_config(folder)
    stored = stored_tensors(config)
    check_tensors(folder, config)
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.inv_freq = rope_frequencies(config.rope, config.rotary_dim)[0].to(device)
    return ModelParts(model, shapes, _PartReader(folder, stored, shapes, dtype))


def finite_parts(parts: ModelParts, folder: Path) -> ModelParts:
    """The parts of the model in `folder`, looked at when they are read: a number that is not finite would spoil a quantised
    matrix in silence.

    Raises:
        CheckpointError: when such a part is read; it names the weights.
    """

    def read(parameter: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        part = parts.read(parameter, index)
        if not _is_finite(part):
            stored = ((name, each) for name, each in stored_tensors(parts.model.config).items() if each.parameter == parameter)
            names = [name for name, each in stored if not _is_finite(parts.read(parameter, each.index))]
            raise CheckpointError(f"{folder} has weights that are not finite: {', '.join(names)}; fetch or train it again")
        return part

    return replace(parts, read=read)


def _is_finite(tensor: torch.Tensor) -> bool:
    return all(bool(bound.isfinite()) for bound in tensor.aminmax())


class _PartReader:
    """Reads parts of parameters; files are closed when much of them has been read, so that their pages leave memory."""

    def __init__(
        self, folder: Path, stored: Mapping[str, StoredTensor], shapes: Mapping[str, torch.Size], dtype: torch.dtype
    ) -> None:
        self._folder, self._shapes, self._dtype = folder, shapes, dtype
        # By parameter and expert: a parameter of experts is hundreds of tensors, and is read expert by expert.
        self._stored: dict[str, dict[int | None, list[tuple[str, StoredTensor]]]] = {}
        for name, tensor in stored.items():
            self._stored.setdefault(tensor.parameter, {}).setdefault(_first_number(tensor.index), []).append((name, tensor))
        self._stack, self._open, self._bytes = ExitStack(), dict[Path, TensorFiles](), 0

    def __call__(self, parameter: str, index: tuple[int | slice, ...] = ()) -> torch.Tensor:
        shape = self._shapes[parameter]
        whole = (*index, *(slice(0, size) for size in shape[len(index) :]))
        ranges = [(each, each + 1) if isinstance(each, int) else (each.start, each.stop) for each in whole]
        out = torch.empty([stop - start for start, stop in ranges], dtype=parameter_dtype(parameter, self._dtype))
        boxed = BoxedTensor(tuple(shape), (Box(tuple(start for start, _ in ranges), out),))
        for name, stored in self._stored_near(parameter, _first_number(index)):
            part = boxed.part((*stored.index, *(slice(0, size) for size in shape[len(stored.index) :])))
            if part.boxes:
                self._files(name).fill(name, part)
        self._bytes += out.nbytes
        if self._bytes > _READ_BYTES:
            self._stack.close()
            self._open.clear()
            self._bytes = 0
        return out[tuple(0 if isinstance(each, int) else slice(None) for each in whole)]

    def _stored_near(self, parameter: str, number: int | None) -> Iterator[tuple[str, StoredTensor]]:
        """What may hold something of `parameter[number]`; None: of any part of the parameter."""
        by_number = self._stored[parameter]
        return chain.from_iterable(by_number[each] for each in by_number if number is None or each in (None, number))

    @cached_property
    def _index(self) -> dict[str, Path]:
        return tensor_index(self._folder)  # when something is read: who loads a model whole never asks

    @cached_property
    def _names(self) -> dict[Path, list[str]]:
        names: dict[Path, list[str]] = {}
        for name, path in self._index.items():
            names.setdefault(path, []).append(name)
        return names

    def _files(self, name: str) -> TensorFiles:
        path = self._index[name]
        if path not in self._open:
            self._open[path] = TensorFiles(dict.fromkeys(self._names[path], path), self._stack)
        return self._open[path]


def _first_number(index: tuple[int | slice, ...]) -> int | None:
    return index[0] if index and isinstance(index[0], int) else None


def fill_parameters(folder: Path, config: ModelConfig, parameters: Mapping[str, BoxedTensor]) -> None:
    """Fill what this process holds of a model's parameters from the weights in `folder`; nothing else of them is read.

    Args:
        folder: of the model, checked by `open_parts`.
        config: of that model, as it is in the folder.
        parameters: by our names; those that the folder has none of stay as they are. With a larger vocabulary, new rows become
            the mean of the old ones, as by `resize_vocabulary`.
    """
    layers: dict[str, list[tuple[str, StoredTensor]]] = {}
    for name, stored in stored_tensors(config).items():
        if stored.parameter in parameters and parameters[stored.parameter].boxes:
            layers.setdefault(".".join(stored.parameter.split(".")[:2]), []).append((name, stored))
    index = tensor_index(folder)
    for tensors in layers.values():
        with ExitStack() as stack:
            # Closed after each layer: the pages that were read leave memory.
            files = TensorFiles({name: index[name] for name, _ in tensors}, stack)
            for name, stored in tensors:
                _fill_stored(files, name, stored, parameters[stored.parameter], config)


def _fill_stored(files: TensorFiles, name: str, stored: StoredTensor, parameter: BoxedTensor, config: ModelConfig) -> None:
    """Fill what is held of the part of a parameter that one tensor on disk is."""
    rest = stored.shape[len(stored.shape) - len(parameter.shape) + len(stored.index) :]
    files.fill(name, parameter.part((*stored.index, *(slice(0, size) for size in rest))))
    if stored.parameter in _VOCABULARY and parameter.shape[0] > config.vocab_size:
        for offsets, box in parameter.part((slice(config.vocab_size, parameter.shape[0]),)).boxes:
            columns = slice(offsets[1], offsets[1] + box.shape[1])
            box.copy_(files.mean_row(name, columns).expand(len(box), -1))


def embedding_row(folder: Path, config: ModelConfig, token: int) -> torch.Tensor:
    """The embedding of a token, one that is new to the vocabulary too; as `fill_parameters` makes it."""
    row = torch.empty(1, config.hidden_size)
    shape = (max(config.vocab_size, token + 1), config.hidden_size)
    fill_parameters(folder, config, {"embed.weight": BoxedTensor(shape, (Box((token, 0), row),))})
    return row[0]


def save_model(
    model: Transformer, folder: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, extra_files: Iterable[Path] = ()
) -> None:
    """Save `model` as a Hugging Face folder; `load_model` in the same dtype gives it back bit for bit.

    Args:
        model: whole (not sharded over ranks); adapters are folded in.
        folder: new, or an existing checkpoint to replace.
        max_shard_bytes: a larger model is split into shards of at most this many bytes, plus an index.
        extra_files: copied into the folder under their own names (tokenizer files).

    Raises:
        CheckpointError: the disk is full or refuses; an older checkpoint in `folder` is then untouched.
    """
    state = folded_state(model)
    tensors = {name: tensor.view(state) for name, tensor in stored_tensors(model.config).items()}
    hf_config = write_config(model.config, dtype=dtype_name(model.embed.weight.dtype))
    write_checkpoint(
        folder, hf_config, specs_of(tensors), tensors.__getitem__, max_shard_bytes=max_shard_bytes, extra_files=extra_files,
        extra_jsons={GENERATION_CONFIG: token_ids(model.config)},
    )  # fmt: skip


def token_ids(config: ModelConfig) -> dict[str, Any]:
    """The token ids of a generation_config.json, under their Hugging Face names."""
    hf_config = write_config(config)
    return {key: hf_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def check_tensors(folder: Path, config: ModelConfig) -> None:
    """Compare the headers of all weight files with the architecture.

    Raises:
        CheckpointError: tensors are missing, unexpected, misshaped or not floating point; all of them are named.
    """
    stored, ignored = stored_tensors(config), family_of(config).ignored_tensors(config)
    with ExitStack() as stack:
        files = TensorFiles(folder, stack)
        headers = {name: files.header(name) for name in files.names if name in stored or not ignored.fullmatch(name)}
    problems = misfits(stored, {name: shape for name, (shape, _) in headers.items()})
    for name, (_, dtype) in headers.items():
        if name in stored and not isinstance(dtype, torch.dtype):
            problems.append(f"wrong dtype: {name} is {dtype}, must be floating point")
    if f"missing: {_HEAD}" in problems:
        problems.append("tie_word_embeddings is false; make it true where the embedding is the head")
    if problems:
        raise CheckpointError(f"{folder} does not fit family '{config.family}' as in its config.json: {'; '.join(problems)}")


def _has_own_head(folder: Path, config: ModelConfig) -> bool:
    """Whether the weights in `folder`, if there are any, hold a head that differs from the embedding."""
    if not (folder / SINGLE_NAME).exists():
        # The index answers without the shards, which a download may still lack.
        index = read_json(folder / INDEX_NAME) if (folder / INDEX_NAME).exists() else {}
        if _HEAD not in (index.get("weight_map") or {}):
            return False
    embedding = f"{family_of(config).embedding}.weight"
    with ExitStack() as stack:
        files = TensorFiles(folder, stack)
        return {_HEAD, embedding} <= files.names and not files.equal(embedding, _HEAD)


def with_generation_ends(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the end ids of `folder`/generation_config.json after its own."""
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return config
    try:
        ends = eos(read_json(path), vocab_size=config.vocab_size)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *ends))))


def parameter_dtype(parameter: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, but at least float32 for what decides on a token's experts (names as in our state dict)."""
    return torch.promote_types(dtype, torch.float32) if parameter.endswith(_FLOAT32_SUFFIXES) else dtype
