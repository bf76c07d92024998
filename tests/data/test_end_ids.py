"""End ids: every source of them, and where what was decided is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import CHATML, SPECIAL_TOKENS, make_tokenizer, refused, say
from models.weights.saved import saved_base
from tiny import tiny_config
from unmask.data.end_ids import end_ids
from unmask.data.tokenizer import Tokenizer
from unmask.engine.loading import load
from unmask.errors import CheckpointError, RequestError, UnmaskWarning
from unmask.models.weights.adapter import attach_lora, save_adapter
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.export import export_model
from unmask.models.weights.loading import load_model

SIZE = 400


def ends_of(tokenizer: Tokenizer | None, *eos: int, vocab_size: int = SIZE) -> tuple[int, ...]:
    return end_ids(tiny_config("llama", vocab_size=vocab_size, eos_ids=eos), tokenizer)


def test_config_tokenizer_and_template_add_up(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "chat")
    end_of_text, end_of_turn = (tokenizer.special_tokens[token] for token in ("<|endoftext|>", "<|im_end|>"))
    assert ends_of(None, 7, 5) == (7, 5)
    assert ends_of(tokenizer, 7) == (7, end_of_text, end_of_turn)
    assert ends_of(tokenizer, end_of_turn) == (end_of_turn, end_of_text)
    assert ends_of(tokenizer, 9, vocab_size=end_of_turn) == tuple(id_ for id_ in (9, end_of_text) if id_ < end_of_turn)
    plain = make_tokenizer(tmp_path / "plain", chat_template=None)
    assert ends_of(plain) == (plain.eos_id,)


def test_an_end_of_turn_may_be_no_control_token(tmp_path: Path) -> None:
    template = CHATML.replace("<|im_end|>", "<end>")
    special = tuple(token for token in SPECIAL_TOKENS if token != "<|im_end|>")
    tokenizer = make_tokenizer(
        tmp_path, special_tokens=special, plain_added=("<en", "<end>", "<think>"), chat_template=template
    )
    end = next(id_ for id_, token in tokenizer.added_tokens.items() if token == "<end>")
    assert ends_of(tokenizer) == tuple(sorted((tokenizer.eos_id, end)))
    assert tokenizer.decode([*tokenizer.encode("so"), end]) == "so"
    assert end not in tokenizer.encode("a user's <end>")
    ids, learnt = tokenizer.chat_document(say("a", "b", "c", "d"))
    assert [id_ for id_, flag in zip(ids, learnt, strict=True) if flag].count(end) == 2


@pytest.mark.parametrize(
    ("eos", "expected"), [(5, (3, 5)), ([5, 3, 6], (3, 5, 6)), (None, (3,)), ([], (3,)), (-1, (3,)), ([None, 4], (3, 4))]
)
def test_generation_config_adds_to_config(eos: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "m", eos_ids=(3,))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert read_model_config(base).eos_ids == expected
    assert load(base, dtype="float32").request([1]).eos_ids == frozenset(expected)


def test_ends_that_are_no_tokens(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "m", eos_ids=(3,))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 61]}))
    with pytest.warns(UnmaskWarning, match="61"):
        assert read_model_config(base).eos_ids == (3, 4)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with refused(CheckpointError, "generation_config.json", "eos_token_id", "'</s>'"):
        read_model_config(base)
    (base / "generation_config.json").unlink()
    with refused(RequestError, "eos_id", 61):
        load(base, dtype="float32").generate_ids([1], eos_id=61)


def test_an_adapter_and_an_export_keep_the_ends_of_the_base(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "base", eos_ids=(3,))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 8]}))
    model = attach_lora(load_model(base, dtype=torch.float32), rank=1, alpha=1.0, seed=0, train_embedding=False)
    save_adapter(model, tmp_path / "ours", base=str(base))
    save_adapter(model, tmp_path / "peft", base=str(base))
    (tmp_path / "peft" / "unmask_config.json").unlink()
    for folder in (tmp_path / "ours", tmp_path / "peft"):
        assert load(folder, dtype="float32").eos_ids == read_model_config(folder).eos_ids == (3, 8)
        export_model(folder, tmp_path / f"{folder.name}-out")
        written = json.loads((tmp_path / f"{folder.name}-out" / "generation_config.json").read_text())
        assert written["eos_token_id"] == [3, 8]
