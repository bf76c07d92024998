"""Training runs: from a recipe to a trained model in a folder, whatever the stage.

Owns how model, mask token, data, objective and trainer come together, and what a run leaves behind. The loop is `loop`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from os import environ
from pathlib import Path
from shutil import which

import torch

from unmask.data.tokenizer import load_tokenizer
from unmask.errors import ConfigError
from unmask.files import atomic_write, bytes_writer
from unmask.lock import locked
from unmask.models.arch.gated_lora import add_gated_lora, train_gated_lora
from unmask.models.arch.transformer import Transformer, resize_vocabulary
from unmask.models.dtypes import parse_dtype
from unmask.models.weights.adapter import adapters_off, attach_lora, save_adapter
from unmask.models.weights.checkpoint import open_parts, read_model_config
from unmask.models.weights.hub import NGRAMS, base_folder, ngrams_path, resolve, tokenizer_folder
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import copy_checkpoint
from unmask.train.forward import AttentionBackend
from unmask.train.frozen import save_with_parent
from unmask.train.loop import Components, Trainer
from unmask.train.metrics import MetricRecord, plot_run
from unmask.train.objectives.base import ReferencePolicy, Setting
from unmask.train.parallel.apply import parallelize
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.start import job_name, local_ranks, num_ranks, open_world, restarted
from unmask.train.parallel.whole import on_main, skeleton_of
from unmask.train.parallel.world import World
from unmask.train.plan.auto import layout_of
from unmask.train.recipe import Recipe
from unmask.train.room import check_training_room
from unmask.train.router import RouterMonitor
from unmask.train.rows import training_rows, validation_rows
from unmask.train.sections import TrainSection
from unmask.train.speed import gpu_of
from unmask.train.state import SHARDS, list_checkpoints, save_model
from unmask.train.tokens import training_config

ADAPTER = "adapter"
"""Folder, inside the run's, of the PEFT files that a run with LoRA leaves beside the folded model."""


@dataclass(frozen=True)
class RunResult:
    """Result of a run: `folder` is the model's when `finished`, else the run's; `data` sums up the packed documents."""

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
    on_record: Callable[[MetricRecord], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
    dims: ParallelDims | None = None,
) -> RunResult:
    """Run a recipe.

    Args:
        recipe: model, data, schedule, objective, budget.
        out: the run's folder: checkpoints, metrics, plot and, at the end, the model (with LoRA its adapter too).
        resume: continue the run in `out`; without one there, start. Ranks that are started again resume in any case.
        on_record: called with every metric record.
        should_stop: called after every step; True, on any rank, saves a resumable checkpoint and returns.
        world: the ranks of the run, of which this process is one [default: those that torchrun or `--nproc` started].
        dims: the layout of these, where it has been chosen already [default: as of `run_layout`].

    Returns:
        Where the model and the plot are.

    Raises:
        ConfigError: `out` holds a run and `resume` is False, or the recipe contradicts the model.
        DataError, CheckpointError: unusable data or model.
        TrainingError: non-finite loss, or a full disk.
    """
    with nullcontext(world) if world is not None else _opened(recipe, dims) as world:
        return _run(recipe, out, world, resume, on_record, should_stop)


def run_layout(recipe: Recipe, num_processes: int) -> ParallelDims:
    """The layout of a run of so many processes on the devices here; raises ConfigError when there is none."""
    return layout_of(recipe, num_processes, gpu_of(torch.device(device_of(recipe.train))))


def _opened(recipe: Recipe, dims: ParallelDims | None) -> AbstractContextManager[World]:
    dims = dims or run_layout(recipe, num_ranks())
    return open_world(dims, recipe.parallel.timeout, device_of(recipe.train), f"{recipe.model_dump_json()} {dims}")


