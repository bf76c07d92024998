"""Encoding of records as documents: which tokens are given, which are learnt, how a document ends.

Owns the tokens and flags of a document. Knows a tokenizer but no file; the formats of records are `shapes`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from unmask.data.documents import Document
from unmask.data.shapes import Conversation, Example, Fields, read_example, read_pair
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
            with tools, always are.
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
        return read_pair(record, self.fields) if self.pairs else (read_example(record, self.fields),)

    def _document(self, example: Example) -> Document:
        with located(example.label):
            ids, maskable = self._encode(example)
        mask_id = self.tokenizer.mask_id
        if mask_id is not None and mask_id in ids:
            raise DataError(
                f"{example.label}: token {ids.index(mask_id)} is the mask token {self.tokenizer.mask_token} (id {mask_id}), "
                "which must not be in the data; remove it or choose another mask token"
            )
        num_fill = 0 if self.eos_fill is None else -len(ids) % self.eos_fill
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
            if example.plain is None or example.tools or (self.chat and self.tokenizer.has_chat_template):
                return self._encode_conversation(example)
            example = example.plain
        prompt = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(example.prompt)]
        response = [*self.tokenizer.encode(example.response, after=prompt if example.prompt else ()), self.tokenizer.eos_id]
        return prompt + response, [False] * len(prompt) + [True] * len(response)

    def _encode_conversation(self, example: Conversation) -> tuple[list[int], list[bool]]:
        if self.supervise == "response":
            return self.tokenizer.chat_document(example.messages, tools=example.tools, num_given=example.num_given)
        ids = self.tokenizer.chat(example.messages, add_generation_prompt=False, tools=example.tools)
        if not ids or ids[-1] not in self.tokenizer.eos_ids:
            ids.append(self.tokenizer.eos_id)
        return ids, [True] * len(ids)
