"""Several threads at once give what one gives: calls of a shared model, models of their own, and engines of one backend."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers import SPECIAL_TOKENS, make_tokenizer
from tiny import MASK, tiny_model
from unmask.engine.llm import LanguageModel
from unmask.models.native.library import kernel_variant

THREADS = 3
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.2},
    {"temperature": 1.2, "seed": 3},
    {"block_size": 8, "policy": "entropy"},
    {"temperature": 0.7, "top_p": 0.8, "logprobs": 1},
)
JOBS = [(tuple((7 * i + j) % MASK for j in range(3 + 7 * i)), options) for i, options in enumerate(OPTIONS)]

WEIGHTS = [
    "none",
    *(
        pytest.param(weights, marks=pytest.mark.skipif(kernel_variant() is None, reason="the CPU kernels are not built"))
        for weights in ("int8", "int4")
    ),
]


def make(weights: str) -> LanguageModel:
    return LanguageModel(tiny_model("qwen3", 1, mask_id=MASK, block_size=4), None, name="tiny", quantize=weights)


def answers(model: LanguageModel) -> list[Any]:
    return [model.complete(ids, max_new_tokens=6, **options) for ids, options in JOBS]


def batch(model: LanguageModel) -> list[Any]:
    return model.engine(num_tokens=512, max_num_seqs=3).run([model.request(ids, max_new_tokens=6, **o) for ids, o in JOBS])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_threads_answer_as_one_does(weights: str) -> None:
    """The first calls also pack the weights."""
    expected, shared = answers(make(weights)), make(weights)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(answers, [shared] * THREADS))
        own = list(pool.map(lambda _: answers(make(weights)), range(THREADS)))
        batches = list(pool.map(batch, [shared] * THREADS))
    assert found == own == [expected] * THREADS
    assert batches == [batch(shared)] * THREADS
    # In other batches float32 rounds otherwise; the kernels do not.
    assert weights == "none" or batches[0] == expected


def test_threads_share_tokenizer_and_grammars(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, special_tokens=(*SPECIAL_TOKENS, "<|mask|>"), mask_token="<|mask|>")
    shape: dict[str, Any] = {"mask_id": tokenizer.mask_id, "block_size": 4, "eos_ids": (tokenizer.eos_id,)}
    model = LanguageModel(tiny_model("llama", 1, vocab_size=tokenizer.vocab_size, **shape), tokenizer, name="tiny")
    asked = [(f"What is {i} + 3?", {"regex": "[0-9]{3}"} if i % 2 else {"stop": "e"}) for i in range(4)]

    def ask(job: tuple[str, dict[str, Any]]) -> str:
        return model.generate(job[0], max_new_tokens=6, temperature=1.0, **job[1]).text

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(ask, asked))
    assert found == list(map(ask, asked))
