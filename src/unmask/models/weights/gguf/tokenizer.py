"""Tokenizers in GGUF metadata, both ways: byte-level BPE as GPT-2's, and SentencePiece's BPE as Llama 2's.

Owns llama.cpp's token types and its names for how text is split before merging. Knows no weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from unmask.errors import CheckpointError
from unmask.models.weights.gguf.metadata import Metadata

# gguf.constants.TokenType. Plain text never becomes a control token, and an unused one is no token at all.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_PREFIX = "tokenizer.ggml."
_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# How llama.cpp splits text before merging, by its name for it: a pattern, single digits, or GPT-2's own pattern.
_PATTERNS: Mapping[str, str | None] = {
    "gpt-2": None,
    "smollm": "digits",
    "llama-bpe": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}",
}
_ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token is not merged from its parts
_COMPOSED = ("qwen2",)  # text is normalised to NFC


def read_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer of a file.

    Raises:
        CheckpointError: of another kind, or it splits text in a way that is not known here.
    """
    kind = metadata[_PREFIX + "model"]
    tokens, kinds = metadata[_PREFIX + "tokens"], metadata[_PREFIX + "token_type"]
    if kind not in ("gpt2", "llama"):
        raise metadata.error(
            f"has {_PREFIX}model {kind!r}; only 'gpt2' (byte-level BPE) and 'llama' (SentencePiece) can be read"
        )
    if len(tokens) != len(kinds):
        raise metadata.error(f"has {len(tokens)} {_PREFIX}tokens and {len(kinds)} {_PREFIX}token_type; get it again")
    try:
        tokenizer = _byte_level(metadata, tokens, kinds) if kind == "gpt2" else _sentencepiece(metadata, tokens, kinds)
        # SentencePiece's unknown token is a control token, as in the files that transformers' converter makes.
        special = [token for token, of in zip(tokens, kinds, strict=True) if of in (_CONTROL, _UNKNOWN)]
        added = [token for token, of in zip(tokens, kinds, strict=True) if of == _USER_DEFINED]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
        _begin_with_bos(tokenizer, metadata, default=kind == "llama" or _split_name(metadata) in _WHOLE_WORDS_FIRST)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain ones, of merges that are none or of what are no tokens
        reason = " ".join(str(error).split())
        raise metadata.error(
            f"has {_PREFIX}tokens, merges or scores that do not fit together ({reason}); get it again"
        ) from error
    return tokenizer


def read_tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """Content of tokenizer_config.json: named tokens and the chat template."""
    tokens = metadata[_PREFIX + "tokens"]
    ids = {name: metadata.values.get(f"{_PREFIX}{key}_token_id") for name, key in _NAMED.items()}
    template = metadata.values.get("tokenizer.chat_template")
    return {
        **{name: tokens[id_] for name, id_ in ids.items() if id_ is not None and id_ < len(tokens)},
        "add_prefix_space": False,
        **({} if template is None else {"chat_template": template}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.integer(f"{metadata.architecture()}.context_length"),
        # The generic class takes tokenizer.json as it is; GPT2's own would replace the digit splitting.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def read_token_ids(metadata: Metadata) -> dict[str, Any]:
    """The token ids of config.json: those of the named tokens, and of the one that ends a turn, if the file names it."""
    ends = [metadata.values.get(f"{_PREFIX}{key}_token_id") for key in ("eos", "eot")]
    known = list(dict.fromkeys(id_ for id_ in ends if id_ is not None))
    return {
        "bos_token_id": metadata.values.get(_PREFIX + "bos_token_id"),
        "eos_token_id": known[0] if len(known) == 1 else known or None,
        "pad_token_id": metadata.values.get(_PREFIX + "padding_token_id"),
    }


def tokenizer_metadata(
    tokenizer: Tokenizer, named: Mapping[str, str], eos_ids: Sequence[int], template: str | None, num_rows: int
) -> dict[str, Any]:
    """The metadata of a tokenizer.

    Args:
        tokenizer: of tokenizer.json.
        named: spellings by role (`eos_token`, ...).
        eos_ids: every id that ends an answer.
        template: Jinja source of the chat template.
        num_rows: of the embedding; llama.cpp wants a token for each.

    Raises:
        CheckpointError: llama.cpp has no name for how it splits text, or its model is no BPE.
    """
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"the tokenizer is of kind {model['type']}; llama.cpp's files are written of BPE only")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens, kinds = [f"[PAD{id_}]" for id_ in range(num_rows)], [_UNUSED] * num_rows
    if max(vocabulary.values(), default=0) >= num_rows:
        raise CheckpointError(
            f"the tokenizer has the token {max(vocabulary.values())}, the model {num_rows} rows; use the model's own"
        )
    for token, id_ in vocabulary.items():
        tokens[id_], kinds[id_] = token, _NORMAL
    for id_, added in tokenizer.get_added_tokens_decoder().items():
        kinds[id_] = _CONTROL if added.special else _USER_DEFINED
    is_sentencepiece = bool(model.get("byte_fallback"))
    own = {"tokens": tokens, "token_type": kinds}
    own |= _sentencepiece_keys(state, tokens, kinds) if is_sentencepiece else _byte_level_keys(state)
    ids = {key: vocabulary.get(named.get(role, "")) for role, key in _NAMED.items()}
    ids["eos"] = eos_ids[0] if ids["eos"] is None and eos_ids else ids["eos"]
    ids["eot"] = next((id_ for id_ in eos_ids if id_ != ids["eos"]), None)
    own |= {f"{key}_token_id": id_ for key, id_ in ids.items() if id_ is not None}
    own["add_bos_token"] = ids["bos"] is not None and tokenizer.encode("").ids[:1] == [ids["bos"]]
    return {_PREFIX + key: value for key, value in own.items()} | (
        {} if template is None else {"tokenizer.chat_template": template}
    )


def _byte_level(metadata: Metadata, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    split = _split_name(metadata)
    if split not in _PATTERNS:
        raise metadata.error(f"has {_PREFIX}pre {split!r}; text is split as by {', '.join((*_PATTERNS, *_ALIASES))} only")
    merges = [tuple(merge.split(" ")) for merge in metadata[_PREFIX + "merges"]]
    whole = split in _WHOLE_WORDS_FIRST
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(tokens, kinds), merges=merges, ignore_merges=whole))
    pattern = _PATTERNS[split]
    parts: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))]
    if pattern == "digits":
        parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif pattern is not None:
        parts.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    if split in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _split_name(metadata: Metadata) -> str:
    name = str(metadata.values.get(_PREFIX + "pre", "default"))
    return _ALIASES.get(name, name)


