"""Rows of a run: the sources of a recipe opened, split, mixed and packed.

Owns which packer a recipe needs. What is done with the rows is `loop`'s matter.
"""

from __future__ import annotations

from unmask.data.documents import DocumentStream
from unmask.data.holdout import Split
from unmask.data.packing import PackedRows, Packer, RowPacker
from unmask.data.pairs import PairPacker
from unmask.data.sources import open_source
from unmask.data.tokenizer import Tokenizer
from unmask.train.recipe import Recipe


def open_rows(recipe: Recipe, tokenizer: Tokenizer, *, held_out: bool = False) -> Packer:
    """Rows of one side of the split: the mixture of the recipe's sources, packed, or pair by pair."""
    data, pairs = recipe.data, recipe.objective.needs_reference
    eos_fill = recipe.objective.eos_fill(recipe.block_size)
    share = data.validation_share if data.validation_rows else 0.0
    sources = [
        Split(
            open_source(source, tokenizer, recipe.train.seed + number, pairs=pairs, eos_fill=eos_fill),
            share,
            held_out=held_out,
        )
        for number, source in enumerate(data.sources)
    ]
    stream = DocumentStream(sources, [source.weight for source in data.sources], epochs=1 if held_out else None)
    packer = PairPacker if pairs else RowPacker
    return packer(stream, data.row_length, pad_id=tokenizer.pad_id, overlong=data.overlong)


def validation_rows(recipe: Recipe, tokenizer: Tokenizer) -> PackedRows | None:
    """Held-out rows; None when the recipe wants none, or the data are too few to spare any."""
    if not recipe.data.validation_rows or not recipe.data.validation_share:
        return None
    rows = open_rows(recipe, tokenizer, held_out=True).next_rows(recipe.data.validation_rows)
    return rows if rows.num_rows else None
