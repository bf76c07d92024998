"""What tests of several layers need: a tokenizer of a few hundred tokens with a ChatML template, and `refused`."""

from __future__ import annotations

import errno
import io
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.engine.sampling_params import Option, SamplingParams
from unmask.errors import UnmaskError
from unmask.models.weights.room import Memory

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")
CORPUS = (
    "The quick brown fox jumps over the lazy dog. State the final answer to the following arithmetic problem: 12 + 34 =",
    "user assistant system Hello, how are you? I am fine, thank you. What is 2 + 3? The answer is 5.\n\n",
)


def limit_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let the machine have so much free memory."""
    # First those that import the function from another, so that none is imported with a limit that outlives the test.
    for module in ("engine.engine", "engine.room", "models.weights.room"):
        monkeypatch.setattr(f"unmask.{module}.available_memory", lambda device: Memory(num_bytes, "free memory"))


def make_tokenizer(
    folder: Path,
    *,
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS,
    chat_template: str | None = CHATML,
    eos_token: str | None = "<|endoftext|>",
    bos_token: str | None = None,
    mask_token: str | None = None,
    plain_added: tuple[str, ...] = (),
    vocab_size: int = 400,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer in the manner of SmolLM2's, save it to a folder and load it from there.

    Args:
        folder: where its files go; made if it is not there.
        special_tokens: control tokens, with ids from 0.
        chat_template: Jinja source, or None for a tokenizer without one.
        eos_token, bos_token, mask_token: spellings, which must be special tokens.
        plain_added: added tokens that are not control tokens.
        vocab_size: at most so many tokens.

    Returns:
        The tokenizer.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain_added])
    names = {"eos_token": eos_token, "bos_token": bos_token, "mask_token": mask_token}
    inner = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in names.items() if token is not None}
    )
    inner.chat_template = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    inner.save_pretrained(str(folder))
    return load_tokenizer(folder)


def make_sentencepiece_tokenizer(
    folder: Path, padding: str, *, chat_template: str | None = CHATML, control: tuple[AddedToken, ...] = ()
) -> Tokenizer:
    """A tokenizer in the manner of SentencePiece's, with byte fallback: pieces begin with their space.

    Args:
        folder: where its files go; made if it is not there.
        padding: what puts a space before a text: "first", "always" and "never" are a Metaspace's prepend_scheme, "prepend" is
            the normalizer of Llama 2.
        chat_template: Jinja source, or None.
        control: control tokens beside `<unk>`, `<s>` and those of ChatML.
    """
    spelled = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if padding == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=padding, split=False)
    backend.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=420, special_tokens=spelled, show_progress=False))
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # Bytes are pieces that no text spells.
    backend = Backend.from_str(json.dumps(state))
    strip = [] if padding == "never" else [decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL_TOKENS[1:3]])
    backend.add_special_tokens(list(control))
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    inner.chat_template = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    inner.save_pretrained(str(folder))
    return load_tokenizer(folder)


def say(*contents: str) -> list[dict[str, Any]]:
    """A conversation: user and assistant in turn."""
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


def flagged_texts(tokenizer: Tokenizer, ids: Iterable[int], flags: Iterable[bool]) -> list[str]:
    """The text of each stretch of flagged tokens."""
    stretches = groupby(zip(ids, flags, strict=True), key=lambda token: token[1])
    return [tokenizer.decode([id_ for id_, _ in stretch], skip_special=False) for flag, stretch in stretches if flag]


def learnt(tokenizer: Tokenizer, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    """The texts of a conversation that training learns."""
    return flagged_texts(tokenizer, *tokenizer.chat_document(messages, **options))


class TtyStream(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def disk_full(*_: object, **__: object) -> None:
    """Stands in for a function that writes."""
    raise OSError(errno.ENOSPC, "No space left on device")


def soon(condition: Callable[[], object], what: str = "it did not happen") -> None:
    """Wait until it holds, half a minute at most."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def params_of_calls(monkeypatch: pytest.MonkeyPatch, method: str) -> list[SamplingParams]:
    """The decoding options of the calls of a method of LanguageModel from now on, each of which fails."""
    seen: list[SamplingParams] = []

    def record(self: object, prompt: object, params: SamplingParams, **_: object) -> None:
        seen.append(params)
        raise UnmaskError("enough")

    monkeypatch.setattr(f"unmask.engine.llm.LanguageModel.{method}", record)
    return seen


def example_of(option: Option) -> tuple[str, object]:
    """A valid value of an option that is not its default, as text and read."""
    small = option.maximum is not None and option.maximum < 3
    text = "yes" if option.kind is bool else "1" if small else option.choices[-1] if option.choices else "3"
    return text, (option.items(text),) if option.kind is tuple else text if option.kind is Mapping else option.parse(text)


@contextmanager
def refused(error: type[UnmaskError], *names: object) -> Iterator[None]:
    """A block that must raise `error`, in one line that names these fields and values as whole words.

    The wording is not compared: `test_errors.py` does that, once for every class.
    """
    with pytest.raises(error) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert_names(str(caught.value), *names)


def assert_names(message: str, *names: object) -> None:
    """These fields and values stand in the message as whole words."""
    for name in names:
        assert re.search(rf"(?<!\w){re.escape(str(name))}(?!\w)", message), f"{name!r} is not named: {message}"
