"""Records to documents: which field is text, which part is learnt, how a document ends.

Owns the three shapes of a record (text, prompt and response, messages). Knows a tokenizer but no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from unmask.data.documents import Document
from unmask.data.tokenizer import Tokenizer
from unmask.errors import DataError

Supervise = Literal["response", "all"]


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a record.

    Attributes:
        text: a whole text.
        messages: a conversation: a list of `{"role": ..., "content": ...}`.
        prompt: what stands before a response.
        response: names of the response, of which a record has one.
    """

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    response: tuple[str, ...] = ("response", "completion")

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.text, self.messages, self.prompt, *self.response)


@dataclass(frozen=True)
class DocumentEncoder:
    """Turns one record into one document.

    Attributes:
        tokenizer: the tokenizer.
        fields: names of the fields; a record's shape is the first of text, messages, prompt and response it has.
        chat: render prompt and response through the chat template, if the tokenizer has one.
        supervise: "response": what an assistant wrote is maskable, and the whole of a plain text; "all": every token is,
            except a begin-of-text token the tokenizer puts in front, which is always given.
        eos_fill: fill each document with maskable end-of-text tokens to a multiple of so many tokens, so that a model
            learns to finish a block.
    """

    tokenizer: Tokenizer
    fields: Fields = Fields()
    chat: bool = True
    supervise: Supervise = "response"
    eos_fill: int | None = None

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise DataError when a record lacks a field or has one of the wrong type; cheap, nothing is tokenized."""
        self._shape(record)

    def encode(self, record: Mapping[str, Any], where: str) -> Document:
        """Encode one record.

        Args:
            record: the record.
            where: the place it comes from, for messages ("data.jsonl line 3").

        Returns:
            The document.

        Raises:
            DataError: a field is missing or of the wrong type, or the mask token is in the text.
        """
        try:
            ids, maskable = self._encode(record)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return self._document(ids, maskable, where)

    def _shape(self, record: Mapping[str, Any]) -> str | tuple[str, str] | list[Mapping[str, Any]]:
        """The text, the prompt and response, or the conversation of a record."""
        names = self.fields
        there = {name for name, value in record.items() if value is not None}
        if names.text in there:
            return _text(record, names.text)
        if names.messages in there:
            return _messages(record, names.messages)
        if names.prompt in there:
            response = next((name for name in names.response if name in there), None)
            if response is None:
                raise _missing(record, " or ".join(names.response))
            return _text(record, names.prompt), _text(record, response)
        raise _missing(record, f"{names.text}, {names.messages} or {names.prompt}")

    def _encode(self, record: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        shape = self._shape(record)
        if isinstance(shape, str):
            return self._plain("", shape)
        if isinstance(shape, list):
            return self._conversation(shape)
        return self._exchange(*shape)

    def _plain(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        given = [*self.tokenizer.prefix_ids, *self.tokenizer.encode(prompt)]
        learnt = [*self.tokenizer.encode(response), self.tokenizer.eos_id]
        return given + learnt, [False] * len(given) + [True] * len(learnt)

    def _exchange(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        if not (self.chat and self.tokenizer.has_chat_template):
            return self._plain(prompt, response)
        return self._conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}])

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
        if self.supervise == "response":
            return self.tokenizer.chat_document(messages)
        ids = self.tokenizer.chat(messages, add_generation_prompt=False)
        if not ids or ids[-1] not in self.tokenizer.eos_ids:
            ids.append(self.tokenizer.eos_id)
        return ids, [True] * len(ids)

    def _document(self, ids: list[int], maskable: list[bool], where: str) -> Document:
        mask_id = self.tokenizer.mask_id
        if mask_id is not None and mask_id in ids:
            raise DataError(
                f"{where}: token {ids.index(mask_id)} is the mask token {self.tokenizer.mask_token} (id {mask_id}), which "
                "must not be in the data; remove it or choose another mask token"
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


def _missing(record: Mapping[str, Any], wanted: str) -> DataError:
    found = ", ".join(name if value is not None else f"{name} (null)" for name, value in record.items()) or "none"
    return DataError(f"no field {wanted}; the fields there are: {found}")


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"field {name} holds {type(value).__name__}, not a text; give a string")
    return value


def _messages(record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise DataError(f"field {name} is not a list of messages; give a list of role and content")
    return value