def _run(
    recipe: Recipe,
    out: Path,
    world: World,
    resume: bool,
    on_record: Callable[[MetricRecord], None],
    should_stop: Callable[[], bool],
) -> RunResult:
    world.dims.check_rows(recipe.train.batch_rows, pairs=recipe.objective.pairs)
    world.dims.check_micro_batches(recipe.train.batch_rows, recipe.train.micro_rows)
    with ExitStack() as stack:

        def open_folder() -> None:
            if not (resume or restarted(out)) and holds_run(out):
                raise ConfigError(f"{out} already holds a run; resume it, or choose another folder")
            stack.enter_context(locked(out, job_name()))

        on_main(world, open_folder)
        return _train(recipe, out, world, on_record, should_stop)


def _train(
    recipe: Recipe,
    out: Path,
    world: World,
    on_record: Callable[[MetricRecord], None],
    should_stop: Callable[[], bool],
) -> RunResult:
    components = build_components(recipe, world)
    trainer = Trainer(components, out, on_record=on_record, should_stop=should_stop)
    trainer.resume()
    trainer.check_agreement()
    plot = None
    try:
        finished = trainer.fit()
    finally:
        if world.is_main:
            plot = plot_run(out)
    if finished:
        on_main(world, lambda: _save_result(components, out))
    return RunResult(finished, out, plot, trainer.step, trainer.tokens, components.packer.stats.summary)


def _save_result(components: Components, out: Path) -> None:
    """Write the trained model, and its adapter if it has one."""
    model, lora = components.model, components.recipe.train.lora is not None
    base, gated = components.recipe.model, components.model.config.gated_lora_rank is not None
    if gated:
        save_with_parent(list_checkpoints(out)[-1] / "model", resolve(base), out)
    elif components.skeleton is None:
        save_model(model, components.tokenizer, out)
    else:
        # Imported here: a run of one process needs none of it.
        from unmask.train.parallel.export import LayerReader

        checkpoint = list_checkpoints(out)[-1]
        # In seconds, whatever the size: the other ranks wait.
        copy_checkpoint(checkpoint / "model", out)
        if lora:
            model = LayerReader(checkpoint / SHARDS, components.skeleton).load_trained()
    if gated and (table := ngrams_path(base, resolve(base))) is not None:
        atomic_write(out / NGRAMS, bytes_writer(table.read_bytes()))  # the text is that of the model it began with
    if lora:
        save_adapter(model, out / ADAPTER, base=base)
        components.tokenizer.save(out / ADAPTER)


def holds_run(folder: Path) -> bool:
    """Whether a run was started in this folder, or has left its model there."""
    return bool(list_checkpoints(folder)) or (folder / "config.json").exists()


