"""Tokenizer files: read as transformers reads them, and written so that it reads the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from helpers import CHATML, CORPUS, make_sentencepiece_tokenizer, make_tokenizer, refused, say
from unmask.data.tokenizer import load_tokenizer
from unmask.data.tokenizer_files import read_tokenizer
from unmask.errors import CheckpointError

KINDS = ("bytes", "first", "always", "prepend", "never", "wordpiece", "unigram")
TEXTS = ("Hello, how are you? 12 + 34", " a  b\n\n", "é漢\U0001f600", "</s> <|im_end|>", "")


def train(folder: Path, kind: str) -> None:
    """A tokenizer of one kind in a folder."""
    if kind == "bytes":
        make_tokenizer(folder, bos_token="<|im_start|>", plain_added=("<tool>",))
        return
    if kind not in ("wordpiece", "unigram"):
        make_sentencepiece_tokenizer(folder, kind)
        return
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    backend = Backend(models.WordPiece(unk_token="[UNK]") if kind == "wordpiece" else models.Unigram())
    trainer: Any
    if kind == "wordpiece":
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    else:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=names, unk_token="[UNK]", show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "$A $B", [("[CLS]", 1), ("[SEP]", 2)])
    backend.enable_truncation(4)
    backend.enable_padding(length=9, pad_id=3, pad_token="[PAD]")
    roles = {"unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **roles)
    inner.save_pretrained(str(folder))


def check_against_transformers(folder: Path) -> None:
    """Every id, text, named token and conversation is what transformers makes of the folder."""
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_id, ours.mask_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.mask_token_id)
    assert ours.pad_id == (theirs.eos_token_id if theirs.pad_token_id is None else theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    assert read_tokenizer(folder).named == theirs.special_tokens_map
    assert ours.added_tokens == {id_: str(token) for id_, token in theirs.added_tokens_decoder.items()}
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False, truncation=False, padding=False)
        assert ours.encode(text, allow_special=True) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)
    if theirs.chat_template is not None:
        expected = theirs.apply_chat_template(say("Hello", "Hi"), tokenize=False)
        assert ours.render(say("Hello", "Hi"), add_generation_prompt=False) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_writing_agree_with_transformers(tmp_path: Path, kind: str) -> None:
    train(tmp_path / "a", kind)
    check_against_transformers(tmp_path / "a")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    check_against_transformers(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").identity == load_tokenizer(tmp_path / "a").identity


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in (json.loads(path.read_text()) | changes).items() if value != "-"}))


def test_what_the_other_files_add(tmp_path: Path) -> None:
    """Added, extra and named tokens that tokenizer.json lacks, and tokens named in a file of their own."""
    listed, mapped, extra = (make_tokenizer(tmp_path / name) and tmp_path / name for name in ("listed", "mapped", "extra"))
    free = load_tokenizer(listed).next_free_id
    token = {"content": "<new>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False, "special": True}
    change_config(listed, added_tokens_decoder={str(free): token}, pad_token="<new>", image_token="<image>")
    named = {"pad_token": {"content": "<pad>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}}
    (mapped / "special_tokens_map.json").write_text(json.dumps({**named, "eos_token": "<|im_end|>"}))
    change_config(extra, additional_special_tokens=["<x>", "<|im_end|>"], mask_token={"__type": "AddedToken", **token})
    for folder in (listed, mapped, extra):
        check_against_transformers(folder)
    assert load_tokenizer(mapped).eos_id == load_tokenizer(mapped).special_tokens["<|im_end|>"]


def test_tokens_of_a_class_stand_in_for_those_that_are_not_named(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    change_config(tmp_path, tokenizer_class="Qwen2TokenizerFast", eos_token="-")
    assert load_tokenizer(tmp_path).eos_id == 0
    change_config(tmp_path, tokenizer_class="LlamaTokenizer")
    with refused(CheckpointError, "eos_token"):
        load_tokenizer(tmp_path)


def test_chat_templates_by_their_file(tmp_path: Path) -> None:
    """A file beats the config; files of further templates add to it; a list in the config names its templates."""
    make_tokenizer(tmp_path, chat_template=None)
    for template in ("one", [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]):
        change_config(tmp_path, chat_template=template)
        assert read_tokenizer(tmp_path).templates == (
            {"default": "one"} if template == "one" else {"default": "d", "tool_use": "t"}
        )
        check_against_transformers(tmp_path)
    make_tokenizer(tmp_path / "again")
    load_tokenizer(tmp_path).save(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again").templates == {"default": "d", "tool_use": "t"}
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_tokenizer(tmp_path).templates == {"default": "file"}
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "rag.jinja").write_text("r")
    assert read_tokenizer(tmp_path).templates == {"default": "file", "rag": "r"}
    check_against_transformers(tmp_path)


def test_other_kinds_of_files_are_converted_where_transformers_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tokenizer(tmp_path / "a")
    model = json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = "Hello, how are you?"
    assert load_tokenizer(folder).encode(text) == load_tokenizer(tmp_path / "a").encode(text)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused(CheckpointError, "tokenizer.json", "transformers"):
        load_tokenizer(folder)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    change_config(tmp_path, added_tokens_decoder={"x": 1})
    with refused(CheckpointError, tmp_path):
        load_tokenizer(tmp_path)


def test_flags_of_added_tokens_are_kept(tmp_path: Path) -> None:
    make_sentencepiece_tokenizer(tmp_path, "first", control=(AddedToken("<x>", lstrip=True, rstrip=True, normalized=False),))
    ours, theirs = read_tokenizer(tmp_path).backend, AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    assert list(map(repr, ours.get_added_tokens_decoder().values())) == list(
        map(repr, theirs.get_added_tokens_decoder().values())
    )
