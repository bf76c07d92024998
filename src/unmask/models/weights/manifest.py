"""Manifests of quantised models: what a folder's packed weights were made from and how, and the hash of every file.

Owns `quantization.json` and the checks of files against it. What is in the files is `native.packed_folder`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unmask.errors import CheckpointError
from unmask.files import Writer, json_writer, read_json

MANIFEST = "quantization.json"
PROGRESS = ".quantization.json"
"""Of a job that has not ended."""
FORMAT = 1
HEADER_BYTES = 2**16
"""The beginning of a piece, which has a hash of its own."""
_CHUNK = 2**24


@dataclass(frozen=True)
class Piece:
    """A file of packed weights: its name, its size in bytes, and the SHA-256 of its header and of all of it."""

    file: str
    num_bytes: int
    header_sha256: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """What a model was quantised from.

    Attributes:
        model: as it was named.
        folder: where it lay.
        files: sizes of its weight files in bytes, by name.
        num_layers: of the whole model; the quantised one may have fewer, for measurements.
    """

    model: str
    folder: str
    files: dict[str, int]
    num_layers: int


@dataclass(frozen=True)
class Manifest:
    """The manifest of a quantised model.

    Attributes:
        format: version of the layout of folder and files.
        quantize: the kind of weights: "int8" or "int4".
        recipe: how they were rounded.
        source: what they were made from.
        versions: of the packages that made them.
        weights: what their readers must know beside config.json and the files.
        pieces: their files, in order.
    """

    format: int
    quantize: str
    recipe: dict[str, Any]
    source: Source
    versions: dict[str, str]
    weights: dict[str, Any]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the weights' files."""
        return sum(piece.num_bytes for piece in self.pieces)

    def writer(self) -> Writer:
        """Writes the file."""
        return json_writer(asdict(self))

    def digest(self) -> str:
        """A hash of the weights and of what reads them, by the recorded hashes."""
        return hashlib.sha256(repr((self.format, self.weights, self.pieces)).encode()).hexdigest()[:32]


def is_quantized(folder: Path) -> bool:
    """Whether a folder holds a quantised model, finished or not."""
    return any((folder / name).is_file() for name in (MANIFEST, PROGRESS))


def read_manifest(folder: Path) -> Manifest:
    """The manifest in the folder of a quantised model.

    Raises:
        CheckpointError: the job that makes it has not ended; or the manifest is damaged, or of another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is not finished; run the same unmask quantize again, and it goes on")
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {values.get('format')!r}, and {FORMAT} is read; quantise the model again")
    # Imported here: it takes a fifth of a second, and every start asks whether its folder is a quantised one.
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Manifest).validate_python(values)
    except ValidationError as error:
        where = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        raise CheckpointError(f"{path} is damaged ({where}); copy it again, or quantise the model again") from error


def describe_piece(path: Path) -> Piece:
    """A file of packed weights, read whole."""
    digest, header = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        first = file.read(HEADER_BYTES)
        header.update(first)
        digest.update(first)
        while part := file.read(_CHUNK):
            digest.update(part)
    return Piece(path.name, path.stat().st_size, header.hexdigest(), digest.hexdigest())


def check_header(folder: Path, piece: Piece) -> None:
    """Compare size and header of a file with what the manifest says.

    Raises:
        CheckpointError: they differ.
    """
    path = folder / piece.file
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = hashlib.sha256(file.read(HEADER_BYTES)).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); copy it again, or quantise again") from error
    if size != piece.num_bytes:
        raise CheckpointError(f"{path} has {size:,} bytes, not {piece.num_bytes:,}; copy it again, or quantise again")
    if header != piece.header_sha256:
        raise CheckpointError(f"{path} is damaged, or another model's (its header differs); copy it again, or quantise again")


def verify(folder: Path, manifest: Manifest, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Compare every byte of the weights with the manifest's hashes.

    Args:
        folder: of the model.
        manifest: its own.
        on_progress: called with (files done, files in all).

    Raises:
        CheckpointError: a file is missing, cut short or damaged; it is named.
    """
    for number, piece in enumerate(manifest.pieces):
        check_header(folder, piece)
        if describe_piece(folder / piece.file) != piece:
            raise CheckpointError(f"{folder / piece.file} is damaged (sha256 differs); copy it again, or quantise again")
        on_progress(number + 1, len(manifest.pieces))


def float_model(folder: Path) -> str:
    """Why a folder cannot give float weights, and which model can, for messages; empty: it is not of a quantised model."""
    if not (folder / MANIFEST).is_file():
        return ""
    manifest = read_manifest(folder)
    return (
        f"{folder} holds {manifest.quantize} weights, which decode and no more; give the model that they were made from, "
        f"{manifest.source.model}"
    )
