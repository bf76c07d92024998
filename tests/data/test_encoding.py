from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from helpers import make_tokenizer, refused, say
from unmask.data.documents import Document
from unmask.data.encoding import DocumentEncoder
from unmask.data.shapes import Fields
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.errors import DataError

MESSAGES = say("2 + 3", "5")


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


def test_fields_can_be_renamed(encoder, tokenizer):
    fields = Fields(text="body", messages="turns", prompt="question", response=("answer",))
    renamed = replace(encoder, fields=fields, chat=False)
    assert spelled(tokenizer, renamed.encode({"question": "a", "answer": "b", "text": "no"}, "x"))[0] == "a"
    assert spelled(tokenizer, renamed.encode({"body": "c", "messages": MESSAGES}, "x"))[1] == "c<|endoftext|>"
    assert spelled(tokenizer, renamed.encode({"body": None, "turns": MESSAGES}, "x"))[1] == "5<|im_end|>"


def test_begin_of_text_is_put_in_front_and_never_learnt(tmp_path):
    make_tokenizer(tmp_path / "a", bos_token="<|im_start|>", chat_template=None)
    backend = load_tokenizer(tmp_path / "a")
    inner = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "a"))
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


def test_template_is_for_conversations_and_tools_even_where_prompts_are_plain(encoder, tokenizer):
    plain = replace(encoder, chat=False)
    laid_out = encoder.encode({"prompt": "2 + 3", "response": "5"}, "here").tokens.tolist()
    answer = [{"role": "assistant", "content": "5"}]
    assert plain.encode({"prompt": "2 + 3", "response": answer}, "here").tokens.tolist() == laid_out
    assert plain.encode({"prompt": "2 + 3", "response": "5", "tools": [{}]}, "here").tokens.tolist() == laid_out
    assert plain.encode({"prompt": "2 + 3", "response": "5", "tools": "[]"}, "here").tokens.tolist() != laid_out


def test_turns_left_out_are_context(encoder, tokenizer):
    talk = say("q", "WRONG", "sure?", "4")
    whole = encoder.encode({"messages": talk}, "here").tokens.tolist()
    talk[1]["weight"] = 0
    document = encoder.encode({"messages": talk}, "here")
    assert document.tokens.tolist() == whole
    assert spelled(tokenizer, document)[1] == "4<|im_end|>"
    with refused(DataError, "here", "message 2", "supervise"):
        replace(encoder, supervise="all").encode({"messages": talk}, "here")


@pytest.mark.parametrize("supervise", ["response", "all"])
@pytest.mark.parametrize("record", [{"text": "the fox"}, {"messages": MESSAGES}, {"prompt": "2 +", "response": " 3"}])
def test_text_that_was_cut_off_has_no_end(encoder, tokenizer, supervise, record):
    cut = replace(encoder, supervise=supervise, eos_fill=32).encode({**record, "ended": False}, "here")
    whole = replace(encoder, supervise=supervise).encode(record, "here")
    assert cut.tokens.tolist() == whole.tokens[: len(cut)].tolist()
    assert not set(cut.tokens[-1:].tolist()) & tokenizer.eos_ids
    assert tokenizer.decode(cut.tokens) == tokenizer.decode(whole.tokens).rstrip()
    if supervise == "response":
        assert cut.maskable.tolist() == whole.maskable[: len(cut)].tolist()


@pytest.mark.parametrize(
    "record",
    [
        {"text": "<|im_start|>user\nTHE QUESTION<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"},
        {"text": "yes<|im_end|>\n"},
        {"text": "the fox<|endoftext|>"},
    ],
)
def test_rendered_text_is_refused_and_read_as_text_where_there_is_no_chat(encoder, tokenizer, record):
    with refused(DataError, "here", "field text", "control token", "chat: false"):
        encoder.encode(record, "here")
    with refused(DataError, "field text"):
        encoder.check(record)
    document = replace(encoder, chat=False).encode(record, "here")
    assert spelled(tokenizer, document) == ("", f"{record['text']}<|endoftext|>")
    inside = {"text": f"A template begins {record['text']} and goes on."}
    assert len(encoder.encode(inside, "here")) > 5


