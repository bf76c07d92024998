"""The cache of packed weights: a model is packed once, and its packed weights are mapped from a file ever after.

Owns where the files lie, when one stands for a model, and which are removed. At most one file for each model, width and dtype;
it is replaced when the model or the code that packs has changed, and removed, when another is written, once its model is gone.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from unmask.errors import CheckpointError, UnmaskWarning
from unmask.models.dtypes import dtype_name
from unmask.models.native.packed_file import map_packed, read_facts, write_packed
from unmask.models.native.packing import FLOAT_BITS, OnLayer, PackedWeights, pack_parts
from unmask.models.weights.checkpoint import ModelParts, finite_parts
from unmask.models.weights.hub import cache_folder, cache_name, model_files

# The files that decide what the weights are.
_PATTERNS = ("*.safetensors", "*config.json", "*.index.json")
# Smaller models are packed at once.
_LEAST_BYTES = 32_000_000
_CODE = ("packing.py", "quantize.py", "rotation.py", "packed_file.py")


class PackedCache:
    """The packed weights of the model in a folder.

    Args:
        folder: of a model or an adapter.
        bits: as of `pack_model`.
        dtype: of the weights that are packed.
        least_bytes: models with less in their files are packed every time; None: as much as is read and packed in no time.
    """

    def __init__(self, folder: Path, bits: int, dtype: torch.dtype, *, least_bytes: int | None = None) -> None:
        self._folder, self._bits = folder.resolve(), bits
        least = _LEAST_BYTES if least_bytes is None else least_bytes
        files = list(model_files(self._folder, _PATTERNS))
        self._is_kept = sum(path.stat().st_size for path in files if path.suffix == ".safetensors") >= least
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        self._identity = hashlib.sha256(repr((stats, _code_digest())).encode()).hexdigest()
        kind = dtype_name(dtype) if bits == FLOAT_BITS else f"int{bits}-{dtype_name(dtype)}"
        self.path = packed_folder() / f"{cache_name(self._folder)}-{kind}.safetensors"

    def open(self) -> PackedWeights | None:
        """The packed weights, mapped; None: they are not there, or are another model's by now."""
        facts = read_facts(self.path) if self._is_kept else None
        return map_packed(self.path) if facts is not None and facts.get("identity") == self._identity else None

    def pack(self, load: Callable[[], ModelParts], on_layer: OnLayer = lambda done, total: None) -> PackedWeights:
        """Pack the model and keep the result for `open`; where that fails, a warning says why, and nothing else changes.

        Args:
            load: gives the model, which is used up.
            on_layer: sees the progress.

        Raises:
            CheckpointError: as of `load`, or weights that are to be quantised are not finite.
            ConfigError: as of `pack_model`.
        """
        parts = load()
        weights = pack_parts(parts if self._bits == FLOAT_BITS else finite_parts(parts, self._folder), self._bits, on_layer)
        if not self._is_kept:
            return weights
        try:
            write_packed(self.path, weights, {"identity": self._identity, "source": str(self._folder)})
        except CheckpointError as error:
            warnings.warn(f"the next start packs the weights again: {error}", UnmaskWarning, stacklevel=2)
            return weights
        _remove_orphans(self.path.parent)
        return map_packed(self.path) or weights


def packed_folder() -> Path:
    """Where packed weights are kept."""
    return cache_folder() / "packed"


@cache
def _code_digest() -> str:
    """A digest of the code that packs: what it wrote before it was changed is not read."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in _CODE)).hexdigest()


def _remove_orphans(folder: Path) -> None:
    """Remove the packed weights of models that are gone."""
    for path in folder.glob("*.safetensors"):
        facts = read_facts(path)
        if facts is None or not Path(facts["source"]).is_dir():
            with suppress(OSError):  # another user's
                path.unlink()
