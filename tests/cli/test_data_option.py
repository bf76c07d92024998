"""`--data`: which source one word names."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import refused
from unmask.cli.data_option import source_of
from unmask.data.sources import SourceConfig
from unmask.errors import ConfigError


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("a/b.jsonl", {"kind": "jsonl", "path": "a/b.jsonl"}),
        ("b.parquet", {"kind": "parquet", "path": "b.parquet"}),
        ("b.txt", {"kind": "text", "path": "b.txt"}),
        ("parts/*.jsonl", {"kind": "jsonl", "path": "parts/*.jsonl"}),
        ("HuggingFaceTB/smol-smoltalk", {"kind": "huggingface", "id": "HuggingFaceTB/smol-smoltalk"}),
        ("openai/gsm8k", {"kind": "huggingface", "id": "openai/gsm8k"}),
        ("reasoning_gym:chain_sum", {"kind": "reasoning_gym", "families": {"chain_sum": {}}}),
        ("reasoning_gym:chain_sum, leg_counting", {"kind": "reasoning_gym", "families": {"chain_sum": {}, "leg_counting": {}}}),
    ],
)
def test_words(data: str, expected: dict[str, object]) -> None:
    assert source_of(data) == expected
    SourceConfig.model_validate(source_of(data))


@pytest.mark.parametrize(("suffix", "kind"), [(".jsonl", "jsonl"), (".parquet", "parquet"), (".txt", "text")])
def test_a_folder_is_what_its_files_are(tmp_path: Path, suffix: str, kind: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / f"part{suffix}").touch()
    assert source_of(str(tmp_path)) == {"kind": kind, "path": str(tmp_path)}


@pytest.mark.parametrize("names", [[], ["a.jsonl", "b.txt"], ["a.csv"]])
def test_a_folder_that_decides_nothing(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with refused(ConfigError, "folder"):
        source_of(str(tmp_path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with refused(ConfigError, "'.csv'"):
        source_of(str(tmp_path / "a.csv"))


def test_empty() -> None:
    with refused(ConfigError, "--data"):
        source_of("")


@pytest.mark.parametrize("data", ["./data", "/data/x", "a/b/c", "../up", "~/x", "a b"])
def test_nothing_of_the_sort(data: str) -> None:
    with refused(ConfigError, "file"):
        source_of(data)
