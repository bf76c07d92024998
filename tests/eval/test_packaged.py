"""Data files of other packages: found without importing these, and what is missing is told."""

from __future__ import annotations

import gzip
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from helpers import refused
from unmask.errors import ConfigError
from unmask.eval.packaged import read_packaged


class Packaged:
    """A file as a distribution lists it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def locate(self) -> Path:
        return self._path


def install(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    monkeypatch.setattr(metadata, "files", lambda name: [Packaged(path) for path in paths])


@pytest.mark.parametrize("name", ["data/some.jsonl", "data/some.jsonl.gz"])
def test_records_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    records: list[dict[str, Any]] = [{"a": "é"}, {"a": 2}]
    path = tmp_path / name
    path.parent.mkdir()
    text = "\n".join(json.dumps(each, ensure_ascii=False) for each in records).encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    install(monkeypatch, tmp_path / "other.py", path)
    assert read_packaged("Some", "some-package==1", name, 2) == tuple(records)
    with refused(ConfigError, "records", 2, 3, "some-package==1"):
        read_packaged("Some", "some-package==1", name, 3)


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def files(name: str) -> list[Path]:
        raise metadata.PackageNotFoundError(name)

    arguments = ("Some", "some-package==1", "some.jsonl", 2)
    monkeypatch.setattr(metadata, "files", files)
    with refused(ConfigError, "Some", "--no-deps some-package==1"):
        read_packaged(*arguments, options="--no-deps ")
    monkeypatch.setattr(metadata, "files", lambda _: None)
    with refused(ConfigError, "some-package", "some.jsonl"):
        read_packaged(*arguments)
    install(monkeypatch, tmp_path / "some.jsonl")
    with refused(ConfigError, "some-package", "some.jsonl"):
        read_packaged(*arguments)
