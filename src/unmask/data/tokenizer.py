"""Tokenizer: text to token ids and back, without user text ever becoming a control token.

Owns what ids texts and conversations become. Knows no documents, no model and no network; how a tokenizer lies in a folder is
`tokenizer_files`' matter. "Control tokens" are the tokenizer's special tokens, whose literal spelling would be read as one id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from unmask.data.chat import Message, Renderer, Span, Tool
from unmask.data.chat_template import ChatTemplate
from unmask.data.continuation import Continuation
from unmask.data.tokenizer_files import TokenizerFiles, read_tokenizer, write_tokenizer
from unmask.errors import CheckpointError, DataError


class Tokenizer:
    """A tokenizer from a folder. Make one with `load_tokenizer`."""

    def __init__(self, files: TokenizerFiles, folder: Path) -> None:
        """A tokenizer of files that have been read.

        Args:
            files: the tokenizer; it belongs to this object from now on.
            folder: where it came from, for messages.

        Raises:
            CheckpointError: it has no end-of-text token.
        """
        if "eos_token" not in files.named:
            raise CheckpointError(f"the tokenizer in {folder} has no eos_token; name one in tokenizer_config.json")
        self._files = files
        self._folder = folder
        self._start_id: int | None = None
        self._read_backend()

    def __reduce__(self) -> tuple[Callable[..., Tokenizer], tuple[TokenizerFiles, Path, int | None]]:
        return _restored, (self._files, self._folder, self._start_id)

    def _read_backend(self) -> None:
        """Two backends, with and without control tokens, instead of one that is switched: encoding is safe in threads."""
        self._control, self._plain = (_with_the_same_parts(self._files.backend) for _ in range(2))
        self._plain.encode_special_tokens = True
        self._read_added_tokens()
        if any(not token.special and token.content in self.chat_template for token in self._added.values()):
            self._make_closing_token_special()
        with_prefix = self._control.encode("", add_special_tokens=True).ids
        self._prefix_ids = tuple(id_ for id_ in with_prefix if id_ == self.bos_id)
        added = {token.content: id_ for id_, token in self._added.items()}
        special = frozenset(self._special.values())
        unknown = self._files.id_of("unk_token")
        self._continuation = Continuation(self._plain, self._control, added, special, unknown, self._prefix_ids)
        self._eos_ids: frozenset[int] | None = None

    def _read_added_tokens(self) -> None:
        self._added: dict[int, AddedToken] = self._control.get_added_tokens_decoder()
        self._special = {token.content: id_ for id_, token in self._added.items() if token.special}
        template = ChatTemplate(self._files.templates, self._files.named)
        self._renderer = Renderer(template, self._special)

    def _make_closing_token_special(self) -> None:
        """Make the token that ends an answer a control token whatever the files say: no text becomes it, none shows it."""
        closing = self._closing_id()
        if closing is not None and not self._added[closing].special:
            for backend in (self._plain, self._control):
                backend.add_special_tokens([AddedToken(self._added[closing].content, special=True, normalized=False)])
            self._read_added_tokens()

    def _closing_id(self) -> int | None:
        """Id of the added token with which the chat template closes an assistant turn, if it does."""
        following = self._renderer.after_answer() if self.has_chat_template else ""
        closing = (id_ for id_, token in self._added.items() if following.startswith(token.content))
        return max(closing, key=lambda id_: len(self._added[id_].content), default=None)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model may have more rows than this."""
        return int(self._control.get_vocab_size(with_added_tokens=True))

    @property
    def eos_id(self) -> int:
        """Id of the end-of-text token."""
        id_ = self._files.id_of("eos_token")
        assert id_ is not None, "named tokens are in the vocabulary"
        return id_

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer: `eos_id` and the token with which the chat template closes an assistant turn."""
        if self._eos_ids is None:
            closing = self._closing_id()
            self._eos_ids = frozenset({self.eos_id} if closing is None else {self.eos_id, closing})
        return self._eos_ids

    def frame_of(self, text: str) -> str | None:
        """The spelling of a control token that a text begins or ends with as if it had been rendered for a model.

        It begins with a token of the chat template or the begin-of-text token, or ends with one that ends answers.
        """
        start, end, own = text[:256].lstrip(), text[-256:].rstrip(), self._renderer.own_tokens
        for name, id_ in self._special.items():
            begins = start.startswith(name) and (name in own or id_ == self.bos_id)
            if begins or (end.endswith(name) and id_ in self.eos_ids):
                return name
        return None

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-text token, if there is one."""
        return self._files.id_of("bos_token")

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids before a plain text: the begin-of-text token, or nothing."""
        return () if self._prefix_ids == (self._start_id,) else self._prefix_ids

    @property
    def pad_id(self) -> int:
        """Id of the padding token; the end-of-text token when there is none."""
        id_ = self._files.id_of("pad_token")
        return self.eos_id if id_ is None else id_

    @property
    def mask_id(self) -> int | None:
        """Id of the mask token, if there is one."""
        return self._files.id_of("mask_token")

    @property
    def mask_token(self) -> str | None:
        """Spelling of the mask token, if there is one."""
        return self._files.named.get("mask_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used."""
        return bool(self._files.templates)

    @property
    def chat_template(self) -> str:
        """Source of the chat template or templates; empty when there is none."""
        return "\n".join(self._files.templates.values())

    @property
    def reserved_tokens(self) -> frozenset[str]:
        """Spellings of the named tokens, such as bos, eos, pad, unk, sep and cls, but not the mask's."""
        return frozenset(token for role, token in self._files.named.items() if role != "mask_token")

    @property
    def added_tokens(self) -> dict[int, str]:
        """Id and spelling of every added token, special or not, by rising id."""
        return {id_: self._added[id_].content for id_ in sorted(self._added)}

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling and id of every control token."""
        return dict(self._special)

    @property
    def next_free_id(self) -> int:
        """The id a new token would get."""
        return max(self._control.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def check_rows(self, vocab_size: int) -> None:
        """Raise CheckpointError where a model of so many rows has none for a token."""
        if self.next_free_id > vocab_size:
            raise CheckpointError(
                f"the tokenizer has {self.next_free_id} tokens, the model {vocab_size} rows; use the model's own"
            )

    @property
    def identity(self) -> str:
        """A digest of all that decides which ids a text or a conversation becomes."""
        parts = [
            self.serialised,
            self.chat_template,
            repr([self.prefix_ids, sorted(self.eos_ids), self.mask_id, self._start_id]),
        ]
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()

    @property
    def serialised(self) -> str:
        """The backend as the text of a tokenizer.json, for libraries with a reader of their own."""
        return str(self._plain.to_str())

    def encode(self, text: str, *, allow_special: bool = False, after: Sequence[int | None] = ()) -> list[int]:
        """Token ids of a text, without anything put before or after it.

        Args:
            text: any text.
            allow_special: read literal control tokens in `text` as such; for text we wrote ourselves, never a user's.
            after: the ids that the text follows (None: a token not known yet): within a text no tokenizer puts a space of
                its own in front. Not with `allow_special`.

        Raises:
            DataError: the text is not valid Unicode.
        """
        assert not (allow_special and after), "what follows ids is encoded as plain text"
        try:
            if not allow_special:
                return self._continuation.encode(text, after)
            return list(self._control.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError) as error:
            bad = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
            if bad is None:
                raise
            raise DataError(f"a text holds U+{ord(bad):04X}, half a surrogate pair; remove or repair it") from error

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, after: Sequence[int] = ()) -> str:
        """Text of token ids, control tokens left out or spelled out.

        Args:
            ids: any ids.
            skip_special: leave control tokens out.
            after: the ids that they follow, such as a prompt's: the text is what they add to the text of those. At the start
                of a text some tokenizers drop a space, which belongs to it anywhere else.
        """
        return self._continuation.decode([int(id_) for id_ in ids], after, skip_special=skip_special)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Tool] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, laid out by the chat template.

        Args:
            messages: dicts with `role` and `content` and whatever else the template reads. No text in them can become
                a control token.
            add_generation_prompt: end with the header of an answer, for the model to continue.
            tools: definitions of functions, for a template that shows them.
            variables: further variables that the template reads, such as `enable_thinking`.

        Returns:
            The ids; equal to `apply_chat_template(tokenize=True)` when no message holds the spelling of a control token.

        Raises:
            DataError: there is no template, or it does not accept the messages.
        """
        self._require_template()
        text, has_literals = self._renderer.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )
        if not has_literals:
            ids = self.encode(text, allow_special=True)
        else:
            ids, _ = self._encode_spans(list(self._renderer.split(text)))
        return ids[self._num_started(ids) :]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Tool] | None = None) -> str:
        """The text of a conversation as the chat template writes it; arguments and errors are those of `chat`.

        What tells control tokens from their spellings in messages is lost: `chat` encodes a conversation.
        """
        self._require_template()
        text, _ = self._renderer.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        rendered = "".join(span.text for span in self._renderer.split(text))
        return rendered if self._start_id is None else rendered.removeprefix(self.decode([self._start_id], skip_special=False))

    def chat_document(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        num_given: int = 0,
        left_out: Container[int] = (),
        ended: bool = True,
    ) -> tuple[list[int], list[bool]]:
        """A training conversation: its ids, and which of them an assistant wrote.

        An answer (text, tool calls, or both) and the control token that closes it are the assistant's; headers and all
        other turns are not. What the template writes after the last answer's closing token is cut off; where it closes an
        answer with no token, the last one is closed with `eos_id`. Answers are tokenized behind what precedes them, so
        that the ids before one are exactly those the model will be prompted with.

        Args:
            messages: as for `chat`, at least one of them an assistant's.
            tools: as for `chat`.
            num_given: number of messages at the start that are context only, an assistant's as well.
            left_out: indexes of other messages that are context only.
            ended: the last answer ends there; False: it was cut off, and nothing closes it.

        Returns:
            The ids, and a flag for each.

        Raises:
            DataError: no template, no answer, or a template that does not show where answers start and end.
        """
        self._require_template()
        rendered = self._renderer.render_answers(messages, tools=tools, num_given=num_given, left_out=left_out, ended=ended)
        ids, is_answer = self._encode_spans(list(self._renderer.split(rendered)))
        end = max((index + 1 for index, flag in enumerate(is_answer) if flag), default=0)
        ids, is_answer = ids[:end], is_answer[:end]
        if ended and ids and ids[-1] not in self.eos_ids:
            ids.append(self.eos_id)
            is_answer.append(True)
        started = self._num_started(ids)
        return ids[started:], is_answer[started:]

    def set_mask_token(self, token: str) -> int:
        """Make a token the mask token, appending it if it is new, and return its id."""
        self._files.named["mask_token"] = token
        self._files.backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        self._read_backend()
        assert self.mask_id is not None
        return self.mask_id

    def set_start_token(self, id_: int | None) -> None:
        """Leave this token, if any, out at the start of conversations and prefixes: a shifted model reads it by itself."""
        self._start_id = id_

    def _num_started(self, ids: Sequence[int]) -> int:
        """Number of ids at the start that the model reads by itself."""
        return int(self._start_id is not None and list(ids[:1]) == [self._start_id])

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, mask token and chat template included, into a folder."""
        write_tokenizer(self._files, folder)

    def _require_template(self) -> None:
        if not self.has_chat_template:
            raise DataError(f"the tokenizer in {self._folder} has no chat template; use plain text, or one that has")

    def _encode_spans(self, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Ids of a rendered conversation, span by span, each encoded behind those before it; and which are an answer's."""
        texts = [span.text for span in spans]
        for span, (index, text) in zip(spans, enumerate(texts), strict=True):
            added = self._added[self._special[text]] if span.is_control else None
            if added is not None and added.rstrip:
                _strip(texts, spans, range(index + 1, len(spans)), str.lstrip)
            if added is not None and added.lstrip:
                _strip(texts, spans, range(index - 1, -1, -1), str.rstrip)
        ids: list[int] = []
        is_answer: list[bool] = []
        for span, text in zip(spans, texts, strict=True):
            span_ids = [self._special[text]] if span.is_control else self.encode(text, after=ids)
            ids += span_ids
            is_answer += [span.is_answer] * len(span_ids)
        return ids, is_answer


def _strip(texts: list[str], spans: Sequence[Span], indexes: range, strip: Callable[[str], str]) -> None:
    """Take away the white space beside a control token that swallows it, up to the next text or control token."""
    for index in indexes:
        if spans[index].is_control:
            return
        texts[index] = strip(texts[index])
        if texts[index]:
            return


def _with_the_same_parts(backend: Backend) -> Backend:
    """A backend with the vocabulary of this one, not a copy of it; it neither truncates nor pads."""
    copy = Backend(backend.model)
    copy.normalizer, copy.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    copy.post_processor, copy.decoder = backend.post_processor, backend.decoder
    added = backend.get_added_tokens_decoder()
    copy.add_tokens([added[id_] for id_ in sorted(added)])
    return copy


def _restored(files: TokenizerFiles, folder: Path, start_id: int | None) -> Tokenizer:
    """A tokenizer that was sent to another process."""
    tokenizer = Tokenizer(files, folder)
    tokenizer.set_start_token(start_id)
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder, which holds tokenizer.json and its companions; nothing is fetched.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    return Tokenizer(read_tokenizer(folder), folder)
