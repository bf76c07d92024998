"""Packing beforehand: the rows that a recipe would train on, tokenised in parallel and written as memory-mapped files.

Owns how far a job is and what it leaves behind. What a row holds is `rows`', what a file looks like `data.packed`'s matter.

Every file is complete when it has its name, and then `progress.json` says where to go on: a killed job loses one file at most.
`manifest.json` appears last; without it nothing is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from unmask.data.packed import BATCH_ROWS, MANIFEST, VALIDATION, Manifest, PackedFile, arrow_schema, read_manifest, record_batch
from unmask.data.packing import SEGMENT_STRIDE, Packer, PackingStats, Segment
from unmask.data.parallel import EncoderPool, encoder_pool
from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.errors import ConfigError, DataError
from unmask.files import atomic_write, atomic_write_json, read_json
from unmask.lock import locked
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.hub import resolve, tokenizer_folder
from unmask.train.recipe import Recipe
from unmask.train.rows import held_out_packer, held_out_share, open_packer, open_stream, row_settings
from unmask.train.tokens import training_config

PROGRESS = "progress.json"
FILE_BYTES = 2**28

Row = list[Segment]


@dataclass(frozen=True)
class _Progress:
    """Contents of `progress.json`: the files so far, and the state of the packer behind them."""

    job: dict[str, Any]
    files: tuple[PackedFile, ...] = ()
    validation: PackedFile | None = None
    packer: dict[str, Any] | None = None
    epochs: int = 0
    ordinals: int = 0
    stats: PackingStats = field(default_factory=PackingStats)
    ended: bool = False

    @staticmethod
    def read(path: Path) -> _Progress:
        values = read_json(path)
        values["files"] = tuple(PackedFile(**file) for file in values["files"])
        values["validation"] = None if values["validation"] is None else PackedFile(**values["validation"])
        return _Progress(**{**values, "stats": PackingStats(**values["stats"])})


def pack_recipe(
    recipe: Recipe,
    out: Path,
    *,
    nproc: int = 1,
    epochs: int | None = None,
    resume: bool = False,
    file_bytes: int = FILE_BYTES,
    on_progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Manifest:
    """Write the rows that training a recipe would read.

    Args:
        recipe: model (for its tokenizer), data, objective; the rows do not depend on the rest of it.
        out: a new folder, or with `resume` that of a job that was stopped.
        nproc: processes that tokenise; the rows do not depend on it.
        epochs: passes over every source; None: as many rows as `train.tokens` of the recipe takes.
        resume: go on with the job in `out`; without one there, start.
        file_bytes: size of a file, about: the work that a killed job loses at most.
        on_progress: called with (documents or tokens so far, all there will be or None).

    Returns:
        The manifest of the folder.

    Raises:
        ConfigError: `out` is in use, another process is writing into it, or the job in it is another one.
        DataError, CheckpointError: the data or the model cannot be used, or the disk is full; the job can be resumed.
    """
    if recipe.data.sources[0].kind == "packed":
        raise ConfigError(f"{recipe.data.sources[0].path} holds packed rows already; name the data they were made of")
    folder = resolve(recipe.model)
    tokenizer = load_tokenizer(tokenizer_folder(folder) or folder)
    training_config(read_model_config(folder), tokenizer, recipe)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose a new folder")
    with locked(out):
        progress = _start(out, _job(recipe, tokenizer, epochs), resume=resume)
        if (out / MANIFEST).is_file():
            return read_manifest(out)
        with encoder_pool(nproc) as pool:
            progress = _write_rows(out, progress, recipe, tokenizer, pool, epochs, file_bytes, on_progress)
        if not progress.files:
            raise DataError(f"the data fill no row: {progress.stats.summary}; give more, or lower data.validation_share")
        return _finish(out, progress, recipe, tokenizer)


def _write_rows(
    out: Path,
    progress: _Progress,
    recipe: Recipe,
    tokenizer: Tokenizer,
    pool: EncoderPool | None,
    epochs: int | None,
    file_bytes: int,
    on_progress: Callable[[int, int | None], None],
) -> _Progress:
    """Write all files that are missing; the arguments are those of `pack_recipe`."""
    budget = None if epochs is not None else recipe.train.tokens
    if not progress.files:
        progress = replace(progress, validation=_write_held_out(out, recipe, tokenizer, pool))
    stream = open_stream(recipe, tokenizer, epochs=epochs, pool=pool)
    packer = open_packer(recipe, stream, tokenizer)
    if progress.packer is not None:
        packer.load_state_dict(progress.packer)
    total = stream.num_documents

    def report() -> None:
        if budget is not None:
            on_progress(min(packer.stats.packed_tokens, budget), budget)
        else:
            on_progress(stream.num_samples, None if total is None else total * (epochs or 1))

    row_bytes = recipe.data.row_length * 4.125
    num_batches = max(1, round(file_bytes / (BATCH_ROWS * row_bytes)))
    while not progress.ended:
        batches = _batches(packer, num_batches, budget, recipe.train.batch_rows, report)
        before, progress = len(progress.files), _next_file(out, progress, packer, batches, recipe, tokenizer)
        is_full = len(progress.files) > before and progress.files[-1].rows == num_batches * BATCH_ROWS
        progress = replace(progress, ended=not is_full or _is_enough(packer, budget, recipe.train.batch_rows))
        atomic_write_json(out / PROGRESS, asdict(progress))
    return progress


def _write_held_out(out: Path, recipe: Recipe, tokenizer: Tokenizer, pool: EncoderPool | None) -> PackedFile | None:
    """The file of held-out rows; None where the recipe wants none, or the data spare none."""
    if not held_out_share(recipe):
        return None
    rows = held_out_packer(recipe, tokenizer, pool).next_segments(recipe.data.validation_rows)
    batches = (rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS))
    return _write(out / VALIDATION, batches, recipe, tokenizer)[0] if rows else None


def _job(recipe: Recipe, tokenizer: Tokenizer, epochs: int | None) -> dict[str, Any]:
    """What must be the same when a job is resumed."""
    budget = [recipe.train.tokens, recipe.train.batch_rows] if epochs is None else None
    sources = [source.model_dump(mode="json", exclude_defaults=True) for source in recipe.data.sources]
    settings = row_settings(recipe, tokenizer)
    return {"settings": settings, "sources": sources, "seed": recipe.train.seed, "epochs": epochs, "budget": budget}


def _start(out: Path, job: dict[str, Any], *, resume: bool) -> _Progress:
    complete, unfinished = (out / MANIFEST).is_file(), (out / PROGRESS).is_file()
    if (complete or unfinished) and not resume:
        what = "packed rows already" if complete else "an unfinished job"
        raise ConfigError(f"{out} holds {what}; choose another folder" + ("" if complete else ", or resume it"))
    if unfinished:
        progress = _Progress.read(out / PROGRESS)
        _check_job(out, progress.job, job)
        return progress
    if not complete and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(f"{out} is not empty; choose a new folder")
    progress = _Progress(job)
    if complete:
        settings = read_manifest(out).settings
        _check_job(out, {**settings, "settings": {name: settings[name] for name in job["settings"]}}, job)
    else:
        atomic_write_json(out / PROGRESS, asdict(progress))
    return progress


def _check_job(out: Path, started: Mapping[str, Any], job: Mapping[str, Any]) -> None:
    """Raise ConfigError where a job is not the one that was started."""
    changed = [name for name in ("sources", "seed", "epochs", "budget") if started[name] != job[name]]
    changed += [name for name, value in job["settings"].items() if started["settings"].get(name) != value]
    if changed:
        raise ConfigError(
            f"the job in {out} has other {', '.join(changed)}; resume it as it was started, or choose another folder"
        )


def _is_enough(packer: Packer, budget: int | None, batch_rows: int) -> bool:
    """Whether the rows so far are whole batches that hold the tokens of a run."""
    return budget is not None and packer.stats.packed_tokens >= budget and packer.stats.rows % batch_rows == 0


def _batches(
    packer: Packer, count: int, budget: int | None, batch_rows: int, report: Callable[[], None]
) -> Iterator[list[Row]]:
    """At most `count` record batches of rows; the last is shorter only at the end of the data or of the budget."""
    for _ in range(count):
        rows: list[Row] = []
        while len(rows) < BATCH_ROWS and not _is_enough(packer, budget, batch_rows):
            group = packer.next_segments(packer.group_size)
            if not group:
                break
            rows += group
        report()
        if rows:
            yield rows
        if len(rows) < BATCH_ROWS:
            return


def _next_file(
    out: Path, progress: _Progress, packer: Packer, batches: Iterator[list[Row]], recipe: Recipe, tokenizer: Tokenizer
) -> _Progress:
    """The progress after one more file, or after none where there are no more rows."""
    path = out / f"rows-{len(progress.files):05d}.arrow"
    file, epochs, ordinals = _write(path, batches, recipe, tokenizer)
    if file.rows == 0:
        path.unlink()
    return replace(
        progress,
        files=(*progress.files, *([file] if file.rows else [])),
        packer=packer.state_dict(),
        epochs=max(progress.epochs, epochs),
        ordinals=max(progress.ordinals, ordinals),
        stats=packer.stats,
    )


def _write(path: Path, batches: Iterator[list[Row]], recipe: Recipe, tokenizer: Tokenizer) -> tuple[PackedFile, int, int]:
    """A file of rows, and the bounds of the epochs and ordinals in it."""
    import pyarrow as pa

    length, rows, epochs, ordinals = recipe.data.row_length, 0, 0, 0

    def write(file: BinaryIO) -> None:
        nonlocal rows, epochs, ordinals
        with pa.ipc.new_file(file, arrow_schema(length)) as writer:
            for batch in batches:
                writer.write_batch(record_batch(batch, length, pad_id=tokenizer.pad_id))
                rows += len(batch)
                epochs = max(epochs, *(segment.epoch + 1 for row in batch for segment in row))
                ordinals = max(ordinals, *(segment.ordinal % SEGMENT_STRIDE + 1 for row in batch for segment in row))

    atomic_write(path, write)
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return PackedFile(path.name, rows, path.stat().st_size, digest), epochs, ordinals


def _finish(out: Path, progress: _Progress, recipe: Recipe, tokenizer: Tokenizer) -> Manifest:
    """Write the manifest, with which the folder is complete."""
    settings = {**progress.job["settings"], "model": recipe.model, "chat_template": tokenizer.chat_template}
    origin = {name: progress.job[name] for name in ("sources", "seed", "epochs", "budget")}
    manifest = Manifest(
        settings={**settings, **origin},
        files=progress.files,
        validation=progress.validation,
        group_size=2 if recipe.objective.pairs else 1,
        epochs=progress.epochs,
        ordinals=progress.ordinals,
        stats=progress.stats,
    )
    atomic_write_json(out / MANIFEST, manifest.as_json())
    (out / PROGRESS).unlink(missing_ok=True)
    return manifest
