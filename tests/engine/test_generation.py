"""What a generation says it cost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from helpers import make_tokenizer
from tiny import tiny_model
from unmask.engine.backends.base import Backend
from unmask.engine.llm import LanguageModel

SECONDS = 0.3


class SlowToQuantize(LanguageModel):
    def backend(self) -> Backend:
        time.sleep(SECONDS)
        return super().backend()


def test_seconds_are_those_of_decoding(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    model = SlowToQuantize(tiny_model("llama", 1, vocab_size=tokenizer.vocab_size), tokenizer, name="tiny")
    for found in (model.generate("Hello", max_new_tokens=4), *model.generate_batch(["Hello", "Hi"], max_new_tokens=4)):
        assert found.setup_seconds >= SECONDS
        assert found.seconds == found.costs.busy_seconds > 0
        assert found.tokens_per_second == pytest.approx(found.completion_tokens / found.seconds)
