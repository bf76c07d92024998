from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tokenizers import processors

from helpers import make_tokenizer
from unmask.data.documents import Document
from unmask.data.encoding import DocumentEncoder, Fields
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.errors import DataError

MESSAGES = [{"role": "user", "content": "2 + 3"}, {"role": "assistant", "content": "5"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> DocumentEncoder:
    return DocumentEncoder(tokenizer)


def spelled(tokenizer: Tokenizer, document: Document) -> tuple[str, str]:
    """What is given and what is to be learnt."""
    given, learnt = document.tokens[~document.maskable], document.tokens[document.maskable]
    assert document.tokens.dtype == np.int32
    return tokenizer.decode(given, skip_special=False), tokenizer.decode(learnt, skip_special=False)


def test_text_is_learnt_whole_and_ends(encoder, tokenizer):
    document = encoder.encode({"text": "the fox", "id": 3}, "here")
    assert spelled(tokenizer, document) == ("", "the fox<|endoftext|>")


@pytest.mark.parametrize("response", ["response", "completion"])
def test_prompt_and_response_go_through_the_template(encoder, tokenizer, response):
    document = encoder.encode({"prompt": "2 + 3", response: "5"}, "here")
    given = "<|im_start|>user\n2 + 3<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(tokenizer, document) == (given, "5<|im_end|>")
    same = encoder.encode({"messages": MESSAGES}, "here")
    assert (document.tokens.tolist(), document.maskable.tolist()) == (same.tokens.tolist(), same.maskable.tolist())


def test_prompt_and_response_without_template(encoder, tokenizer, tmp_path):
    record = {"prompt": "2 + 3 =", "response": " 5"}
    off = replace(encoder, chat=False).encode(record, "here")
    assert spelled(tokenizer, off) == ("2 + 3 =", " 5<|endoftext|>")
    none = replace(encoder, tokenizer=make_tokenizer(tmp_path, chat_template=None)).encode(record, "here")
    assert none.tokens.tolist() == off.tokens.tolist()


def test_supervise_all_learns_everything(encoder, tokenizer):
    everything = replace(encoder, supervise="all")
    conversation = everything.encode({"messages": MESSAGES}, "here")
    text = "<|im_start|>user\n2 + 3<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n<|endoftext|>"
    assert spelled(tokenizer, conversation) == ("", text)
    plain = replace(everything, chat=False).encode({"prompt": "a", "response": "b"}, "here")
    assert spelled(tokenizer, plain) == ("", "ab<|endoftext|>")


@pytest.mark.parametrize("supervise", ["response", "all"])
@pytest.mark.parametrize("eos_fill", [1, 7, 32])
def test_documents_are_filled_with_learnt_ends(encoder, tokenizer, supervise, eos_fill):
    for record in ({"text": "the fox"}, {"messages": MESSAGES}):
        bare = replace(encoder, supervise=supervise).encode(record, "here")
        filled = replace(encoder, supervise=supervise, eos_fill=eos_fill).encode(record, "here")
        assert len(filled) % eos_fill == 0
        assert 0 <= len(filled) - len(bare) < eos_fill
        assert filled.tokens[: len(bare)].tolist() == bare.tokens.tolist()
        assert filled.maskable[: len(bare)].tolist() == bare.maskable.tolist()
        assert (filled.tokens[len(bare) :] == tokenizer.eos_id).all()
        assert filled.maskable[len(bare) :].all()


def test_fields_can_be_renamed_and_the_first_that_is_there_decides(encoder, tokenizer):
    fields = Fields(text="body", messages="turns", prompt="question", response=("answer",))
    renamed = replace(encoder, fields=fields, chat=False)
    assert spelled(tokenizer, renamed.encode({"question": "a", "answer": "b", "text": "no"}, "x"))[0] == "a"
    assert spelled(tokenizer, renamed.encode({"body": "c", "turns": MESSAGES}, "x"))[1] == "c<|endoftext|>"
    assert spelled(tokenizer, renamed.encode({"body": None, "turns": MESSAGES}, "x"))[1] == "5<|im_end|>"


def test_begin_of_text_is_put_in_front_and_never_learnt(tmp_path):
    make_tokenizer(tmp_path / "a", bos_token="<|im_start|>", chat_template=None)
    backend = load_tokenizer(tmp_path / "a")
    inner = backend._inner
    inner.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", backend.bos_id)]
    )
    inner.save_pretrained(str(tmp_path / "b"))
    tokenizer = load_tokenizer(tmp_path / "b")
    assert tokenizer.prefix_ids == (tokenizer.bos_id,)
    assert tokenizer.encode("a") == backend.encode("a")
    for supervise in ("response", "all"):
        document = DocumentEncoder(tokenizer, supervise=supervise).encode({"text": "a"}, "here")
        assert spelled(tokenizer, document) == ("<|im_start|>", "a<|endoftext|>")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"body": "x", "id": None}, r"^here: no field text, messages or prompt; the fields there are: body, id \(null\)$"),
        ({}, "the fields there are: none"),
        ({"prompt": "x"}, "no field response or completion; the fields there are: prompt"),
        ({"text": 3}, "field text holds int, not a text"),
        ({"prompt": "x", "response": ["y"]}, "field response holds list"),
        ({"messages": "hi"}, "field messages is not a list"),
        ({"messages": [["hi"]]}, "field messages is not a list"),
        ({"messages": []}, "^here: 0 messages"),
        ({"text": "\ud800"}, r"^here: a text holds U\+D800"),
    ],
)
def test_bad_records(encoder, record, message):
    with pytest.raises(DataError, match=message):
        encoder.encode(record, "here")


def test_mask_token_in_the_data_is_an_error(tmp_path):
    # Literal spellings stay text, so only a template can bring the id in.
    tokenizer = make_tokenizer(tmp_path, mask_token="<file_sep>")
    template = "{{ '<file_sep>' }}{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer._inner.chat_template = template
    with pytest.raises(DataError, match=r"^here: token 0 is the mask token <file_sep> \(id 4\), which must not be"):
        DocumentEncoder(tokenizer).encode({"messages": MESSAGES}, "here")
    document = DocumentEncoder(tokenizer).encode({"text": "a literal <file_sep>"}, "here")
    assert tokenizer.mask_id not in document.tokens
