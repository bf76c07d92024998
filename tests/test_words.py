"""Old names stay gone: code, help, documentation and recipes use the field's terms (docs/glossary.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("src", "docs", "recipes", "README.md")
SUFFIXES = {".py", ".md", ".yaml", ".js", ".html", ".cpp", ".h"}
OLD = {
    "engine": r"VerifiedSequence|CausalSequence|PagePool|PrefixDigests|DecodeRules|num_held|\w*slots_K|open_rows|causal_rows",
    "limits": r"max_running|max_rows|num_pages|holders",
    "gated LoRA": r"gated_rank|gated_updates?|[Gg]ated updates?",
    "training": r"open_BT|num_draws|draws_per_row",
    "self-speculative decoding": r"[Vv]erified decoding|[Cc]hecked drafts?|[Oo]pen rows|[Cc]ausal rows|verify: ?bool",
    "KV cache": r"KVStore|kv_store|store_tokens|key-value store|[Pp]ages of the (cache|store)",
    "candidates": r"\w*_of_N",
    "help": r"[Ll]eft out:",
    "next-token loss": r"(?<!x-)guidance(?!-ai)",
}


def files() -> list[Path]:
    paths = [path for place in PLACES for path in ([ROOT / place] if place.endswith(".md") else (ROOT / place).rglob("*"))]
    return [path for path in paths if path.suffix in SUFFIXES and "vendor" not in path.parts]


@pytest.mark.parametrize("term", OLD)
def test_old_words_are_gone(term: str) -> None:
    pattern = re.compile(rf"(?<!\w)(?:{OLD[term]})(?!\w)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_the_files_are_there() -> None:
    assert len(files()) > 200
