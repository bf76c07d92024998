"""`unmask ngrams`: count what a model writes after its last tokens, to draft from it.

Owns the options and the report. The table is `engine.ngrams`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.console import make_console, program
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from unmask.data.documents import Document
    from unmask.engine.ngrams import NgramTable

_HELD_OUT_EVERY = 20
"""Of so many documents one is not counted, and shows what the table drafts."""


def ngrams(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a model; with --out also a name.")],
    data: Annotated[
        list[str],
        typer.Option(metavar="DATA", help="Text that the model wrote: a file, folder or dataset id; may be repeated."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Another folder to write the table into.", show_default="the model's")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Keep what the present table says of contexts that the data does not hold.")
    ] = False,
) -> None:
    """Count what a model writes after its last tokens, so that it drafts from that and decodes faster.

    The text stays the same, since each draft is verified (speculative decoding); what changes is how many tokens a forward
    gives. The table is written into the folder of the model, and every command that decodes with it uses it then. Best is text
    of the model's own: its answers to many questions of the kinds that it will be asked. A million tokens of it make a table of
    about a megabyte, in seconds. Of conversations the answers are counted, of prompts with responses these, else all.

    \b
    unmask ngrams out/mine --data own.jsonl
    unmask ngrams out/mine --data answers/ --data notes.txt
    unmask ngrams out/mine --data this_week.jsonl --extend
    unmask generate "Hello!" --model out/mine
    """
    from rich.filesize import decimal

    from unmask.engine.ngrams import count_ngrams, merge_tables
    from unmask.models.weights.checkpoint import read_model_config
    from unmask.models.weights.hub import NGRAMS, resolve

    console, folder = make_console(), resolve(model)
    if out is None and not Path(model).expanduser().is_dir():
        raise ConfigError(f"{model} is not a folder that a table can be written into; give --out, a folder of the model")
    if (config := read_model_config(folder)).mask_id is not None and not config.shifted:
        raise ConfigError(
            f"{model} decodes by denoising blocks, in which nothing verifies a draft; n-grams are for other models"
        )
    target = (folder if out is None else out) / NGRAMS
    present = _present_table(model, folder, target, config.vocab_size) if extend else None
    documents = _read_documents(console, folder, data)
    held_out = documents[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    counted = [document for place, document in enumerate(documents, 1) if place % _HELD_OUT_EVERY]
    table = count_ngrams(counted)
    if present is not None:
        table = merge_tables([table, present])
    table.save(target)
    written = sum(int(document.maskable.sum()) for document in counted)
    size = decimal(target.stat().st_size)
    of_which = f"{written:,} tokens" if present is None else f"{written:,} tokens and of a table of {len(present):,}"
    console.print(f"table    {target}: {len(table):,} contexts of {of_which}, {size}", soft_wrap=True)
    if held_out:
        right, drafted, total = _drafts(table, held_out)
        console.print(
            f"drafts   {right / max(drafted, 1):.0%} right, for {drafted / max(total, 1):.0%} of the {total:,} tokens of "
            f"{len(held_out):,} documents that were not counted",
            soft_wrap=True,
        )
    console.print(f"decode   {program()} chat --model {target.parent}", soft_wrap=True)


def _present_table(model: str, folder: Path, target: Path, vocab_size: int) -> NgramTable:
    """The table that is extended: the one that is written over, else the model's; raises ConfigError where there is none."""
    from unmask.engine.ngrams import find_ngrams, load_ngrams

    present = load_ngrams(target, vocab_size) if target.exists() else find_ngrams(model, folder, vocab_size)
    if present is None:
        raise ConfigError(f"{model} has no table of n-grams that --extend could add to; leave it out")
    return present


def _read_documents(console: Console, folder: Path, data: Sequence[str]) -> list[Document]:
    """All documents of the sources, tokenized as the model in a folder does."""
    from unmask.cli.data_option import text_source
    from unmask.cli.progress import counting

    documents: list[Document] = []
    with counting(console, "documents") as on_progress:
        for source in [text_source(folder, each, "--data") for each in data]:
            while source.epoch == 0:
                documents.append(source.next_document())
                on_progress(len(documents), None)
    return documents


def _drafts(table: NgramTable, documents: Sequence[Document]) -> tuple[int, int, int]:
    """Of the tokens that were written: those that the table drafts rightly, those that it drafts, and all."""
    right = drafted = total = 0
    for document in documents:
        tokens = document.tokens.tolist()
        for place in document.maskable.nonzero()[0].tolist():
            found = table.next(tokens, place)
            drafted, total = drafted + (found is not None), total + 1
            right += found is not None and found.token == tokens[place]
    return right, drafted, total
