"""The job that quantises a model into a folder, piece by piece: little is in memory, and a killed job goes on where it was.

Owns the order of the files, the record of what is done, and what lies in the folder beside the weights. How a piece is packed
is `packing`'s, how it is rounded `calibration`'s.

Legend: R rows, T tokens.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.errors import CheckpointError, ConfigError
from unmask.files import Writer, atomic_write, atomic_write_json, bytes_writer, json_writer, read_json
from unmask.lock import locked
from unmask.models.arch.config import ModelConfig
from unmask.models.families.registry import stored_tensors, write_config
from unmask.models.native.calibration import Calibration
from unmask.models.native.packed_file import PackedFile
from unmask.models.native.packed_folder import piece_name
from unmask.models.native.packing import Packer, round_nearest
from unmask.models.native.quantize import RoundedMatrix
from unmask.models.native.recipe import QuantizationRecipe
from unmask.models.native.sizes import packed_bytes
from unmask.models.weights.checkpoint import GENERATION_CONFIG, ModelParts, finite_parts, read_model_config
from unmask.models.weights.export import generation_config, tokenizer_files
from unmask.models.weights.hub import NGRAMS, base_folder, model_files, ngrams_path
from unmask.models.weights.loading import load_parts
from unmask.models.weights.manifest import FORMAT, HEADER_BYTES, MANIFEST, PROGRESS, Manifest, Piece, Source, describe_piece
from unmask.models.weights.room import in_words
from unmask.models.weights.safetensors_io import CONFIG_NAME, TensorFiles

OnProgress = Callable[[int, int], None]
"""Called with megabytes of weights that are done, and megabytes in all."""
_TEXT = ".calibration.pt"
"""The text before the next layer, of a job that has not ended."""
_RESERVE = 2**26
"""Bytes that stay free on the disk."""


@dataclass(frozen=True)
class QuantizationJob:
    """A model and how it shall be quantised.

    Attributes:
        name: of the model, as it was given.
        folder: of the model or adapter.
        recipe: of its matrices.
        num_layers: the first ones, for measurements; None: all.
        tokens_RT: ids of the text that 4 bits are calibrated with; None: they are rounded to nearest.
    """

    name: str
    folder: Path
    recipe: QuantizationRecipe
    num_layers: int | None = None
    tokens_RT: Tensor | None = None

    def run(self, out: Path, on_progress: OnProgress = lambda done, total: None) -> Manifest:
        """Write the folder; an unfinished one of the same job is gone on with.

        Args:
            out: new, empty, or of this job.
            on_progress: sees the progress.

        Raises:
            CheckpointError: the model is incomplete or has weights that are not finite, or the disk is full; what is done is
                kept.
            ConfigError: the model, the recipe or `out` will not do.
        """
        parts = finite_parts(load_parts(self.folder, dtype=_stored_dtype(self.folder)), self.folder)
        config = parts.model.config
        layers = config.num_layers if self.num_layers is None else self.num_layers
        if not 0 < layers <= config.num_layers:
            raise ConfigError(f"layers is {layers}; the model has {config.num_layers}")
        _check_folder(out)
        with locked(out):
            _check_folder(out)
            writer = _PieceWriter(self, out, parts, layers)
            writer.check_disk()
            pieces = writer.write(on_progress)
            manifest = self._manifest(writer, pieces)
            for name, write in _companions(self.name, self.folder, writer.config).items():
                atomic_write(out / name, write)
            atomic_write(out / MANIFEST, manifest.writer())
            for name in (PROGRESS, _TEXT):
                (out / name).unlink(missing_ok=True)
        return manifest

    def source(self, num_layers: int) -> Source:
        """What is quantised; `num_layers` of the whole model."""
        files = {path.name: path.stat().st_size for path in model_files(self.folder, ["*.safetensors"])}
        return Source(self.name, str(self.folder.resolve()), files, num_layers)

    def _manifest(self, writer: _PieceWriter, pieces: list[Piece]) -> Manifest:
        weights = {name: value for name, value in writer.packer.description.items() if name != "config"}
        versions = {name: importlib.metadata.version(name) for name in ("unmask", "torch")}
        return Manifest(
            FORMAT, f"int{self.recipe.bits}", writer.recipe, writer.source, versions, weights, tuple(pieces)
        )  # fmt: skip


class _PieceWriter:
    """Writes the pieces of a job that are not there yet."""

    def __init__(self, job: QuantizationJob, out: Path, parts: ModelParts, num_layers: int) -> None:
        config = parts.model.config
        self._job, self._out, self._parts = job, out, parts
        self.config: ModelConfig = replace(config, num_layers=num_layers)
        self.source = job.source(config.num_layers)
        self.recipe: dict[str, Any] = job.recipe.description()
        if job.tokens_RT is not None:
            rows, length = job.tokens_RT.shape
            digest = hashlib.sha256(job.tokens_RT.numpy().tobytes()).hexdigest()
            self.recipe["calibration"] = {"rows": rows, "tokens_of_a_row": length, "sha256": digest}
        self._calibration: Calibration | None = None
        self.packer = Packer(parts, job.recipe.bits, width=job.recipe.width, rounding=self._round)
        times = {str(path): path.stat().st_mtime_ns for path in model_files(job.folder, ["*.safetensors", "*.json"])}
        about = [asdict(self.source), times, asdict(config), self.recipe, num_layers, FORMAT]
        self._identity = json.loads(json.dumps(about))
        self._done = self._read_progress()

    def check_disk(self) -> None:
        """Refuse a disk that cannot hold the pieces that are still to be written.

        Raises:
            CheckpointError: it is too small.
        """
        recipe = self._job.recipe
        whole = packed_bytes(self.config, torch.bfloat16, recipe.bits, recipe.width)
        needed = whole - sum(each.num_bytes for each in self._done)
        free = shutil.disk_usage(self._out).free
        if needed + _RESERVE > free:
            raise CheckpointError(
                f"{self._out} needs {in_words(needed)} more, and {in_words(free)} are free; free some space, choose another "
                "folder, or quantise fewer layers"
            )

    def write(self, on_progress: OnProgress) -> list[Piece]:
        """All pieces; those that are whole are kept."""
        sizes = self._sizes()
        kept = self._whole()
        if self._job.tokens_RT is not None:
            kept = self._calibrated(kept, self._job.tokens_RT)
        self._record()
        for number in range(len(sizes)):
            if number >= kept:
                if number and self._calibration is not None:
                    self._calibration.next_layer(number - 1)
                self._write_piece(number, len(sizes))
            on_progress(sum(sizes[: number + 1]) // 10**6, sum(sizes) // 10**6)
        return self._done

    def _write_piece(self, number: int, count: int) -> None:
        path = self._out / piece_name(number, count)

        def write(file: Any) -> None:
            sink = PackedFile(file, HEADER_BYTES)
            self.packer.pack(number, sink)
            sink.finish({}, {})

        atomic_write(path, write)
        self._done.append(describe_piece(path))
        self._record()
        # After the record: a text that is one layer behind it can be gone on from, one that is ahead cannot.
        if number and self._calibration is not None:
            state = {"pieces": number + 1, "hidden": self._calibration.hidden_RTD}
            atomic_write(self._out / _TEXT, lambda file: torch.save(state, file))

    def _record(self) -> None:
        atomic_write_json(self._out / PROGRESS, {"job": self._identity, "pieces": [asdict(each) for each in self._done]})

    def _whole(self) -> int:
        """How many of the recorded pieces are there, byte for byte; the others are forgotten."""
        for number, piece in enumerate(self._done):
            path = self._out / piece.file
            if not path.is_file() or path.stat().st_size != piece.num_bytes or describe_piece(path) != piece:
                del self._done[number:]
                break
        return len(self._done)

    def _calibrated(self, kept: int, tokens_RT: Tensor) -> int:
        """Begin calibration, or go on with it; returns how many pieces it has behind it."""
        recipe, path = self._job.recipe, self._out / _TEXT
        self._calibration = Calibration(self._parts, tokens_RT, recipe.width, uses_gptq=recipe.method == "gptq")
        state: dict[str, Any] = torch.load(path) if path.is_file() else {"pieces": 0}
        if 1 < state["pieces"] <= kept:
            self._calibration.hidden_RTD = state["hidden"]
            kept = state["pieces"]  # the layers behind it are done again: one, where the job was killed between the two files
        else:
            kept = min(kept, 1)  # before the first layer the text is known, too
        del self._done[kept:]
        return kept

    def _round(self, name: str, rows_TK: Tensor, first: int, bits: int) -> RoundedMatrix:
        found = None if self._calibration is None or bits != 4 else self._calibration.rounding(name, rows_TK, first)
        return round_nearest(name, rows_TK, first, bits) if found is None else found

    def _read_progress(self) -> list[Piece]:
        path = self._out / PROGRESS
        if not path.is_file():
            return []
        values = read_json(path)
        if values.get("job") != self._identity:
            raise ConfigError(
                f"{self._out} holds an unfinished job of another model or recipe, or the model has changed; choose another "
                "folder"
            )
        return [Piece(**piece) for piece in values["pieces"]]

    def _sizes(self) -> list[int]:
        """Bytes of the weights of each piece, as they are."""
        sizes = [0] * (1 + self.config.num_layers)
        for name, shape in self._parts.shapes.items():
            number = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 0
            if number < len(sizes):
                sizes[number] += 2 * shape.numel()
        return sizes


def _check_folder(out: Path) -> None:
    """Raises: ConfigError: the folder holds anything but an unfinished job."""
    if (out / MANIFEST).is_file():
        raise ConfigError(f"{out} holds a quantised model; choose another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is not a folder; choose another one")
    if out.is_dir() and not (out / PROGRESS).is_file() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose another folder")


def _stored_dtype(folder: Path) -> torch.dtype:
    """Of the weights of a model, or of an adapter's base: what is read of them."""
    if (base := base_folder(folder)) is not None:
        return _stored_dtype(base)
    config = read_model_config(folder)
    with ExitStack() as stack:
        dtype = TensorFiles(folder, stack).spec(next(iter(stored_tensors(config)))).dtype
    return torch.float32 if dtype == torch.float64 else dtype


def _companions(name: str, folder: Path, config: ModelConfig) -> dict[str, Writer]:
    """The files beside the weights: config, end ids, tokenizer and n-grams."""
    files = {path.name: bytes_writer(path.read_bytes()) for path in tokenizer_files(folder)}
    if (table := ngrams_path(name, folder)) is not None:
        files[NGRAMS] = bytes_writer(table.read_bytes())
    generation = generation_config(folder)
    if generation:
        files[GENERATION_CONFIG] = json_writer(generation)
    return {**files, CONFIG_NAME: json_writer(write_config(config))}
