"""Weight merging: the mean of a run's best checkpoints, and task arithmetic between models.

Owns the choice of checkpoints and the streamed arithmetic. Never holds more than one tensor of each checkpoint.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from unmask.errors import CheckpointError, ConfigError, UnmaskWarning
from unmask.files import read_json
from unmask.models.arch.config import ModelConfig
from unmask.models.families.registry import family_of
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.hub import ADAPTER_CONFIG
from unmask.models.weights.safetensors_io import TensorFiles, TensorSpec, write_checkpoint
from unmask.train.state import list_checkpoints, validation_score

_NOT_COPIED = re.compile(r"config\.json|metrics\.jsonl|loss\.png|.*\.safetensors(\.index\.json)?")
"""Files that `write_checkpoint` writes, and those of a run, which a merge is not."""
_BOOKKEEPING = frozenset({"hf_extras", "bos_id", "eos_ids", "pad_id"})
"""Fields of a config that change nothing of what the weights compute."""
_NOT_IN_SHAPES = ("num_heads", "num_kv_heads", "head_dim")
"""Fields that a fine-tuning keeps and that the shapes of the tensors do not tell."""


def top_k(run: Path, k: int) -> list[Path]:
    """Model folders of the k checkpoints with the lowest validation NELBO, best first.

    Only checkpoints scored at the run's last block size compare.

    Raises:
        ConfigError: k is not positive.
        CheckpointError: the run has fewer than k scored checkpoints.
    """
    if k < 1:
        raise ConfigError(f"top-k is {k}; it must be at least 1")
    scored = [(score, path) for path in list_checkpoints(run) if (score := validation_score(path)) is not None]
    last = scored[-1][0].block_size if scored else None
    comparable = sorted(((s.nelbo, path) for s, path in scored if s.block_size == last), key=lambda pair: pair[0])
    if not comparable:
        raise CheckpointError(
            f"{run} has no evaluated checkpoint; train with data.validation_rows of at least 1, and wait for train.eval_every"
        )
    if len(comparable) < k:
        raise CheckpointError(
            f"{run} has {len(comparable)} evaluated checkpoints at its last block size, {k} are wanted; use a smaller k, "
            "or train with more train.keep_checkpoints"
        )
    return [path / "model" for _, path in comparable[:k]]


def merge_checkpoints(
    folders: Sequence[Path], out: Path, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Path:
    """Average models parameter by parameter in float32.

    Args:
        folders: Hugging Face folders of the same architecture, whichever library saved them and in whichever dtype.
        out: folder of the result; config, dtypes and tokenizer come from the first model.
        on_progress: (tensors done, tensors in all).

    Returns:
        `out`.

    Raises:
        CheckpointError: the models differ in tensors, shapes, architecture or what a token id means, or `out` is not empty.

    Source: LLaDA2.0 section 3.3 (top-k checkpoint merge). Offline, not an exponential moving average.
    """
    if not folders:
        raise ConfigError("nothing to merge; name at least one model folder")

    def mean(tensors: Iterator[Tensor]) -> Tensor:
        return reduce(torch.add, (tensor.float() for tensor in tensors)) / len(folders)

    return _write(folders, out, mean, operator.eq, lambda name: name not in _BOOKKEEPING, on_progress)


def add_difference(
    model: Path,
    tuned: Path,
    base: Path,
    out: Path,
    *,
    scale: float = 1.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Task arithmetic: `model + scale * (tuned - base)`, parameter by parameter in float32.

    `tuned` may be a fine-tuning of the autoregressive model that `model` was converted from. Rows of the vocabulary that the
    other two do not both have stay as they are.

    Args:
        model: Hugging Face folder of a model that descends from `base`.
        tuned: Hugging Face folder of a fine-tuned `base`.
        base: Hugging Face folder of the common ancestor.
        out: folder of the result; config and tokenizer come from `model`.
        scale: weight of the difference.
        on_progress: (tensors done, tensors in all).

    Returns:
        `out`.

    Raises:
        CheckpointError: the models differ in tensors, shapes, attention heads or what a token id means, or `out` is not empty.

    Source: task arithmetic (2212.04089), here across the change of objective.
    """

    def added(tensors: Iterator[Tensor]) -> Tensor:
        whole, plus, minus = (tensor.float() for tensor in tensors)
        rows = min(len(plus), len(minus))
        return torch.cat((whole[:rows] + scale * (plus[:rows] - minus[:rows]), whole[rows:]))

    def no_more_rows(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
        return shape[1:] == other[1:] and shape[0] >= other[0]

    return _write((model, tuned, base), out, added, no_more_rows, lambda name: name in _NOT_IN_SHAPES, on_progress)


def _write(
    folders: Sequence[Path],
    out: Path,
    combine: Callable[[Iterator[Tensor]], Tensor],
    fits: Callable[[tuple[int, ...], tuple[int, ...]], bool],
    is_compared: Callable[[str], bool],
    on_progress: Callable[[int, int], None],
) -> Path:
    """Write `combine` of the folders' tensors, name by name; config, dtypes and further files are the first folder's.

    `fits` says whether tensors of these shapes, one of the first folder and one of another, can be combined; `is_compared`
    which fields of the configs must be equal.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another folder")
    adapter = next((folder for folder in folders if (folder / ADAPTER_CONFIG).exists()), None)
    if adapter is not None:
        raise CheckpointError(f"{adapter} is an adapter, not a whole model; fold it first (unmask export), then merge")
    configs = [read_model_config(folder) for folder in folders]
    with ExitStack() as stack:
        readers = [TensorFiles(folder, stack) for folder in folders]
        specs, *others = _specs(readers, configs)
        for folder, other in zip(folders[1:], others, strict=True):
            for name in sorted(specs.keys() | other.keys()):
                if name not in specs or name not in other or not fits(specs[name].shape, other[name].shape):
                    shapes = [list(spec.shape) if spec else "absent" for spec in (specs.get(name), other.get(name))]
                    raise CheckpointError(
                        f"{name} is {shapes[1]} in {folder} and {shapes[0]} in {folders[0]}; merge models of one architecture"
                    )
        _check_configs(folders, configs, is_compared)
        _check_tokenizers(folders)
        numbers = count(1)

        def read(name: str) -> Tensor:
            combined = combine(reader.read(name) for reader in readers)
            on_progress(next(numbers), len(specs))
            return combined.to(specs[name].dtype)

        extra = [path for path in sorted(folders[0].iterdir()) if path.is_file() and not _NOT_COPIED.fullmatch(path.name)]
        hf_config = {**read_json(folders[0] / "config.json"), "tie_word_embeddings": configs[0].tied_head}
        write_checkpoint(out, hf_config, specs, read, extra_files=extra)
    return out


def _specs(readers: Sequence[TensorFiles], configs: Sequence[ModelConfig]) -> list[dict[str, TensorSpec]]:
    """The tensors of each folder, without those that its model does not read and another folder lacks (a tied head)."""
    common = set.intersection(*(set(reader.names) for reader in readers))
    ignored = [family_of(config).ignored_tensors(config) for config in configs]
    return [
        {name: reader.spec(name) for name in reader.names if name in common or not pattern.fullmatch(name)}
        for reader, pattern in zip(readers, ignored, strict=True)
    ]


def _check_configs(folders: Sequence[Path], configs: Sequence[ModelConfig], is_compared: Callable[[str], bool]) -> None:
    """Raise CheckpointError where models whose tensors fit are computed in another way."""
    first, *others = (
        _values({name: value for name, value in asdict(config).items() if is_compared(name)}) for config in configs
    )
    for folder, other in zip(folders[1:], others, strict=True):
        for name, value in first.items():
            if other.get(name) != value:
                raise CheckpointError(
                    f"{name} is {other.get(name)} in {folder} and {value} in {folders[0]}; merge models of one architecture"
                )


def _values(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The record with the fields of records in it beside its own, as in `rope.theta`."""
    values: dict[str, Any] = {}
    for name, value in record.items():
        values |= _values(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return values


def _check_tokenizers(folders: Sequence[Path]) -> None:
    """Raise CheckpointError where an id means another token; warn where tokenizers or chat templates differ otherwise."""
    paths = [folder / "tokenizer.json" for folder in folders]
    for path in paths[1:]:
        if not (path.exists() and paths[0].exists()):
            continue
        first, other = _backend(paths[0]), _backend(path)
        if first.to_str() != other.to_str():
            _check_ids({folders[0]: first, path.parent: other})
            _warn(f"{path} differs from {paths[0]}, which is the one that is kept")
        if _template(path.parent) != _template(folders[0]):
            _warn(f"the chat template in {path.parent} differs from that in {folders[0]}, which is the one that is kept")


def _check_ids(backends: Mapping[Path, Backend]) -> None:
    """Raise CheckpointError where an id means another token in one of two tokenizers than in the other."""
    tokens = [{i: token for token, i in backend.get_vocab(with_added_tokens=True).items()} for backend in backends.values()]
    first, other = tokens
    for id_ in sorted(first.keys() & other.keys()):
        if first[id_] != other[id_]:
            known = " and ".join(f"{names[id_]!r} in {folder}" for folder, names in zip(backends, tokens, strict=True))
            raise CheckpointError(f"token {id_} is {known}; merge models of one tokenizer")


def _backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error


def _template(folder: Path) -> object:
    path, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return read_json(config).get("chat_template") if config.exists() else None


def _warn(text: str) -> None:
    warnings.warn(text, UnmaskWarning, stacklevel=2)
