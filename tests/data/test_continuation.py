"""Text in its context: SentencePiece's space before a text is put there and dropped there, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer

from helpers import CHATML, SPECIAL_TOKENS, make_sentencepiece_tokenizer, make_tokenizer, say
from unmask.data.detokenizer import IncrementalDetokenizer, find_stop
from unmask.data.encoding import DocumentEncoder
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.models.weights.hub import resolve

PADDINGS = ("first", "always", "prepend", "never")
KINDS = ("bytes", *PADDINGS)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TAGS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TAG_TOKENS = tuple(AddedToken(f"<|{role}|>", normalized=False) for role in ("user", "assistant"))
TALK = say("Hello, how are you?", "I am fine.", "What is 2 + 3?", "The answer is 5 é.")
TEXTS = st.text(st.sampled_from("ab lT.\né漢"), max_size=8)
BEGINNINGS = TEXTS.filter(lambda text: text and text[0] != " ")  # A Metaspace drops a space at the start of a text.


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    spaced = {padding: make_sentencepiece_tokenizer(folder / padding, padding) for padding in PADDINGS}
    return {"bytes": make_tokenizer(folder / "bytes"), **spaced}


@pytest.mark.parametrize("kind", KINDS)
@given(before=BEGINNINGS, text=TEXTS)
def test_what_continues_a_text_reads_as_that_text(tokenizers: dict[str, Tokenizer], kind: str, before: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode(before)
    ids = tokenizer.encode(text, after=prompt)
    assert tokenizer.decode([*prompt, *ids]) == before + text
    assert tokenizer.decode(ids, after=prompt) == text


@pytest.mark.parametrize("kind", KINDS)
@given(before=BEGINNINGS, data=st.data())
def test_prompt_and_completion_make_up_the_whole(
    tokenizers: dict[str, Tokenizer], kind: str, before: str, data: st.DataObject
) -> None:
    """Whatever ids a model writes, whole characters or not, at once or one by one."""
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode(before)
    ids = data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), max_size=6))
    text = tokenizer.decode(ids, after=prompt)
    stream = IncrementalDetokenizer(tokenizer, after=prompt)
    assert "".join(stream.push([token]) for token in ids) + stream.finish(ids) == text
    if "\ufffd" not in text:
        assert before + text == tokenizer.decode([*prompt, *ids])


@pytest.mark.parametrize("kind", ["first", "always", "prepend"])
def test_first_token_keeps_its_space_behind_a_prompt_only(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    prompt = tokenizer.encode("What")
    ids = tokenizer.encode(" the", after=prompt)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, after=[]) == "the"
    assert tokenizer.decode(ids, after=prompt) == " the"
    assert find_stop(lambda ids: tokenizer.decode(ids, after=prompt), ids * 2, 0, [" the the"]) == (
        2 * len(ids),
        "",
        " the the",
    )


@pytest.mark.parametrize("kind", ["bytes", "first", "prepend"])
def test_character_that_prompt_and_completion_share_is_the_completions(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("a 漢字")
    start = next(count for count in range(len(ids)) if tokenizer.decode(ids[:count]).endswith("\ufffd"))
    stream = IncrementalDetokenizer(tokenizer, after=ids[:start])
    assert "".join(stream.push([token]) for token in ids[start:]) + stream.finish(ids[start:]) == "漢字"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("template", [CHATML, LLAMA_2, TAGS])
def test_conversation_to_learn_is_what_the_template_encodes_to(tmp_path: Path, padding: str, template: str) -> None:
    tokenizer = make_sentencepiece_tokenizer(tmp_path, padding, chat_template=template, control=TAG_TOKENS)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    whole = reference.apply_chat_template(TALK, tokenize=True)["input_ids"]
    ids, flags = tokenizer.chat_document(TALK)
    assert ids == whole[: len(ids)]
    starts = [index for index, flag in enumerate(flags) if flag and not flags[index - 1]]
    assert [ids[:start] for start in starts] == [tokenizer.chat(TALK[:count], add_generation_prompt=True) for count in (1, 3)]
    assert tokenizer.chat(TALK, add_generation_prompt=False) == whole
    assert tokenizer.render(TALK, add_generation_prompt=True) == reference.apply_chat_template(
        TALK, tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize("padding", PADDINGS)
def test_spelled_control_tokens_change_nothing_around_them(tmp_path: Path, padding: str) -> None:
    tokenizer = make_sentencepiece_tokenizer(tmp_path, padding)
    plain, spelled = (tokenizer.chat(say("a", "b", text), add_generation_prompt=True) for text in ("The fox", "The fox<s>"))
    shared = plain[: len(plain) - len(tokenizer.encode("x\nassistant\n")) - 3]
    assert spelled[: len(shared)] == shared
    assert spelled.count(tokenizer.special_tokens["<s>"]) == 0


def test_spelled_control_tokens_may_be_many(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, special_tokens=(*SPECIAL_TOKENS, "ow"))
    assert tokenizer.special_tokens["ow"] in tokenizer._continuation._plain.encode("ow").ids, "the vocabulary has that piece"
    ids = tokenizer.encode("ow" * 3000)
    assert tokenizer.special_tokens["ow"] not in ids
    assert tokenizer.decode(ids) == "ow" * 3000


def test_a_control_token_of_one_character_is_spelled_as_before(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, special_tokens=(*SPECIAL_TOKENS, "!"))
    assert tokenizer.decode(tokenizer.encode("ab!c")) in ("ab!c", "abc")


@pytest.mark.parametrize("padding", ["first", "always"])
def test_white_space_beside_tokens_that_swallow_it(tmp_path: Path, padding: str) -> None:
    """As Phi-3's, whose control tokens swallow the newline behind them."""
    swallowing = (
        AddedToken("<|user|>", normalized=False, rstrip=True),
        AddedToken("<|assistant|>", normalized=False, rstrip=True),
        AddedToken("<|end|>", normalized=False, lstrip=True),
    )
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + ' <|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    tokenizer = make_sentencepiece_tokenizer(tmp_path, padding, chat_template=template, control=swallowing)
    whole = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(TALK, tokenize=True)["input_ids"]
    ids, flags = tokenizer.chat_document(TALK)
    assert ids == whole[: len(ids)]
    assert ids[: flags.index(True)] == tokenizer.chat(TALK[:1], add_generation_prompt=True)
    literal = tokenizer.chat([*TALK[:3], *say("", "the<s>")[1:]], add_generation_prompt=False)
    assert literal[: len(ids) - 20] == whole[: len(ids) - 20]


