"""A run from its recipe, whatever its stage: conversion, supervised fine-tuning, preference optimisation.

Owns how model, mask token, data, objective and trainer come together, and what the run leaves behind. The loop is `trainer`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch

from unmask.data.documents import DocumentStream
from unmask.data.holdout import Split
from unmask.data.packing import PackedRows, Packer, RowPacker
from unmask.data.pairs import PairPacker
from unmask.data.sources import open_source
from unmask.data.tokenizer import Tokenizer, choose_mask_token, load_tokenizer
from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.gated_lora import add_gated_lora, train_gated_lora
from unmask.models.arch.transformer import Transformer, resize_vocabulary
from unmask.models.dtypes import parse_dtype
from unmask.models.weights.adapter import adapters_off, attach_lora, save_adapter
from unmask.models.weights.hub import resolve, tokenizer_folder
from unmask.models.weights.loading import load_model
from unmask.train.drafting import Drafting
from unmask.train.metrics import Record, plot_run, read_metrics
from unmask.train.objective import Denoising, MaskedSetting, NextToken, Objective, Preference, Setting
from unmask.train.recipe import Recipe, TrainSection
from unmask.train.router import RouterMonitor
from unmask.train.state import list_checkpoints, save_model
from unmask.train.step import AttentionBackend
from unmask.train.trainer import Parts, Trainer

ADAPTER = "adapter"
"""Folder, inside the run's, of the PEFT files that a run with LoRA leaves beside the folded model."""


_ANYTHING = [{"role": "user", "content": "x"}]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind: `folder` is the model's when `finished`, else the run's; `data`: what became of the documents."""

    finished: bool
    folder: Path
    plot: Path | None
    steps: int
    tokens: int
    data: str


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    on_record: Callable[[Record], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Run a recipe.

    Args:
        recipe: model, data, schedule, objective, budget.
        out: the run's folder: checkpoints, metrics, plot and, at the end, the model (with LoRA its adapter too).
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
        save_model(parts.model, parts.tokenizer, out)
        if recipe.train.lora is not None:
            save_adapter(parts.model, out / ADAPTER, base=recipe.model)
            parts.tokenizer.save(out / ADAPTER)
    return RunResult(finished, out, plot, trainer.step, trainer.tokens, parts.packer.stats.summary)


def build_parts(recipe: Recipe) -> Parts:
    """Load the model, give it a mask token, open and split the data, choose the objective."""
    train = recipe.train
    device = ("cuda" if torch.cuda.is_available() else "cpu") if train.device == "auto" else train.device
    folder = resolve(recipe.model)
    tokenizer = load_tokenizer(tokenizer_folder(folder) or folder)
    model = load_model(folder, dtype=parse_dtype(train.compute_dtype, device), device=device)
    mask_id = _give_mask_token(model, tokenizer, recipe)
    reference = None if recipe.preference is None or train.lora is not None else deepcopy(model).requires_grad_(False).eval()
    if model.config.start_id is not None:
        tokenizer.set_start_token(model.config.start_id)
    model = _give_gates(model, train)
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
    router = _router(model, train)
    backend = _backend(recipe, device)
    return Parts(
        model=model,
        objective=_objective(Setting(model, recipe, backend, router), mask_id, reference),
        router=router,
        packer=_packer(recipe, tokenizer, held_out=False),
        validation=_validation_rows(recipe, tokenizer),
        recipe=recipe,
        mask_id=mask_id,
        backend=backend,
        tokenizer=tokenizer,
    )


def _give_mask_token(model: Transformer, tokenizer: Tokenizer, recipe: Recipe) -> int | None:
    """The id of the mask token: the diffusion model's own, the recipe's, or an unused one; the model grows if it must.

    None for a model that is to stay autoregressive.
    """
    own = model.config.mask_id
    if recipe.autoregressive:
        if own is not None:
            raise ConfigError(f"{recipe.model} is a diffusion model; autoregressive: true takes an autoregressive one")
        return None
    if own is None and recipe.schedule is None:
        raise ConfigError(
            f"{recipe.model} is autoregressive: fine-tuning needs a diffusion model; convert it first (unmask convert), "
            "give the recipe a schedule of block sizes, or train it as it is (autoregressive: true)"
        )
    if own is not None and recipe.mask_token is None and own in tokenizer.added_tokens:
        token = tokenizer.added_tokens[own]
    else:
        token = recipe.mask_token or choose_mask_token(tokenizer, model.config.vocab_size).token
    mask_id = tokenizer.set_mask_token(token)
    if own is not None and mask_id != own:
        raise ConfigError(f"mask token {token} has id {mask_id}, the model was trained with {own}; leave mask_token out")
    if mask_id >= model.config.vocab_size:
        resize_vocabulary(model, mask_id + 1)
    start_id = _start_token(model.config, tokenizer, recipe)
    model.config = model.config.with_diffusion(mask_id=mask_id, block_size=recipe.decode_block_size, start_id=start_id)
    return mask_id


def _start_token(config: ModelConfig, tokenizer: Tokenizer, recipe: Recipe) -> int | None:
    """What a shifted model reads before a document: the token that its parent's begin with. None: not shifted."""
    if config.shifted:
        return config.start_id
    if recipe.shift:
        if config.mask_id is not None:
            raise ConfigError(f"{recipe.model} was converted without shift; leave shift out, or convert its parent anew")
        chat = tokenizer.chat(_ANYTHING, add_generation_prompt=True) if tokenizer.has_chat_template else []
        candidates = (*chat[:1], *tokenizer.prefix_ids[:1], config.bos_id, *config.eos_ids)
        return next((token for token in candidates if token is not None), 0)
    if recipe.objective.ar_loss_weight:
        raise ConfigError(
            f"objective.ar_loss_weight is {recipe.objective.ar_loss_weight:g}, which takes a shifted model; "
            "convert with shift: true, or leave it out"
        )
    return None


