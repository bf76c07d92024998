"""Tokenizers in GGUF metadata: every way of splitting text, there and back, and what llama.cpp makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import rival_llama
from helpers import CORPUS, refused
from tiny import tiny_model
from unmask.errors import CheckpointError
from unmask.models.weights.checkpoint import save_model
from unmask.models.weights.gguf.metadata import Metadata
from unmask.models.weights.gguf.tokenizer import read_token_ids, read_tokenizer, read_tokenizer_config, tokenizer_metadata
from unmask.models.weights.gguf_export import GGUFTokenizer, export_gguf

# As in tokenizer.json of Llama 3 and of Qwen2.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
DIGITS = pre_tokenizers.Digits(individual_digits=True)
SPLITS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [DIGITS, pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}  # fmt: skip
TEXTS = [
    "The quick brown fox",
    "  12345 +\t34 = \n\n46.5\r\n",
    "DON'T you're we'LL",
    "naïve 你好 \U0001f642",
    "a\n  b   c ",
    "<|end|>x<tool>",
]
NAMED = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


def trained(name: str, *, begins: bool = False) -> Tokenizer:
    """A tokenizer that splits as the models do that llama.cpp calls so."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[name])
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "12345 12345 naïve 你好 you're we'll"] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in NAMED.values()])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if begins:
        pair = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", pair="$A $B", special_tokens=[pair])
    return tokenizer


def metadata_of(tokenizer: Tokenizer, num_rows: int = 512, **changes: Any) -> Metadata:
    end = tokenizer.token_to_id("<|end|>")
    values = tokenizer_metadata(tokenizer, NAMED, [end, 7], "{{ messages }}", num_rows)
    values |= {"general.architecture": "llama", "llama.context_length": 99}
    return Metadata({key: value for key, value in {**values, **changes}.items() if value is not None}, "x.gguf")


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", SPLITS)
def test_there_and_back(name: str, begins: bool) -> None:
    tokenizer = trained(name, begins=begins)
    metadata = metadata_of(tokenizer)
    assert (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) == ("gpt2", name)
    again = read_tokenizer(metadata)
    for text in TEXTS:
        assert again.encode(text).ids == tokenizer.encode(text).ids, text
        assert again.decode(again.encode(text).ids) == tokenizer.decode(tokenizer.encode(text).ids)
    assert {(t.content, t.special) for t in again.get_added_tokens_decoder().values()} == {
        ("<|begin|>", True), ("<|end|>", True), ("<tool>", False),
    }  # fmt: skip
    assert again.get_vocab_size() == tokenizer.get_vocab_size()  # rows without a token stay without one
    config = read_tokenizer_config(metadata)
    assert (config["bos_token"], config["eos_token"], config["chat_template"]) == ("<|begin|>", "<|end|>", "{{ messages }}")
    end = tokenizer.token_to_id("<|end|>")
    assert read_token_ids(metadata) == {"bos_token_id": end - 1, "eos_token_id": [end, 7], "pad_token_id": None}


def test_llama_cpp_makes_the_same_ids(tmp_path: Path) -> None:
    requests, expected = [], []
    for name in SPLITS:
        tokenizer, folder = trained(name), tmp_path / name
        save_model(tiny_model("llama", vocab_size=tokenizer.get_vocab_size(), eos_ids=(1,)), folder)
        export_gguf(folder, tmp_path / f"{name}.gguf", GGUFTokenizer(tokenizer, NAMED, None))
        requests.append(rival_llama.request(tmp_path / f"{name}.gguf", texts=TEXTS))
        expected.append([tokenizer.encode(text).ids for text in TEXTS])
    for name, answer, ids in zip(SPLITS, rival_llama.ask(*requests), expected, strict=True):
        assert answer["ids"] == ids, name


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"tokenizer.ggml.model": "t5"}, ("x.gguf", "tokenizer.ggml.model", "'t5'", "SentencePiece")),
        ({"tokenizer.ggml.pre": "tekken"}, ("x.gguf", "tokenizer.ggml.pre", "'tekken'", "qwen2")),
        ({"tokenizer.ggml.tokens": None}, ("x.gguf", "'tokenizer.ggml.tokens'")),
        ({"tokenizer.ggml.token_type": [1]}, ("x.gguf", "tokenizer.ggml.token_type", 1, 512)),
        ({"tokenizer.ggml.merges": ["a b c"]}, ("x.gguf", "merges")),
        ({"tokenizer.ggml.merges": ["zz yy"]}, ("x.gguf", "merges")),
        ({"tokenizer.ggml.tokens": list(range(512))}, ("x.gguf", "tokenizer.ggml.tokens")),
        ({"tokenizer.ggml.bos_token_id": 600, "tokenizer.ggml.add_bos_token": True}, ("x.gguf", "tokenizer.ggml.tokens")),
        ({"tokenizer.ggml.model": "llama"}, ("x.gguf", "'tokenizer.ggml.scores'")),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], names: tuple[object, ...]) -> None:
    with refused(CheckpointError, *names):
        read_tokenizer(metadata_of(trained("gpt-2"), **changes))


def test_what_cannot_be_written_is_named() -> None:
    tokenizer = trained("gpt-2")
    with refused(CheckpointError, tokenizer.get_vocab_size() - 1, 100):
        metadata_of(tokenizer, num_rows=100)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with refused(CheckpointError, "Whitespace", "smollm"):
        metadata_of(tokenizer)
    state = json.loads(Tokenizer(models.WordLevel({"<|end|>": 0}, unk_token="<|end|>")).to_str())
    with refused(CheckpointError, "WordLevel", "BPE"):
        metadata_of(Tokenizer.from_str(json.dumps(state)))
