"""Encoding of records as documents: which tokens are given, which are learnt, how a document ends.

Owns the tokens and flags of a document. Knows a tokenizer but no file; the formats of records are `shapes`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np

from unmask.data.documents import Document, Source
from unmask.data.shapes import Conversation, Example, Fields, PlainText, read_example, read_pair
from unmask.data.tokenizer import Tokenizer
from unmask.errors import DataError, located

Supervise = Literal["response", "all"]


@dataclass(frozen=True)
class DocumentEncoder:
    """Encoder of records as documents.

    Attributes:
        tokenizer: the tokenizer.
        fields: names of the fields.
        chat: render prompt and response through the chat template, if the tokenizer has one. Conversations, and records
            with tools or a system message, always are. A text that seems to be rendered already is refused.
        supervise: "response": what an assistant wrote is maskable, and the whole of a plain text; "all": every token is,
            except a begin-of-text token the tokenizer puts in front, which is always given.
        eos_fill: fill each document with maskable end-of-text tokens to a multiple of this many tokens, so that a model
            learns to finish a block.
        pairs: every record is a preference, and becomes a document with a `rejected` one.
    """

    tokenizer: Tokenizer
    fields: Fields = field(default_factory=Fields)
    chat: bool = True
    supervise: Supervise = "response"
    eos_fill: int | None = None
    pairs: bool = False

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise DataError when a record lacks a field or has a malformed one; cheap, nothing is tokenized."""
        self._examples(record)

    def encode(self, record: Mapping[str, Any], where: str) -> Document:
        """Encode one record.

        Args:
            record: the record.
            where: its origin, for messages ("data.jsonl line 3").

        Raises:
            DataError: a field is missing or malformed, the template refuses it, or the mask token is in the text.
        """
        with located(where):
            chosen, *rejected = (self._document(example) for example in self._examples(record))
        return replace(chosen, rejected=rejected[0]) if rejected else chosen

    def _examples(self, record: Mapping[str, Any]) -> tuple[Example, ...]:
        examples = read_pair(record, self.fields) if self.pairs else (read_example(record, self.fields),)
        for example in examples:
            self._check(example)
        return examples

    def _check(self, example: Example) -> None:
        """Raise DataError for an example of which something would be lost."""
        plain = example if isinstance(example, PlainText) else None if self._is_laid_out(example) else example.plain
        frame = self.tokenizer.frame_of(plain.prompt + plain.response) if plain is not None and self.chat else None
        if frame is not None:
            raise DataError(
                f"{example.label}: the text is framed by {frame}, a control token, which would be read as plain text; give "
                "messages, or take it away; chat: false learns it as plain text"
            )
        if self.supervise == "all" and isinstance(example, Conversation) and example.left_out:
            raise DataError(
                f"{example.label}: message {min(example.left_out) + 1} is not to be learnt, but supervise is all; "
                "use supervise: response, or remove the message's weight"
            )

    def _is_laid_out(self, example: Conversation) -> bool:
        """Whether the chat template lays it out."""
        return example.plain is None or bool(example.tools) or (self.chat and self.tokenizer.has_chat_template)

    def _document(self, example: Example) -> Document:
        with located(example.label):
            ids, maskable = self._encode(example)
        mask_id = self.tokenizer.mask_id
        if mask_id is not None and mask_id in ids:
            raise DataError(
                f"{example.label}: token {ids.index(mask_id)} is the mask token {self.tokenizer.mask_token} (id {mask_id}), "
                "which must not be in the data; remove it or choose another mask token"
            )
        num_fill = 0 if self.eos_fill is None or not example.ended else -len(ids) % self.eos_fill
        tokens = np.array(ids + [self.tokenizer.eos_id] * num_fill, dtype=np.int32)
        flags = np.array(maskable + [True] * num_fill, dtype=np.bool_)
        if self.supervise == "all":
            flags[:] = True
            num_prefix = len(self.tokenizer.prefix_ids)
            if tuple(ids[:num_prefix]) == self.tokenizer.prefix_ids:
                flags[:num_prefix] = False
        return Document(tokens=tokens, maskable=flags)

    def _encode(self, example: Example) -> tuple[list[int], list[bool]]:
        if isinstance(example, Conversation):
            if self._is_laid_out(example):
                return self._encode_conversation(example)
            assert example.plain is not None
            example = example.plain
        prompt = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(example.prompt)]
        response = self.tokenizer.encode(example.response, after=prompt if example.prompt else ())
        response += [self.tokenizer.eos_id] * example.ended
        return prompt + response, [False] * len(prompt) + [True] * len(response)

    def _encode_conversation(self, example: Conversation) -> tuple[list[int], list[bool]]:
        if self.supervise == "response" or not example.ended:
            return self.tokenizer.chat_document(
                example.messages,
                tools=example.tools,
                num_given=example.num_given,
                left_out=example.left_out,
                ended=example.ended,
            )
        ids = self.tokenizer.chat(example.messages, add_generation_prompt=False, tools=example.tools)
        if not ids or ids[-1] not in self.tokenizer.eos_ids:
            ids.append(self.tokenizer.eos_id)
        return ids, [True] * len(ids)


class RecordSource(Source, Protocol):
    """A source of records that its encoder makes documents of."""

    encoder: DocumentEncoder

    def next_record(self) -> tuple[Mapping[str, Any], str]:
        """The next record and its location, for messages; moves on as `next_document` does."""
