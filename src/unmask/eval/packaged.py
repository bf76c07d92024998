"""Benchmark data inside installed packages: their files are read, none of their code is run."""

from __future__ import annotations

import gzip
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError


def read_packaged(benchmark: str, requirement: str, name: str, size: int, *, options: str = "") -> tuple[dict[str, Any], ...]:
    """The records of a JSON Lines file of an installed package.

    Args:
        benchmark: name for error messages.
        requirement: the package and its version, as in pip's `name==version`.
        name: the end of the file's path; compressed with gzip if it ends in .gz.
        size: the number of records that it must have.
        options: of pip, for error messages.

    Raises:
        ConfigError: the package is not installed, or lacks its data.
    """
    package = requirement.partition("==")[0]
    remedy = f"install it with: pip install {options}{requirement}"
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise ConfigError(f"{benchmark} needs the package {package}, which is not installed; {remedy}") from None
    paths = [Path(str(file.locate())) for file in files if str(file).endswith(name)]
    if not paths or not paths[0].is_file():
        raise ConfigError(f"the installed package {package} has no {name}; {remedy}")
    with (gzip.open if name.endswith(".gz") else open)(paths[0], "rt", encoding="utf-8") as lines:
        records = tuple(json.loads(line) for line in lines if line.strip())
    if len(records) != size:
        raise ConfigError(f"{paths[0]} has {len(records)} records, not {size}; {remedy}")
    return records
