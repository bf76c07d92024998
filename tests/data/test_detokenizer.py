"""Text while it grows: joined it is the completion's, whatever the ids, however they are cut, and it is shown in time."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from helpers import make_tokenizer
from unmask.data.detokenizer import IncrementalDetokenizer, find_stop, held_back
from unmask.data.tokenizer import Tokenizer, load_tokenizer

PIECES = ("▁", "▁▁", "a", "b", "▁a", "▁the", "ab", ".", "é", "</s", ">")
END = 1


def _sentencepiece(folder: Path, decoder: decoders.Decoder) -> Tokenizer:
    """Pieces and bytes in Llama 2's manner: control tokens, bytes, pieces."""
    spelled = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    backend = Backend(
        models.Unigram([(piece, -1.0 - i / 1000) for i, piece in enumerate(spelled)], unk_id=0, byte_fallback=True)
    )
    backend.decoder = decoder
    backend.normalizer = normalizers.Replace(" ", "▁")
    inner = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    folder.mkdir(parents=True)
    inner.save_pretrained(str(folder))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    strip = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    metaspace = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return {
        "bytes": make_tokenizer(folder / "bytes"),
        "strip": _sentencepiece(folder / "strip", strip),
        "metaspace": _sentencepiece(folder / "metaspace", metaspace),
    }


KINDS = ("bytes", "strip", "metaspace")
EURO = tuple(byte + 2 for byte in "€".encode())
STOPS = st.lists(st.text(st.sampled_from("ab .é>\ufffd€\n"), min_size=1, max_size=4), max_size=3)
# Bytes of characters, whole and broken, among all other tokens; the sentence pieces have their bytes from 2 on.
IDS = st.lists(
    st.integers(0, 268) | st.sampled_from([*EURO, *(byte + 2 for byte in "é🎉\n".encode()), *range(258, 269), 0xFF + 2]),
    max_size=24,
)


def _shown(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int], stops: Sequence[str]) -> tuple[list[str], str]:
    """Pieces shown and the completion's text, the ids handed out as the engine does: in parts, and cut at a stop string."""
    stream, pieces, taken = IncrementalDetokenizer(tokenizer, stops), [], 0
    for cut in [*sorted(cut for cut in cuts if cut < len(ids)), len(ids)]:
        found = find_stop(tokenizer.decode, ids[:cut], taken, stops) if stops else None
        if found is not None or cut == len(ids):
            count, text = found[:2] if found is not None else (cut, tokenizer.decode(ids[:cut]) if stops else None)
            return [*pieces, stream.finish(ids[:count], text)], tokenizer.decode(ids[:count]) if text is None else text
        pieces.append(stream.push(ids[taken:cut]))
        taken = cut
    raise AssertionError("the last cut is the end")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(ids=IDS, cuts=st.lists(st.integers(0, 24)) | st.just(range(24)), stops=STOPS)
@example(ids=[*EURO, 0xFF + 2, 260], cuts=range(9), stops=[])  # A byte that spoils the character in front of it.
@example(ids=[12, 0xFF + 2, 260], cuts=range(9), stops=[])
@example(ids=[258, 262, 258, 258, 262], cuts=range(9), stops=[])  # Spaces in front, and in between.
@example(ids=[262, 259, 260], cuts=[1], stops=["a  a"])
@example(ids=[END, END, 262], cuts=range(3), stops=[])
@example(ids=[*EURO[:2], 260, *EURO], cuts=range(9), stops=["€"])
def test_what_is_shown_is_the_completions_text(
    tokenizers: dict[str, Tokenizer], kind: str, ids: list[int], cuts: Sequence[int], stops: list[str]
) -> None:
    pieces, text = _shown(tokenizers[kind], ids, cuts, stops)
    assert "".join(pieces) == text
    # Nothing of a stop string was shown that then came: all that was shown is part of what came before it.
    assert not any(stop in text for stop in stops)
    assert text.startswith("".join(pieces[:-1]))


@pytest.mark.parametrize("kind", KINDS)
@given(parts=st.lists(st.sampled_from(["</s>", "<unk>", "a", " ", "</s", ">"]), max_size=6))
def test_text_never_becomes_a_control_token(tokenizers: dict[str, Tokenizer], kind: str, parts: list[str]) -> None:
    """Not even where the vocabulary has the control token's spelling among its pieces."""
    tokenizer, text = tokenizers[kind], f"b{''.join(parts)}"
    ids = tokenizer.encode(text)
    assert not set(ids) & tokenizer.eos_ids
    if kind == "bytes" or "<unk>" not in parts:
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
@given(ids=IDS, cuts=st.lists(st.integers(0, 24)))
def test_the_cut_does_not_matter(tokenizers: dict[str, Tokenizer], kind: str, ids: list[int], cuts: list[int]) -> None:
    """A slow reader, whose updates are merged, sees the same as a fast one."""
    fast, slow = IncrementalDetokenizer(tokenizers[kind]), IncrementalDetokenizer(tokenizers[kind])
    one_by_one = "".join(fast.push([token]) for token in ids)
    places = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    assert "".join(slow.push(ids[start:stop]) for start, stop in itertools.pairwise(places)) == one_by_one


@given(text=st.text(st.sampled_from("ab c.é中🎉\n"), max_size=12), stops=STOPS)
def test_text_is_shown_as_soon_as_it_is_final(tokenizers: dict[str, Tokenizer], text: str, stops: list[str]) -> None:
    """Byte-level: whole characters at once, but for what a stop string may begin with."""
    tokenizer = tokenizers["bytes"]
    ids, stream, shown = tokenizer.encode(text), IncrementalDetokenizer(tokenizer, stops), ""
    for count, token in enumerate(ids, 1):
        shown += stream.push([token])
        known = tokenizer.decode(ids[:count])
        if any(stop in known for stop in stops):
            return
        whole = known.rstrip("\ufffd")
        assert shown == whole[: len(whole) - held_back(whole, stops)]


def test_half_a_character_holds_back_only_itself(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytes"]
    before, party = tokenizer.encode("The answer"), tokenizer.encode("🎉")
    assert len(party) == 4
    stream = IncrementalDetokenizer(tokenizer)
    assert stream.push([*before, *party[:3]]) == "The answer"
    assert stream.push(party[3:]) == "🎉"


def test_bytes_in_a_row_are_shown_once_none_can_spoil_them(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("strip", "metaspace"):
        stream = IncrementalDetokenizer(tokenizers[kind])
        assert stream.push([261, *EURO]) == "b"
        assert stream.push([260]) == "€a"


@given(text=st.text("ab<", max_size=8), marks=st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3))
@example(text="aab", marks=["abc", "b"])
@example(text="ab", marks=["ab"])
def test_held_back(text: str, marks: list[str]) -> None:
    ends = [size for size in range(len(text) + 1) if size == 0 or any(mark.startswith(text[-size:]) for mark in marks)]
    assert held_back(text, marks) == max(ends)


@pytest.mark.parametrize(
    ("text", "marks", "size"),
    [
        ("", ["a"], 0),
        ("a", [], 0),
        ("xa", ["ab"], 1),
        ("xab", ["ab"], 2),
        ("xabc", ["ab"], 0),
        ("<|im", ["<|im_end|>", "<|"], 4),
    ],
)
def test_held_back_by_hand(text: str, marks: list[str], size: int) -> None:
    assert held_back(text, marks) == size
