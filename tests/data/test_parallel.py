"""Parallel tokenising: the documents, order and positions of the source itself, and failures in their turn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import refused
from unmask.data.documents import Document
from unmask.data.encoding import RecordSource
from unmask.data.parallel import EncoderPool, ParallelSource, encoder_pool
from unmask.data.sources import SourceConfig, open_source
from unmask.data.tokenizer import Tokenizer
from unmask.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def pool() -> Iterator[EncoderPool]:
    with encoder_pool(2) as pool:
        assert pool is not None
        yield pool


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": "say", "response": text}) + "\n" for text in texts))
    return path


def opened(path: Path, tokenizer: Tokenizer) -> RecordSource:
    return open_source(SourceConfig(kind="jsonl", path=str(path)), tokenizer, seed=3)


def content(document: Document) -> tuple[list[int], list[bool]]:
    return document.tokens.tolist(), document.maskable.tolist()


def test_documents_epochs_and_states_are_those_of_the_source(tmp_path: Path, tokenizer: Tokenizer, pool: EncoderPool) -> None:
    path = write(tmp_path / "data.jsonl", [f"number {number}" for number in range(90)])
    plain, ahead = opened(path, tokenizer), ParallelSource(opened(path, tokenizer), pool)
    for _ in range(200):
        assert ahead.state_dict() == plain.state_dict()
        assert ahead.epoch == plain.epoch
        assert content(ahead.next_document()) == content(plain.next_document())
    resumed = ParallelSource(opened(path, tokenizer), pool)
    resumed.load_state_dict(json.loads(json.dumps(ahead.state_dict())))
    assert content(resumed.next_document()) == content(plain.next_document())


def test_a_record_that_cannot_be_used_fails_when_its_turn_comes(
    tmp_path: Path, tokenizer: Tokenizer, pool: EncoderPool
) -> None:
    path = write(tmp_path / "data.jsonl", ["fine", "\ufdd0"])
    source = ParallelSource(open_source(SourceConfig(kind="jsonl", path=str(path), shuffle=False), tokenizer, seed=0), pool)
    source.next_document()
    with refused(DataError, "line 2"):
        source.next_document()


def test_a_number_of_processes_that_cannot_be_is_refused() -> None:
    with refused(ConfigError, "nproc", 0), encoder_pool(0):
        pass