def _byte_level_keys(state: Mapping[str, Any]) -> dict[str, Any]:
    found = list(_splits(state["pre_tokenizer"]))
    for name, pattern in _PATTERNS.items():
        byte_level = ("ByteLevel", False, pattern in (None, "digits"))
        before = (
            [] if pattern is None else [("Digits", True)] if pattern == "digits" else [("Split", pattern, "Isolated", False)]
        )
        if found == [*before, byte_level]:
            return {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in _merges(state)]}
    raise CheckpointError(f"the tokenizer splits text as llama.cpp has no name for: {found}; known are {', '.join(_PATTERNS)}")


def _splits(part: Mapping[str, Any] | None) -> Iterator[tuple[Any, ...]]:
    """What decides where a pre-tokenizer of tokenizer.json splits."""
    if part is None:
        return
    kind = part["type"]
    if kind == "Sequence":
        for each in part["pretokenizers"]:
            yield from _splits(each)
    elif kind == "Split":
        yield kind, next(iter(part["pattern"].values())), part["behavior"], part["invert"]
    elif kind == "ByteLevel":
        yield kind, part["add_prefix_space"], part["use_regex"]
    else:
        yield kind, part.get("individual_digits")


def _sentencepiece(metadata: Metadata, tokens: Sequence[str], kinds: Sequence[int]) -> Tokenizer:
    """SentencePiece merges whatever neighbours make the piece of the best score: a pair of BPE for each way to make a piece."""
    vocabulary = _vocabulary(tokens, kinds)
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, of, score in zip(tokens, kinds, metadata[_PREFIX + "scores"], strict=True):
        pairs = ((token[:end], token[end:]) for end in range(1, len(token))) if of in (_NORMAL, _USER_DEFINED) else ()
        ranked += [(score, len(a), len(b), a, b) for a, b in pairs if a in vocabulary and b in vocabulary]
    ranked.sort(key=lambda each: each[:3], reverse=True)
    unknown = next((token for token, of in zip(tokens, kinds, strict=True) if of == _UNKNOWN), None)
    merges = [(first, second) for *_, first, second in ranked]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    decoder: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.values.get(_PREFIX + "add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        decoder.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Sequence(decoder)
    return tokenizer


def _sentencepiece_keys(state: Mapping[str, Any], tokens: Sequence[str], kinds: list[int]) -> dict[str, Any]:
    model = state["model"]
    ranks = {first + second: rank for rank, (first, second) in reversed(list(enumerate(_merges(state))))}
    # Pieces that no merge makes are never made: below all others, by id.
    scores = [-float(ranks.get(token, len(ranks) + id_)) for id_, token in enumerate(tokens)]
    for id_, token in enumerate(tokens):
        if token == model.get("unk_token"):
            kinds[id_] = _UNKNOWN
        elif kinds[id_] == _NORMAL and len(token) == 6 and token.startswith("<0x"):
            kinds[id_] = _BYTE
    prefix = any("▁" in json.dumps(part, ensure_ascii=False) for part in _prefixes(state))
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}


def _prefixes(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The parts of a tokenizer.json that put a space before a text."""
    for part in (state["normalizer"], state["pre_tokenizer"]):
        parts = [] if part is None else part.get("normalizers") or part.get("pretokenizers") or [part]
        yield from (each for each in parts if each["type"] == "Prepend" or each.get("prepend_scheme", "never") != "never")


def _merges(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in state["model"]["merges"])
    return [(first, second) for first, second in pairs]


def _vocabulary(tokens: Sequence[str], kinds: Sequence[int]) -> dict[str, int]:
    return {token: id_ for id_, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}


def _begin_with_bos(tokenizer: Tokenizer, metadata: Metadata, *, default: bool) -> None:
    bos_id = metadata.values.get(_PREFIX + "bos_token_id")
    if bos_id is None or not metadata.values.get(_PREFIX + "add_bos_token", default):
        return
    bos = metadata[_PREFIX + "tokens"][bos_id]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
    )