def test_system_message_is_rendered_even_where_prompts_are_plain(encoder, tokenizer):
    record = {"prompt": "2 + 3", "response": "5", "system": "Be short."}
    given = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n2 + 3<|im_end|>\n<|im_start|>assistant\n"
    for each in (encoder, replace(encoder, chat=False)):
        assert spelled(tokenizer, each.encode(record, "here")) == (given, "5<|im_end|>")


@pytest.mark.parametrize("chat", [True, False])
def test_empty_response_is_an_end_alone(encoder, tokenizer, chat):
    document = replace(encoder, chat=chat).encode({"prompt": "2 + 3", "response": ""}, "here")
    assert spelled(tokenizer, document)[1] == ("<|im_end|>" if chat else "<|endoftext|>")
    filled = replace(encoder, chat=chat, eos_fill=64).encode({"prompt": "2 + 3", "response": ""}, "here")
    assert len(filled) == 64
    assert int(filled.maskable.sum()) == 64 - int((~document.maskable).sum())


@pytest.mark.parametrize("chat", [True, False])
def test_end_has_a_place_even_after_a_response_that_ends_at_a_block_edge(encoder, tokenizer, chat):
    plain = replace(encoder, chat=chat).encode({"prompt": "2 + 3", "response": "the fox"}, "here")
    record = {"prompt": "2 + 3", "response": "the fox"}
    exact = replace(encoder, chat=chat, eos_fill=len(plain)).encode(record, "here")
    assert exact.tokens.tolist() == plain.tokens.tolist(), "the end is the last token of a block: nothing to fill"
    one_more = replace(encoder, chat=chat, eos_fill=len(plain) - 1).encode(record, "here")
    assert len(one_more) == 2 * (len(plain) - 1), "the end is the first token of a block: that is filled"
    assert one_more.maskable[len(plain) - 1 :].all()
    assert (one_more.tokens[len(plain) :] == tokenizer.eos_id).all()


def test_end_of_text_spelled_in_an_answer_ends_nothing(encoder, tokenizer):
    for response in ("a<|endoftext|>b", "a<|im_end|>b"):
        document = encoder.encode({"prompt": "<|endoftext|>", "response": response}, "here")
        learnt = document.tokens[document.maskable]
        assert [int(token) in tokenizer.eos_ids for token in learnt] == [False] * (len(learnt) - 1) + [True]
        assert tokenizer.decode(learnt, skip_special=False) == f"{response}<|im_end|>"
        assert not set(document.tokens[~document.maskable]) & {tokenizer.eos_id}


PAIRS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "", "good", "bad"),
    ({"prompt": "q", "chosen": "", "rejected": "bad"}, "", "", "bad"),
    ({"prompt": say("q"), "chosen": say("", "good")[1:], "rejected": say("", "bad")[1:]}, "", "good", "bad"),
    ({"prompt": "q", "chosen": say("q", "good"), "rejected": say("q", "bad")}, "", "good", "bad"),
    ({"chosen": say("q", "good"), "rejected": say("q", "bad")}, "", "good", "bad"),
    ({"chosen": say("p", "x", "q", "good"), "rejected": say("p", "x", "q", "bad")}, "p|x|", "good", "bad"),
    ({"prompt": say("p", "x", "q"), "chosen": "good", "rejected": say("", "bad")[1:]}, "p|x|", "good", "bad"),
]


