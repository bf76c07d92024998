"""Fill-in-the-middle prompts of left-to-right models, by the control tokens that their tokenizers have."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import SPECIAL_TOKENS, make_tokenizer
from unmask.engine.fim import FimTokens

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>")
DEEPSEEK = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


@pytest.mark.parametrize("names", [QWEN, DEEPSEEK])
def test_the_gap_comes_after_both_sides(tmp_path: Path, names: tuple[str, ...]) -> None:
    tokenizer = make_tokenizer(tmp_path, special_tokens=(*SPECIAL_TOKENS, *names))
    fim = FimTokens.of(tokenizer)
    assert fim is not None
    ids = fim.prompt(tokenizer.prefix_ids, tokenizer.encode("def f("), tokenizer.encode("return"))
    assert tokenizer.decode(ids, skip_special=False) == f"{names[0]}def f({names[1]}return{names[2]}"
    assert {tokenizer.special_tokens[name] for name in names} <= fim.ends


def test_a_tokenizer_without_such_tokens(tmp_path: Path) -> None:
    assert FimTokens.of(make_tokenizer(tmp_path, special_tokens=(*SPECIAL_TOKENS, *QWEN[:2]))) is None
