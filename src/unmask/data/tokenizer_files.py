"""Tokenizer files of a Hugging Face folder: tokenizer.json, what the files beside it add to it, and writing them.

Owns which file decides what: named and added tokens, chat templates. Knows no ids of texts. transformers is imported only for a
folder without tokenizer.json, where it is installed.

Source: what `transformers` 5 reads for its generic class. Departs: tokenizer.json is taken as it is whatever class the config
names; transformers rebuilds parts of it for some classes (it drops the splitting of digits of a `GPT2Tokenizer`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from unmask.data.chat_template import DEFAULT
from unmask.errors import CheckpointError
from unmask.files import read_json

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
_TEMPLATE, _TEMPLATES = "chat_template.jinja", "chat_templates"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a class of transformers takes for a token that the files do not name.
_ROLES_OF_CLASS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
# The class that other programs load tokenizer.json with as it is, in transformers 4 and 5.
_GENERIC_CLASS = "PreTrainedTokenizerFast"


@dataclass
class TokenizerFiles:
    """A tokenizer as its folder describes it.

    Attributes:
        backend: of tokenizer.json, with the tokens that the other files add.
        config: tokenizer_config.json as it is.
        named: spellings of the named tokens by their role, such as `eos_token`.
        templates: Jinja sources by name; that of a single chat template is `default`.
    """

    backend: Tokenizer
    config: dict[str, Any]
    named: dict[str, str]
    templates: dict[str, str]

    def id_of(self, role: str) -> int | None:
        """Id of a named token; None: there is none."""
        return self.backend.token_to_id(self.named[role]) if role in self.named else None


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer of a folder; nothing is fetched.

    Raises:
        CheckpointError: there is none, or a file is damaged.
    """
    if not (folder / TOKENIZER).is_file():
        return _converted(folder)
    config = _optional(folder / CONFIG)
    named_in, added = config, config.get("added_tokens_decoder")
    if added is None:
        named_in = config | _optional(folder / "special_tokens_map.json")
        spelled = _optional(folder / "added_tokens.json")
        added = {id_: {"content": content, "normalized": False} for content, id_ in spelled.items()}
    try:
        backend = Tokenizer.from_file(str(folder / TOKENIZER))
        named = _named_tokens(named_in, backend)
        _add_tokens(backend, added, named_in, named)
        return TokenizerFiles(backend, config, named, _templates(folder, config))
    except Exception as error:  # the library raises plain ones
        raise _unreadable(folder, error) from error


def write_tokenizer(files: TokenizerFiles, folder: Path) -> None:
    """Write a tokenizer's files into a folder, for us and for transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**files.config, **files.named, "tokenizer_class": _GENERIC_CLASS}
    config.pop("chat_template", None)
    if set(files.templates) == {DEFAULT}:
        (folder / _TEMPLATE).write_text(files.templates[DEFAULT], encoding="utf-8", newline="")
    else:
        (folder / _TEMPLATE).unlink(missing_ok=True)  # an earlier tokenizer's, which would be read first
        if files.templates:
            config["chat_template"] = [{"name": name, "template": text} for name, text in files.templates.items()]
    content = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(content, encoding="utf-8")
    files.backend.save(str(folder / TOKENIZER))


def _named_tokens(config: Mapping[str, Any], backend: Tokenizer) -> dict[str, str]:
    """The named tokens of the config; else, where the vocabulary holds them, those of its class and of the padding."""
    extra = config.get("extra_special_tokens")
    own = {key: value for key, value in config.items() if key in _ROLES or (key.endswith("_token") and _is_token(value))}
    own |= extra if isinstance(extra, dict) else {}
    usual = dict(_ROLES_OF_CLASS.get(str(config.get("tokenizer_class")).removesuffix("Fast"), {}))
    if backend.padding is not None:
        usual["pad_token"] = backend.padding["pad_token"]
    known = {role: text for role, text in usual.items() if role not in own and backend.token_to_id(text) is not None}
    return known | {role: _spelling(token) for role, token in own.items() if token is not None}


def _add_tokens(backend: Tokenizer, added: Mapping[str, Any], config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add what tokenizer.json lacks: tokens of the other files by rising id, then named and extra tokens as control tokens."""
    known = backend.get_added_tokens_decoder().values()
    written = {repr(token) for token in known}
    by_id = (_added_token(token) for _, token in sorted((int(id_), token) for id_, token in added.items()))
    tokens = [token for token in by_id if repr(token) not in written]
    spelled = {token.content for token in (*known, *tokens)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    for value in (*(config.get(role) or text for role, text in named.items()), *(extra if isinstance(extra, list) else ())):
        if _spelling(value) not in spelled:
            tokens.append(_added_token(value, special=True))
            spelled.add(tokens[-1].content)
    for token in tokens:
        token.special = token.special or token.content in named.values()
    backend.add_tokens(tokens)


def _is_token(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "content" in value)


def _spelling(token: Any) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no token")
    return text


def _added_token(token: Any, **fields: bool) -> AddedToken:
    """A token of a JSON file: its spelling alone, or its fields."""
    written = {key: value for key, value in token.items() if key != "__type"} if isinstance(token, dict) else {"content": token}
    return AddedToken(**{**written, **fields})


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates: those in files of their own, else those in the config."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    if (folder / _TEMPLATE).is_file():
        files[DEFAULT] = (folder / _TEMPLATE).read_text(encoding="utf-8")
    if files:
        return files
    inside = config.get("chat_template") or _optional(folder / "chat_template.json").get("chat_template")
    if isinstance(inside, list):
        return {str(each["name"]): str(each["template"]) for each in inside}
    return {} if inside is None else dict(inside) if isinstance(inside, dict) else {DEFAULT: str(inside)}


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _converted(folder: Path) -> TokenizerFiles:
    """The tokenizer of a folder with files of another kind, such as SentencePiece's, as transformers converts it."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {TOKENIZER}; give the folder of a checkpoint with its tokenizer")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{folder} holds no {TOKENIZER}; where transformers is installed, make one: "
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
        ) from error
    with tempfile.TemporaryDirectory() as name:
        try:
            AutoTokenizer.from_pretrained(str(folder), local_files_only=True).save_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError) as error:
            raise _unreadable(folder, error) from error
        if not (Path(name) / TOKENIZER).is_file():
            raise CheckpointError(f"the tokenizer in {folder} has no fast form; convert it to one with a {TOKENIZER}")
        return read_tokenizer(Path(name))


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"the tokenizer in {folder} cannot be read ({' '.join(str(error).split())}); copy it again")