@pytest.mark.parametrize(("record", "before", "good", "bad"), PAIRS)
def test_preference_gives_two_documents_that_share_all_that_is_given(encoder, tokenizer, record, before, good, bad):
    document = replace(encoder, pairs=True, eos_fill=16).encode(record, "here")
    rejected = document.rejected
    assert rejected is not None
    assert rejected.rejected is None
    given, learnt = spelled(tokenizer, document)
    turns = "".join(
        f"<|im_start|>{role}\n{text}<|im_end|>\n"
        for role, text in zip(("user", "assistant", "user"), [*before.split("|")[:-1], "q"], strict=False)
    )
    assert given == f"{turns}<|im_start|>assistant\n"
    assert learnt.replace("<|endoftext|>", "") == f"{good}<|im_end|>"
    assert spelled(tokenizer, rejected)[0] == given
    assert spelled(tokenizer, rejected)[1].replace("<|endoftext|>", "") == f"{bad}<|im_end|>"
    num_given = int((~document.maskable).sum())
    assert document.tokens[:num_given].tolist() == rejected.tokens[:num_given].tolist()
    assert len(document) % 16 == len(rejected) % 16 == 0


@pytest.mark.parametrize(("record", "before", "good", "bad"), PAIRS)
def test_preference_without_pairs_is_its_chosen_side(encoder, tokenizer, record, before, good, bad):
    document = encoder.encode(record, "here")
    assert document.rejected is None
    assert spelled(tokenizer, document)[1].endswith(f"{good}<|im_end|>")
    is_whole = "prompt" not in record and before
    assert (spelled(tokenizer, document)[1] == f"{good}<|im_end|>") != bool(is_whole), "a whole conversation: every turn"


def test_texts_of_a_preference_are_cut_where_they_part(encoder, tokenizer):
    pairs = replace(encoder, pairs=True)
    document = pairs.encode({"chosen": "Human: hi\n\nAssistant: yes", "rejected": "Human: hi\n\nAssistant: yellow"}, "here")
    assert document.rejected is not None
    assert spelled(tokenizer, document) == ("Human: hi\n\nAssistant:", " yes<|endoftext|>")
    assert spelled(tokenizer, document.rejected) == ("Human: hi\n\nAssistant:", " yellow<|endoftext|>")
    whole = pairs.encode({"chosen": "yes", "rejected": "yellow"}, "here")
    assert spelled(tokenizer, whole) == ("", "yes<|endoftext|>")
    assert spelled(tokenizer, encoder.encode({"chosen": "a b", "rejected": "a c"}, "here")) == ("", "a b<|endoftext|>")


@pytest.mark.parametrize(
    ("record", "names"),
    [
        (
            {"body": "x", "id": None},
            ("here", "text", "messages", "conversations", "chosen", "prompt", "body", "id"),
        ),
        ({}, ("fields", "none")),
        ({"prompt": "x"}, ("response", "completion", "prompt")),
        ({"text": 3}, ("field text", "int")),
        ({"prompt": "x", "response": ["y"]}, ("here", "field response")),
        ({"prompt": "x", "response": 3}, ("here", "field response")),
        ({"messages": "hi"}, ("field messages", "list")),
        ({"messages": [["hi"]]}, ("field messages", "list")),
        ({"messages": []}, ("here", "field messages", 0)),
        ({"text": "\ud800"}, ("here", "field text", "U+D800")),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            ("here", "field messages", "chat template"),
        ),
    ],
)
def test_bad_records(encoder, record, names):
    with refused(DataError, *names):
        encoder.encode(record, "here")


def test_mask_token_in_the_data_is_an_error(tmp_path):
    # Literal spellings stay text, so only a template can bring the id in.
    template = "{{ '<file_sep>' }}{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer = make_tokenizer(tmp_path, mask_token="<file_sep>", chat_template=template)
    with refused(DataError, "here", "field messages", "<file_sep>", 4):
        DocumentEncoder(tokenizer).encode({"messages": MESSAGES}, "here")
    document = DocumentEncoder(tokenizer).encode({"text": "a literal <file_sep>"}, "here")
    assert tokenizer.mask_id not in document.tokens
