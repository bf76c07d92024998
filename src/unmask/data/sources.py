"""Data sources: a section of a recipe, and the source that it opens.

Owns `SourceConfig` and the choice of reader. Knows nothing of training.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from unmask.data.encoding import DocumentEncoder, RecordSource, Supervise
from unmask.data.generated import GeneratedSource
from unmask.data.huggingface import HuggingFaceSource
from unmask.data.indexed import IndexedSource
from unmask.data.records import JsonLinesRecords, ParquetRecords, Records, TextRecords
from unmask.data.shapes import Fields, Shape
from unmask.data.tokenizer import Tokenizer
from unmask.errors import ConfigError

Kind = Literal["text", "jsonl", "parquet", "huggingface", "reasoning_gym", "packed"]

_FILE_KINDS = ("text", "jsonl", "parquet")
_RECORD_KINDS = ("jsonl", "parquet", "huggingface")
_DOCUMENT_KINDS = ("text", *_RECORD_KINDS, "reasoning_gym")
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("path", "shuffle"), (*_FILE_KINDS, "huggingface", "packed")),
    **dict.fromkeys(("weight", "supervise", "eos_fill"), _DOCUMENT_KINDS),
    **dict.fromkeys(("id", "subset", "split", "shuffle_window"), ("huggingface",)),
    **dict.fromkeys(("families", "items_per_epoch"), ("reasoning_gym",)),
    **dict.fromkeys(("text_field", "messages_field", "prompt_field", "response_field", "shape"), _RECORD_KINDS),
    "chat": (*_RECORD_KINDS, "reasoning_gym"),
}


class SourceConfig(BaseModel):
    """One source of documents.

    A record is a text (`text_field`), a conversation (`messages_field` or conversations), a preference (chosen, rejected,
    perhaps `prompt_field`) or a prompt with a response (`prompt_field`, `response_field`); one that is several of these is
    refused unless `shape` says which is meant.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind = Field(description="text, jsonl, parquet, huggingface or reasoning_gym; packed: rows of unmask pack")
    path: str | None = Field(None, description="a file, a folder, or a pattern; for huggingface and packed a folder")
    id: str | None = Field(None, description="huggingface: the dataset's id on the hub, owner/name")
    subset: str | None = Field(None, description="huggingface: configuration of the dataset")
    split: str = Field("train", description="huggingface: split of the dataset")
    shuffle: bool = Field(True, description="a new order each pass; false keeps the data's own order")
    shuffle_window: int = Field(10_000, gt=0, description="huggingface: records shuffled together")
    families: dict[str, dict[str, Any]] | None = Field(None, description="reasoning_gym: family -> its configuration")
    items_per_epoch: int = Field(10_000, gt=0, description="reasoning_gym: problems counted as one pass")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="share of documents in a mixture, in any unit")
    text_field: str = Field("text", description="field with a whole text")
    messages_field: str = Field("messages", description="field with a conversation; conversations is one, too")
    prompt_field: str = Field("prompt", description="field with a prompt: a text or messages")
    response_field: str | None = Field(None, description="field with the response; by default response or completion")
    shape: Shape | None = Field(None, description="text, messages, preference or prompt: of a record that is several")
    chat: bool = Field(True, description="render prompt and response through the chat template, if there is one")
    supervise: Supervise = Field("response", description="response: learn what an assistant wrote; all: every token")
    eos_fill: int | None = Field(None, gt=0, description="fill with end-of-text tokens to a multiple of so many tokens")

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        for name, kinds in _ONLY_FOR.items():
            # A value equal to the default passes: a dumped configuration, which holds them all, can be read again.
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on a {self.kind} source; remove it (it is for {', '.join(kinds)})")
        if self.kind in (*_FILE_KINDS, "packed") and self.path is None:
            raise ValueError(f"a {self.kind} source has no path; name a file, folder or pattern")
        if self.kind == "huggingface" and (self.path is None) == (self.id is None):
            raise ValueError("a huggingface source has both or neither of id and path; give one of them")
        if self.kind == "reasoning_gym" and not self.families:
            raise ValueError("a reasoning_gym source has no families; name at least one, such as chain_sum: {}")
        return self

    @property
    def name(self) -> str:
        """Name of the source in messages: its path, id or kind."""
        return self.path or self.id or self.kind

    @property
    def fields(self) -> Fields:
        """Names of the fields of its records."""
        responses = Fields().response if self.response_field is None else (self.response_field,)
        return Fields(self.text_field, self.messages_field, self.prompt_field, responses, shape=self.shape)


def open_source(
    config: SourceConfig, tokenizer: Tokenizer, seed: int, *, pairs: bool = False, eos_fill: int | None = None
) -> RecordSource:
    """Open a source.

    Args:
        config: section of the recipe, of documents (packed rows are read by `packed.PackedFolder`).
        tokenizer: encodes its texts; its mask token, if set, must not occur in them.
        seed: seed of the order of documents, or of the documents themselves where they are generated.
        pairs: every record is a preference and gives a document with a `rejected` one; otherwise a preference gives its
            chosen side.
        eos_fill: default of `config.eos_fill`.

    Returns:
        The source, at its beginning.

    Raises:
        DataError: the data do not exist, are empty, or have a record that cannot be used.
        ConfigError: a family of problems is unknown or refuses its configuration, or a kind of source has no pairs.
    """
    assert config.kind != "packed", "rows are no documents"
    if pairs and config.kind in ("text", "reasoning_gym"):
        raise ConfigError(f"a {config.kind} source holds no preferences; use jsonl, parquet or huggingface")
    encoder = DocumentEncoder(
        tokenizer=tokenizer,
        fields=config.fields,
        chat=config.chat,
        supervise=config.supervise,
        eos_fill=eos_fill if config.eos_fill is None else config.eos_fill,
        pairs=pairs,
    )
    if config.kind == "reasoning_gym":
        assert config.families is not None
        return GeneratedSource(config.name, config.families, encoder, seed=seed, items_per_epoch=config.items_per_epoch)
    if config.kind == "huggingface":
        return HuggingFaceSource(
            config.name,
            encoder,
            seed=seed,
            split=config.split,
            subset=config.subset,
            window=config.shuffle_window,
            shuffle=config.shuffle,
        )
    assert config.path is not None
    return IndexedSource(config.name, _records(config, config.path, encoder), encoder, seed=seed, shuffle=config.shuffle)


def _records(config: SourceConfig, path: str, encoder: DocumentEncoder) -> Records:
    if config.kind == "text":
        return TextRecords(path, config.text_field)
    if config.kind == "jsonl":
        return JsonLinesRecords(path, encoder.check)
    return ParquetRecords(path, config.fields.names, encoder.check)
