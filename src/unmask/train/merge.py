"""Weight merging: the mean of a run's best checkpoints, and task arithmetic between models.

Owns the choice of checkpoints and the streamed arithmetic. Never holds more than one tensor of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from unmask.errors import CheckpointError, ConfigError
from unmask.files import read_json
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.hub import ADAPTER_CONFIG
from unmask.models.weights.safetensors_io import TensorFiles, TensorSpec, write_checkpoint
from unmask.train.state import list_checkpoints, validation_score

Specs = dict[str, TensorSpec]


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
        folders: Hugging Face folders of the same architecture.
        out: folder of the result; config and tokenizer come from the first model.
        on_progress: (tensors done, tensors in all).

    Returns:
        `out`.

    Raises:
        CheckpointError: the models differ in tensors, shapes or architecture, or `out` is not empty.

    Source: LLaDA2.0 section 3.3 (top-k checkpoint merge). Offline, not an exponential moving average.
    """
    if not folders:
        raise ConfigError("nothing to merge; name at least one model folder")
    configs = [read_model_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        if config != configs[0]:
            raise CheckpointError(f"{folder} is another model than {folders[0]}; merge checkpoints of one run")

    def mean(tensors: Iterator[Tensor]) -> Tensor:
        total = next(tensors).float()
        for tensor in tensors:
            total = total + tensor
        return total / len(folders)

    return _write(folders, out, mean, _check_same, on_progress)


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
        CheckpointError: the models differ in tensors or shapes, or `out` is not empty.

    Source: task arithmetic (2212.04089), here across the change of objective.
    """

    def added(tensors: Iterator[Tensor]) -> Tensor:
        whole, plus, minus = (tensor.float() for tensor in tensors)
        rows = min(len(plus), len(minus))
        return torch.cat((whole[:rows] + scale * (plus[:rows] - minus[:rows]), whole[rows:]))

    return _write((model, tuned, base), out, added, _check_rows, on_progress)


def _write(
    folders: Sequence[Path],
    out: Path,
    combine: Callable[[Iterator[Tensor]], Tensor],
    check: Callable[[Specs, Specs, Path, Path], None],
    on_progress: Callable[[int, int], None],
) -> Path:
    """Write `combine` of the folders' tensors, name by name; config, dtypes and further files are the first folder's."""
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another folder")
    adapter = next((folder for folder in folders if (folder / ADAPTER_CONFIG).exists()), None)
    if adapter is not None:
        raise CheckpointError(f"{adapter} is an adapter, not a whole model; fold it first (unmask export), then merge")
    with ExitStack() as stack:
        readers = [TensorFiles(folder, stack) for folder in folders]
        specs, *others = [{name: reader.spec(name) for name in reader.names} for reader in readers]
        for folder, other in zip(folders[1:], others, strict=True):
            check(specs, other, folders[0], folder)
        done = 0

        def read(name: str) -> Tensor:
            nonlocal done
            combined = combine(reader.read(name) for reader in readers)
            done += 1
            on_progress(done, len(specs))
            return combined.to(specs[name].dtype)

        extra = [path for path in sorted(folders[0].iterdir()) if path.is_file() and not _is_written(path)]
        write_checkpoint(out, read_json(folders[0] / "config.json"), specs, read, extra_files=extra)
    return out


def _check_same(first: Specs, other: Specs, folder: Path, other_folder: Path) -> None:
    """Every tensor must agree in shape and dtype."""
    differing = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
    if differing:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise CheckpointError(f"{other_folder} does not match {folder} in {shown}; merge checkpoints of one run")


def _check_rows(first: Specs, other: Specs, folder: Path, other_folder: Path) -> None:
    """Every tensor must agree in shape, except for rows that only the first one has."""
    if first.keys() != other.keys():
        name = min(first.keys() ^ other.keys())
        raise CheckpointError(f"only one of {folder} and {other_folder} has {name}; all three must be of one architecture")
    for name, spec in first.items():
        shape = other[name].shape
        if shape[1:] != spec.shape[1:] or shape[0] > spec.shape[0]:
            raise CheckpointError(f"{name} is {shape} in {other_folder} and {spec.shape} in {folder}; they share no base")


def _is_written(path: Path) -> bool:
    """Whether the file is one that `write_checkpoint` writes, or belongs to a run, which a merge is not."""
    return (
        path.name in ("config.json", "metrics.jsonl", "loss.png")
        or path.suffix == ".safetensors"
        or path.name.endswith(".safetensors.index.json")
    )