def build_components(recipe: Recipe, world: World | None = None) -> Components:
    """Load the model, give it a mask token, divide it over the ranks, open and split the data, build the objective."""
    train, world = recipe.train, world or World.single()
    device = device_of(train)
    compute_dtype = parse_dtype(train.compute_dtype, device)
    folder = resolve(recipe.model)
    tokenizer = load_tokenizer(tokenizer_folder(folder) or folder)
    weights_dtype = compute_dtype if world.size == 1 else torch.float32
    check_training_room(recipe, read_model_config(folder), weights_dtype, device, world, local_ranks())
    # Several ranks shard the master weights, and gather them in the compute dtype; each reads its shards once they are known.
    sharded_start = world.size > 1 and base_folder(folder) is None
    if sharded_start:
        model = open_parts(folder, dtype=torch.float32, device=device).model
    else:
        model = load_model(folder, dtype=weights_dtype, device=device)
    stored_config = model.config
    config = training_config(model.config, tokenizer, recipe)
    if config.vocab_size > model.config.vocab_size:
        resize_vocabulary(model, config.vocab_size)
    model.config = config
    reference = _reference(model, recipe)
    model = _gated_lora(model, train)
    if train.lora is not None:
        attach_lora(model, seed=train.seed, train_embedding=not train.freeze_embeddings, **train.lora.model_dump())
    elif train.freeze_embeddings:
        model.embed.requires_grad_(False)
        if model.lm_head is not None:
            model.lm_head.requires_grad_(False)
    model.activation_checkpointing = train.activation_checkpointing
    model.train()
    skeleton = None if world.size == 1 else skeleton_of(model, compute_dtype)
    router = _router(model, train, world)
    pipeline = parallelize(model, world, compute_dtype=compute_dtype)
    models = [(model, pipeline)]
    if reference is not None:
        if reference.model is not model:
            models.append((reference.model, parallelize(reference.model, world, compute_dtype=compute_dtype)))
        reference = replace(reference, pipeline=models[-1][1])
    if sharded_start:
        # Imported here: a run of one process needs none of it.
        from unmask.train.parallel.weights import load_shards

        for each, its_pipeline in models:
            load_shards(each, folder, stored_config, world, device, its_pipeline)
    if world.size == 1 and _compiles(train, device):
        # Imported here: most runs on a CPU do without.
        from unmask.train.fuse import fuse

        fuse(model)
    backend: AttentionBackend = "flex" if device.startswith("cuda") else "blocked"
    if train.attention != "auto":
        backend = train.attention
    objective = recipe.objective.build(Setting(model, train, backend, router, config.mask_id, reference, world, pipeline))
    packer, validation = training_rows(recipe, tokenizer), validation_rows(recipe, tokenizer)
    return Components(model, objective, router, packer, validation, recipe, tokenizer, skeleton)


def device_of(train: TrainSection) -> str:
    """The type of device that the run computes on."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if train.device == "auto" else train.device


def _compiles(train: TrainSection, device: str) -> bool:
    """Whether layers are compiled; raises ConfigError where the recipe asks for it and there is no C++ compiler."""
    # Of what is compiled, no single product could be kept.
    if train.compile is False or train.activation_checkpointing == "selective":
        return False
    if device.startswith("cuda"):
        return True
    if train.compile == "always" and not any(map(which, ("g++", "clang++", environ.get("CXX", "c++")))):
        raise ConfigError("train.compile is always, which takes a C++ compiler on a CPU; install g++, or leave it out")
    return train.compile == "always"


def _reference(model: Transformer, recipe: Recipe) -> ReferencePolicy | None:
    """The reference of an objective: a frozen copy; with LoRA the model itself, without its adapter."""
    if not recipe.objective.needs_reference:
        return None
    if recipe.train.lora is not None:
        return ReferencePolicy(model, lambda: adapters_off(model))
    return ReferencePolicy(deepcopy(model).requires_grad_(False).eval())


def _gated_lora(model: Transformer, train: TrainSection) -> Transformer:
    """Freeze all but the gated LoRA of a model that has one, or that the recipe gives one."""
    rank, targets = model.config.gated_lora_rank, train.gated_lora_targets
    if rank is None and train.gated_lora_rank is None:
        if targets is not None:
            raise ConfigError(
                f"train.gated_lora_targets is {targets}, but the model has no gated LoRA; set train.gated_lora_rank, or leave "
                "the targets out"
            )
        return model
    if train.gated_lora_rank is not None and rank is None:
        return train_gated_lora(add_gated_lora(model, train.gated_lora_rank, seed=train.seed), targets)
    if train.gated_lora_rank not in (None, rank) or train.lora is not None:
        raise ConfigError(
            f"the model has a gated LoRA of rank {rank}, which training continues; leave train.gated_lora_rank and lora out"
        )
    return train_gated_lora(model, targets)


def _router(model: Transformer, train: TrainSection, world: World) -> RouterMonitor | None:
    """The monitor of the routers of a mixture of experts; None for a dense model."""
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
    return RouterMonitor(
        model,
        policy,
        rate=train.router.rate,
        aux_weight=train.router.aux_weight,
        sum_over_ranks=lambda load_KLE: world.sum_tensor(load_KLE, "predictions", "pipeline"),
        expert_ranks=world.dims.expert,
    )
