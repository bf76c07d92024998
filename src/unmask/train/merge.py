"""Weight merging: the mean of a run's best checkpoints, and task arithmetic between models.

Owns the choice of checkpoints and the streamed arithmetic. Never holds more than one tensor of each checkpoint.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import reduce
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from unmask.errors import CheckpointError, ConfigError
from unmask.files import read_json
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.hub import ADAPTER_CONFIG
from unmask.models.weights.safetensors_io import TensorFiles, TensorSpec, write_checkpoint
from unmask.train.state import list_checkpoints, validation_score

_NOT_COPIED = re.compile(r"config\.json|metrics\.jsonl|loss\.png|.*\.safetensors(\.index\.json)?")
"""Files that `write_checkpoint` writes, and those of a run, which a merge is not."""


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
        return reduce(torch.add, (tensor.float() for tensor in tensors)) / len(folders)

    return _write(folders, out, mean, operator.eq, on_progress)


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

    def no_more_rows(spec: TensorSpec, other: TensorSpec) -> bool:
        return spec.shape[1:] == other.shape[1:] and spec.shape[0] >= other.shape[0]

    return _write((model, tuned, base), out, added, no_more_rows, on_progress)


def _write(
    folders: Sequence[Path],
    out: Path,
    combine: Callable[[Iterator[Tensor]], Tensor],
    fits: Callable[[TensorSpec, TensorSpec], bool],
    on_progress: Callable[[int, int], None],
) -> Path:
    """Write `combine` of the folders' tensors, name by name; config, dtypes and further files are the first folder's.

    `fits` says whether a tensor of the first folder and that of another one can be combined.
    """
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; choose another folder")
    adapter = next((folder for folder in folders if (folder / ADAPTER_CONFIG).exists()), None)
    if adapter is not None:
        raise CheckpointError(f"{adapter} is an adapter, not a whole model; fold it first (unmask export), then merge")
    with ExitStack() as stack:
        readers = [TensorFiles(folder, stack) for folder in folders]
        specs, *others = [{name: reader.spec(name) for name in reader.names} for reader in readers]
        for folder, other in zip(folders[1:], others, strict=True):
            for name in sorted(specs.keys() | other.keys()):
                if name not in specs or name not in other or not fits(specs[name], other[name]):
                    shapes = [f"{spec.shape} {spec.dtype}" if spec else "absent" for spec in (specs.get(name), other.get(name))]
                    raise CheckpointError(
                        f"{name} is {shapes[1]} in {folder} and {shapes[0]} in {folders[0]}; merge models of one architecture"
                    )
        numbers = count(1)

        def read(name: str) -> Tensor:
            combined = combine(reader.read(name) for reader in readers)
            on_progress(next(numbers), len(specs))
            return combined.to(specs[name].dtype)

        extra = [path for path in sorted(folders[0].iterdir()) if path.is_file() and not _NOT_COPIED.fullmatch(path.name)]
        write_checkpoint(out, read_json(folders[0] / "config.json"), specs, read, extra_files=extra)
    return out
