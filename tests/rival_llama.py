"""llama.cpp beside the tests: logits and tokens, from an interpreter that has llama-cpp-python.

That is the one `LLAMA_PYTHON` names, this one, or that of an environment `llama-venv` in a folder above this file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = """
import json, sys
from itertools import islice
import llama_cpp
for request in json.load(sys.stdin):
    model = llama_cpp.Llama(request["file"], n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    answer = {"ids": [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]}
    if request["prompt"]:
        model.eval(request["prompt"])
        answer["logits"] = model.scores[: len(request["prompt"])].tolist()
        model.reset()
        answer["greedy"] = list(islice(model.generate(request["prompt"], temp=0.0), request["tokens"]))
    print(json.dumps(answer))
"""


def _python() -> str:
    beside = (folder / "llama-venv" / "bin" / "python" for folder in Path(__file__).resolve().parents)
    found = os.environ.get("LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)
    found = found or next((str(path) for path in beside if path.is_file()), None)
    if found is None:
        pytest.skip("no llama-cpp-python (LLAMA_PYTHON names an interpreter that has it)")
    return found


def request(file: Path, prompt: Sequence[int] = (), *, tokens: int = 0, texts: Sequence[str] = ()) -> dict[str, Any]:
    """What to ask of a file: logits after `prompt`, `tokens` greedy tokens, and the ids of texts."""
    return {"file": str(file), "prompt": list(prompt), "tokens": tokens, "texts": list(texts)}


def ask(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers: `ids` of each text; with a prompt also `logits` and `greedy`."""
    command = [_python(), "-c", _SCRIPT]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
