"""nltk's sentences without its data: what stands in, when, what it says of itself, and that it never waits."""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nltk
import pytest
from nltk.tokenize import _get_punkt_tokenizer

from unmask.eval import sentences
from unmask.eval.sentences import FOLDER, NOTE, ensure_punkt


@pytest.fixture(scope="module")
def lm_eval_util() -> Any:
    """lm-eval's module, which asks for a download as it is imported where nothing has been done about that."""
    ensure_punkt()
    return importlib.import_module("lm_eval.tasks.ifeval.instructions_util")


@pytest.fixture
def absent(lm_eval_util: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An nltk without data, and nothing that could download it."""
    kept = (sentences.download_punkt, _get_punkt_tokenizer, lm_eval_util._get_sentence_tokenizer)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    for cached in kept:
        cached.cache_clear()
    yield tmp_path
    for cached in kept:
        cached.cache_clear()


def install(folder: Path, *abbreviations: str) -> None:
    """Data that stands for punkt's own."""
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (english / name).touch()
    (english / "abbrev_types.txt").write_text("".join(f"{each}\n" for each in abbreviations))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three? Four.", 4),
        ("Mr. Smith met Dr. Jones at 5 p.m. in Washington, D.C. on Friday. They spoke of the U.S. economy.", 2),
        ("It costs $3.50 now, up 2.5 per cent. That is much.", 2),
        ('"Is it late?" she asked. "It is," he said.', 3),
        ("It's okay to say no. Practice it.", 2),
        ("I waited... and waited. Nothing came.", 2),
        ("no capital letters here. none at all.", 2),
        ("A line without a stop\nand its second half. End.", 2),
        ("", 0),
    ],
)
def test_sentences_are_counted_without_data(absent: Path, lm_eval_util: Any, text: str, count: int) -> None:
    assert ensure_punkt() == NOTE
    assert lm_eval_util.count_sentences(text) == count
    assert len(nltk.sent_tokenize(text)) == count


def test_words_are_found_and_nothing_is_downloaded(absent: Path, lm_eval_util: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_punkt()
    monkeypatch.setattr(nltk, "download", lambda name: pytest.fail(f"{name} was to be downloaded"))
    lm_eval_util.download_nltk_resources()
    assert nltk.word_tokenize("Mr. Smith isn't HERE. Go!") == ["Mr.", "Smith", "is", "n't", "HERE", ".", "Go", "!"]


def test_real_data_is_left_alone(absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    install(absent, "xyzzy")
    assert ensure_punkt() is None
    assert nltk.data.path == [str(absent)]
    assert len(nltk.sent_tokenize("The xyzzy. Mr. Smith.")) == 2


def test_what_is_downloaded_is_taken(absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: install(absent))
    assert ensure_punkt() is None
    assert str(FOLDER) not in nltk.data.path


def test_it_is_said_every_time_and_tried_once(absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = []
    monkeypatch.setattr(subprocess, "run", lambda *given, **_: run.append(given))
    assert [ensure_punkt() for _ in range(3)] == [NOTE] * 3
    assert len(run) == 1
    assert nltk.data.path.count(str(FOLDER)) == 1


def test_tasks_without_sentences_change_nothing(absent: Path) -> None:
    assert ensure_punkt(["arc_challenge", "hellaswag"]) is None
    assert nltk.data.path == [str(absent)]
    assert ensure_punkt(["arc_challenge", "niah_single_1"]) == NOTE


def test_a_network_that_does_not_answer_is_not_waited_for(absent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = absent / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("a socket was opened"))
    started = time.monotonic()
    assert ensure_punkt(seconds=0.5) == NOTE
    assert 0.5 <= time.monotonic() - started < 5
