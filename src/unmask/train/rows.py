"""Rows of a run: the sources of a recipe opened, split, mixed and packed, or rows that were packed beforehand.

Owns which packer a recipe needs, and whether packed rows are what a recipe would have packed. What is done with the rows is
`loop`'s matter, writing them `pack`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unmask.data.documents import DocumentStream
from unmask.data.encoding import RecordSource
from unmask.data.holdout import Split
from unmask.data.packed import PackedFolder
from unmask.data.packing import PackedRows, Packer, RowPacker, RowStream
from unmask.data.pairs import PairPacker
from unmask.data.parallel import EncoderPool, ParallelSource
from unmask.data.sources import open_source
from unmask.data.tokenizer import Tokenizer
from unmask.errors import ConfigError
from unmask.train.recipe import Recipe

_KEYS = {
    "row_length": "data.row_length",
    "overlong": "data.overlong",
    "eos_fill": "decode_block_size",
    "validation_share": "data.validation_share",
    "validation_rows": "data.validation_rows",
}
"""Settings of packed rows, and the keys of the recipe that they come from."""


def training_rows(recipe: Recipe, tokenizer: Tokenizer) -> RowStream:
    """Rows to train on, packed as they are read or beforehand.

    Raises:
        ConfigError: packed rows are not what the recipe would have packed.
        DataError: the data cannot be used.
    """
    packed = open_packed(recipe, tokenizer)
    return open_packer(recipe, open_stream(recipe, tokenizer), tokenizer) if packed is None else packed


def validation_rows(recipe: Recipe, tokenizer: Tokenizer) -> PackedRows | None:
    """Held-out rows; None when the recipe wants none, or the data are too few to spare any."""
    if not held_out_share(recipe):
        return None
    packed = open_packed(recipe, tokenizer)
    if packed is not None:
        return packed.validation_rows(recipe.data.validation_rows)
    rows = held_out_packer(recipe, tokenizer).next_rows(recipe.data.validation_rows)
    return rows if rows.num_rows else None


def held_out_packer(recipe: Recipe, tokenizer: Tokenizer, pool: EncoderPool | None = None) -> Packer:
    """A packer of the documents that are never trained on, once each."""
    return open_packer(recipe, open_stream(recipe, tokenizer, held_out=True, epochs=1, pool=pool), tokenizer)


def open_stream(
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    held_out: bool = False,
    epochs: int | None = None,
    pool: EncoderPool | None = None,
) -> DocumentStream:
    """The mixture of one side of the sources' documents.

    Args:
        recipe: names the sources.
        tokenizer: with the mask token.
        held_out: the side that is never trained on.
        epochs: passes over each source; None: without end.
        pool: processes that tokenise; None: this one does.
    """
    data, pairs = recipe.data, recipe.objective.pairs
    eos_fill = recipe.objective.eos_fill(recipe.block_size)
    sources: list[Split] = []
    for number, config in enumerate(data.sources):
        source: RecordSource = open_source(config, tokenizer, recipe.train.seed + number, pairs=pairs, eos_fill=eos_fill)
        ahead = source if pool is None else ParallelSource(source, pool)
        sources.append(Split(ahead, held_out_share(recipe), held_out=held_out, epochs=epochs))
    return DocumentStream(sources, [source.weight for source in data.sources], epochs=epochs)


def open_packer(recipe: Recipe, stream: DocumentStream, tokenizer: Tokenizer) -> Packer:
    """The packer of a recipe's rows, pair by pair where they are preferences."""
    packer = PairPacker if recipe.objective.pairs else RowPacker
    return packer(stream, recipe.data.row_length, pad_id=tokenizer.pad_id, overlong=recipe.data.overlong)


def row_settings(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """All but the sources and their seeds that decides what a row holds, JSON-able."""
    return {
        "tokenizer": tokenizer.identity,
        "row_length": recipe.data.row_length,
        "pad_id": tokenizer.pad_id,
        "pairs": recipe.objective.pairs,
        "eos_fill": recipe.objective.eos_fill(recipe.block_size),
        "overlong": recipe.data.overlong,
        "validation_share": held_out_share(recipe),
        "validation_rows": recipe.data.validation_rows,
    }


def open_packed(recipe: Recipe, tokenizer: Tokenizer) -> PackedFolder | None:
    """The folder of packed rows that a recipe names; None: its sources are documents.

    Raises:
        ConfigError: it holds other rows than the recipe would have packed.
        DataError: it is damaged or not complete.
    """
    source = recipe.data.sources[0]
    if source.kind != "packed":
        return None
    assert source.path is not None
    packed = PackedFolder(Path(source.path).expanduser(), seed=recipe.train.seed, shuffle=source.shuffle)
    _check_settings(packed, row_settings(recipe, tokenizer), recipe)
    return packed


def _check_settings(packed: PackedFolder, wanted: dict[str, Any], recipe: Recipe) -> None:
    settings = packed.manifest.settings
    if settings["pairs"] != wanted["pairs"]:
        kinds = {True: "preference pairs", False: "single documents"}
        raise ConfigError(
            f"{packed.folder} holds {kinds[settings['pairs']]}; objective.kind {recipe.objective.kind} takes "
            f"{kinds[wanted['pairs']]}: pack the data for it"
        )
    if settings["tokenizer"] != wanted["tokenizer"] or settings["pad_id"] != wanted["pad_id"]:
        raise ConfigError(
            f"{packed.folder} was packed with another tokenizer, chat template or mask token than that of model "
            f"{recipe.model}; pack the data with this model, or train the model that they were packed for"
        )
    for name, key in _KEYS.items():
        if name == "validation_share" and not wanted["validation_rows"]:
            continue
        fits = settings[name] >= wanted[name] if name == "validation_rows" else settings[name] == wanted[name]
        if not fits:
            raise ConfigError(
                f"{packed.folder} was packed with {name} {settings[name]}, this recipe has {wanted[name]}; "
                f"set {key} as it was then, or pack the data again"
            )


def held_out_share(recipe: Recipe) -> float:
    """Share of each source's documents that are never trained on; 0: the recipe wants no held-out rows."""
    return recipe.data.validation_share if recipe.data.validation_rows else 0.0