@pytest.mark.parametrize("padding", PADDINGS)
def test_prompt_and_response_without_a_template_are_one_text(tmp_path: Path, padding: str) -> None:
    tokenizer = make_sentencepiece_tokenizer(tmp_path, padding, chat_template=None)
    document = DocumentEncoder(tokenizer).encode({"prompt": "2 + 3 =", "response": " 5 fine"}, "here")
    assert document.tokens.tolist() == [*tokenizer.encode("2 + 3 = 5 fine"), tokenizer.eos_id]


def test_documents_of_the_embedded_model_stay_as_they_are() -> None:
    """Byte-level tokenizers put no space anywhere: every span is encoded as it would be alone."""
    tokenizer = load_tokenizer(resolve("smollm2-135m-diffusion"))
    contents = ("Hello,  how<|im_end|> are you?", "\n\n  I am 42.\n", " x", "'s fine é🎉")
    ids, flags = tokenizer.chat_document(say(*contents))
    texts = ["system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"]
    for role, text in zip(("user", "assistant") * 2, contents, strict=True):
        texts += [f"{role}\n", text] if role == "assistant" else [f"{role}\n{text}"]
    start, end = (tokenizer.special_tokens[name] for name in ("<|im_start|>", "<|im_end|>"))
    expected: list[int] = []
    for index, text in enumerate(texts):
        is_answer = text in (contents[1], contents[3])
        expected += ([] if is_answer else [start]) + tokenizer.encode(text)
        if not text.endswith("assistant\n") or is_answer:
            expected += [end] + (tokenizer.encode("\n") if index + 1 < len(texts) else [])
    assert ids == expected
    assert sum(flags) == sum(len(tokenizer.encode(text)) + 1 for text in (contents[1], contents[3]))