def _give_gates(model: Transformer, train: TrainSection) -> Transformer:
    """A model that has gated LoRA, or is to have it, trains it alone."""
    rank = model.config.gated_lora_rank
    if train.gated_lora_rank is not None and rank is None:
        return add_gated_lora(model, train.gated_lora_rank, seed=train.seed)
    if rank is None:
        return model
    if train.gated_lora_rank not in (None, rank) or train.lora is not None:
        raise ConfigError(
            f"the model has gated LoRA of rank {rank}, which goes on as it is; leave gated_lora_rank and lora out"
        )
    return train_gated_lora(model)


def _router(model: Transformer, train: TrainSection) -> RouterMonitor | None:
    """What watches the routers of a mixture; None for a dense model."""
    policy = train.router.policy
    if model.config.moe is None:
        if policy is not None:
            raise ConfigError(f"train.router.policy is {policy}, but the model has no routed experts; leave it out")
        return None
    if train.lora is not None and policy not in (None, "frozen"):
        raise ConfigError(
            f"train.router.policy is {policy}, but adapters leave routers alone; use frozen, or train without LoRA"
        )
    policy = policy or ("bias" if train.lora is None else "frozen")
    return RouterMonitor(model, policy, rate=train.router.rate, aux_weight=train.router.aux_weight)


def _objective(setting: Setting, mask_id: int | None, reference: Transformer | None) -> Objective:
    """Next token (no `mask_id`), denoising, or preference: against a frozen copy (`reference`) or the model without adapter."""
    if mask_id is None:
        return NextToken(setting)
    masked = MaskedSetting(setting.model, setting.recipe, setting.backend, setting.router, mask_id)
    if setting.recipe.objective.drafts is not None:
        return Drafting(masked, setting.recipe.objective.drafts)
    if setting.recipe.preference is None:
        return Denoising(masked)
    if reference is not None:
        return Preference(masked, reference, nullcontext)
    return Preference(masked, setting.model, lambda: adapters_off(setting.model))


def _packer(recipe: Recipe, tokenizer: Tokenizer, *, held_out: bool) -> Packer:
    """Rows of one side of the split: the mixture of the recipe's sources, packed, or pair by pair."""
    data, pairs = recipe.data, recipe.preference is not None
    fill = 1 if recipe.objective.drafts is not None else recipe.block_size  # behind an answer's end nobody drafts
    share = data.validation_share if data.validation_rows else 0.0
    sources = [
        Split(
            open_source(source, tokenizer, recipe.train.seed + number, pairs=pairs, eos_fill=fill),
            share,
            held_out=held_out,
        )
        for number, source in enumerate(data.sources)
    ]
    stream = DocumentStream(sources, [source.weight for source in data.sources], epochs=1 if held_out else None)
    packer = PairPacker if pairs else RowPacker
    return packer(stream, data.row_length, pad_id=tokenizer.pad_id, overlong=data.overlong)


def _validation_rows(recipe: Recipe, tokenizer: Tokenizer) -> PackedRows | None:
    """Held-out rows; None when the recipe wants none, or the data are too few to spare any."""
    if not recipe.data.validation_rows or not recipe.data.validation_share:
        return None
    rows = _packer(recipe, tokenizer, held_out=True).next_rows(recipe.data.validation_rows)
    return rows if rows.num_rows else None


def _backend(recipe: Recipe, device: str) -> AttentionBackend:
    if recipe.train.attention != "auto":
        return recipe.train.attention
    return "flex" if device.startswith("cuda") else "blocked"


def _plot(out: Path) -> Path | None:
    """Draw the run so far; None before its first step."""
    records = read_metrics(out / "metrics.jsonl")
    if not any(record["kind"] == "train" for record in records):
        return None
    return plot_run(records, out / "loss.png")
