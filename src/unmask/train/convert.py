"""From an autoregressive checkpoint to a block-diffusion one: builds a run from its recipe and carries it out.

Owns how model, mask token, data and trainer come together, and what the run leaves behind. The loop is `trainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from unmask.data.documents import DocumentStream
from unmask.data.holdout import Split
from unmask.data.packing import PackedRows, RowPacker
from unmask.data.sources import open_source
from unmask.data.tokenizer import Tokenizer, choose_mask_token, load_tokenizer
from unmask.errors import ConfigError
from unmask.models.adapter import attach_lora, folded_state
from unmask.models.checkpoint import load_model, resize_vocabulary, save_state
from unmask.models.dtypes import parse_dtype
from unmask.models.hub import resolve
from unmask.models.transformer import Transformer
from unmask.train.metrics import Record, plot_run, read_metrics
from unmask.train.recipe import Recipe
from unmask.train.state import list_checkpoints
from unmask.train.step import AttentionBackend
from unmask.train.trainer import Parts, Trainer


@dataclass(frozen=True)
class ConvertResult:
    """What a run left behind: `folder` is the model's when `finished`, else the run's."""

    finished: bool
    folder: Path
    plot: Path | None
    steps: int
    tokens: int


def convert(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    on_record: Callable[[Record], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ConvertResult:
    """Run a recipe.

    Args:
        recipe: model, data, schedule, objective, budget.
        out: the run's folder: checkpoints, metrics, plot and, at the end, the model.
        resume: continue the run in `out`; without one there, start.
        on_record: sees every metric record.
        should_stop: asked after every step; True saves a resumable checkpoint and returns.

    Returns:
        Where the model and the plot are.

    Raises:
        ConfigError: `out` holds a run and `resume` is False, or the recipe contradicts the model.
        DataError, CheckpointError: unusable data or model.
        TrainingError: non-finite loss, or a full disk.
    """
    if not resume and (list_checkpoints(out) or (out / "config.json").exists()):
        raise ConfigError(f"{out} already holds a run; pass --resume to continue it, or choose another --out")
    parts = build_parts(recipe)
    trainer = Trainer(parts, out, on_record=on_record, should_stop=should_stop)
    trainer.resume()
    try:
        finished = trainer.fit()
    finally:
        plot = _plot(out)
    if finished:
        parts.save_model(parts.model, out)
    return ConvertResult(finished, out, plot, trainer.step, trainer.tokens)


def build_parts(recipe: Recipe) -> Parts:
    """Load the model, give it a mask token, open and split the data."""
    train = recipe.train
    device = ("cuda" if torch.cuda.is_available() else "cpu") if train.device == "auto" else train.device
    folder = resolve(recipe.model)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=parse_dtype(train.compute_dtype, device), device=device)
    token = recipe.mask_token or choose_mask_token(tokenizer, model.config.vocab_size).token
    mask_id = tokenizer.set_mask_token(token)
    if mask_id >= model.config.vocab_size:
        resize_vocabulary(model, mask_id + 1)
    model.config = model.config.with_diffusion(mask_id=mask_id, block_size=recipe.decode_block_size)
    if train.lora is not None:
        attach_lora(
            model,
            rank=train.lora.rank,
            alpha=train.lora.alpha,
            seed=train.seed,
            train_embedding=train.lora.train_embedding,
        )
    model.activation_checkpointing = train.activation_checkpointing
    model.train()
    return Parts(
        model=model,
        packer=RowPacker(_stream(recipe, tokenizer, held_out=False), recipe.data.row_length, pad_id=tokenizer.pad_id),
        validation=_validation_rows(recipe, tokenizer),
        recipe=recipe,
        mask_id=mask_id,
        backend=_backend(recipe, device),
        save_model=lambda trained, target: _save(trained, tokenizer, target),
    )


def _stream(recipe: Recipe, tokenizer: Tokenizer, *, held_out: bool) -> DocumentStream:
    """The mixture of the recipe's sources, one side of the split."""
    share = recipe.data.validation_share if recipe.data.validation_rows else 0.0
    sources = [
        Split(open_source(source, tokenizer, recipe.train.seed + number), share, held_out=held_out)
        for number, source in enumerate(recipe.data.sources)
    ]
    return DocumentStream(sources, [source.weight for source in recipe.data.sources], epochs=1 if held_out else None)


def _validation_rows(recipe: Recipe, tokenizer: Tokenizer) -> PackedRows | None:
    """Held-out rows; None when the recipe wants none, or the data are too few to spare any."""
    data = recipe.data
    if not data.validation_rows or not data.validation_share:
        return None
    packer = RowPacker(_stream(recipe, tokenizer, held_out=True), data.row_length, pad_id=tokenizer.pad_id)
    rows = packer.next_rows(data.validation_rows)
    return rows if rows.num_rows else None


def _backend(recipe: Recipe, device: str) -> AttentionBackend:
    if recipe.train.attention != "auto":
        return recipe.train.attention
    return "flex" if device.startswith("cuda") else "blocked"


def _save(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (adapters folded in), config and tokenizer as a Hugging Face folder."""
    save_state(folded_state(model), model.config, folder)
    tokenizer.save(folder)


def _plot(out: Path) -> Path | None:
    """Draw the run so far; None before its first step."""
    records = read_metrics(out / "metrics.jsonl")
    if not any(record["kind"] == "train" for record in records):
        return None
    return plot_run(records, out / "loss.png")
