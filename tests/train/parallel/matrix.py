"""The matrix of layouts: one optimiser step's losses, figures and gradients on several ranks, to compare with one process.

A case is a layout, an objective and what is trained; all in float64. Knows no layout in particular.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from processes import Pool
from tiny import MASK, Rows, pack, perturb, text, tiny_model
from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.diffusion.objectives import parent_divergence, token_nll, token_scores
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.adapter import adapters_off, attach_lora
from unmask.train.loop import accumulate, evaluate
from unmask.train.metrics import MetricRecord
from unmask.train.objectives.base import Objective, ReferencePolicy, Setting
from unmask.train.parallel.apply import parallelize
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.layouts import Layout, tensor_layouts
from unmask.train.parallel.world import World
from unmask.train.recipe import Recipe, parse_recipe
from unmask.train.router import RouterMonitor, RouterPolicy

OBJECTIVES: dict[str, dict[str, Any]] = {
    "denoise": {"kind": "denoise", "mask_noise_steps": 4},
    "cap": {"kind": "denoise", "mask_noise_steps": 0, "cap": {"weight": 0.7, "temperature": 0.8}},
    "joint": {"kind": "joint", "mask_noise_steps": 0},
    "joint_to_parent": {"kind": "joint", "mask_noise_steps": 0, "align": 2.0, "parent_kl": 0.5},
    "draft": {"kind": "draft", "mask_noise_steps": 0},
    "taught_draft": {"kind": "draft", "mask_noise_steps": 0, "kl": 0.5, "align": 2.0},
    "preference": {"kind": "preference", "mask_samples": 2},
    "next_token": {"kind": "next_token"},
}
START = 1
BATCH_ROWS = 8


@dataclass(frozen=True)
class Case:
    """A layout, an objective of `OBJECTIVES` and what is trained: "full", "lora" or "gated"; a mixture's router policy.

    `chunk`: how many predictions have logits at once.
    """

    dims: ParallelDims
    objective: str = "denoise"
    trained: str = "full"
    family: str = "llama"
    block_size: int | None = 4
    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    router: RouterPolicy | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        degrees = "-".join(f"{name}{value}" for name, value in vars(self.dims).items() if value not in (1, "1f1b"))
        chunk = "" if self.chunk is None else f"-chunks of {self.chunk}"
        return f"{degrees}-{self.objective}-{self.trained}-{self.family}-{self.block_size}-{self.router}{chunk}"


@dataclass(frozen=True)
class Result:
    """What one optimiser step and an evaluation give."""

    figures: MetricRecord
    held_out: MetricRecord
    gradients: dict[str, Tensor]
    router: dict[str, Tensor]


def cases(quick: Sequence[Case], slow: Sequence[Case]) -> list[Any]:
    """Parameters of a test of cases, some of which run only with the slow tests."""
    marked = [(case, ()) for case in quick] + [(case, pytest.mark.slow) for case in slow]
    return [pytest.param(case, marks=marks, id=str(case)) for case, marks in marked]


def assert_equals_one_process(pool: Pool, case: Case, tolerance: float = 1e-10) -> None:
    """Run the case on its ranks and on one process: losses, figures and gradients must agree."""
    expected = step(case, World.single())
    results = pool.run(case.dims.size, _step_of_rank, case)
    for found in results:
        for name, figure in (expected.figures | expected.held_out).items():
            assert abs((found.figures | found.held_out)[name] - figure) <= tolerance * max(1.0, abs(figure)), name
        assert all(torch.equal(found.router[name], tensor) for name, tensor in expected.router.items())
    assert {name for found in results for name in found.gradients} == expected.gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    assert scale > 0
    for found in results:
        for name, gradient in found.gradients.items():
            torch.testing.assert_close(gradient, expected.gradients[name], rtol=0, atol=tolerance * scale, msg=name)


def step(case: Case, world: World) -> Result:
    """One step of the case on the ranks of a world; gradients are whole on the main one, or on all that have one."""
    with _chunks(case.chunk):
        return _step(case, world)


@contextmanager
def _chunks(size: int | None) -> Iterator[None]:
    """Logits of so many predictions at once."""
    from unmask.train.parallel.vocabulary import parallel_nll, parallel_scores

    plain, parallel = "unmask.train.objectives.base", "unmask.train.parallel.vocabulary"
    joint, draft = "unmask.train.objectives.joint", "unmask.train.objectives.draft"
    with pytest.MonkeyPatch.context() as patch:
        for module, function in (
            (plain, token_nll),
            (plain, token_scores),
            (joint, parent_divergence),
            (draft, parent_divergence),
            (parallel, parallel_nll),
            (parallel, parallel_scores),
        ):
            if size is not None:
                patch.setattr(f"{module}.{function.__name__}", partial(function, chunk=size))
        yield


def _step(case: Case, world: World) -> Result:
    objective, rows = _objective(case, world), _rows(case)
    phase = Phase("decay", case.block_size, 1000)
    setting = objective.setting
    own = setting.share(rows.num_rows)
    if setting.router is not None:
        setting.router.begin_step(rows.num_tokens)
    figures = accumulate(objective, rows.rows(own.start, own.stop), phase, 0)
    if setting.router is not None:
        figures |= setting.router.end_step()
    model = setting.model
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    duplicates = frozenset() if setting.pipeline is None else setting.pipeline.duplicates
    figures["grad_norm"] = float(world.norm([gradient for name, gradient in gradients.items() if name not in duplicates]))
    layouts = tensor_layouts(model)
    whole = {
        name: layouts.get(name, Layout()).restore(world.full(gradient), world.dims.tensor)
        for name, gradient in gradients.items()
    }
    held_out = evaluate(objective, rows.rows(0, 6), phase)
    router = {} if setting.router is None else setting.router.state_tensors()
    return Result(figures, held_out, whole if world.is_main or setting.pipeline is not None else {}, router)


def _step_of_rank(case: Case) -> Result:
    from unmask.train.parallel.ranks import Ranks

    return step(case, Ranks(case.dims, "cpu"))


def _objective(case: Case, world: World) -> Objective:
    recipe = _recipe(case)
    autoregressive = recipe.objective.autoregressive
    shifted = case.objective in ("joint", "joint_to_parent", "draft", "taught_draft") or case.trained == "gated"
    diffusion = {} if autoregressive else {"mask_id": MASK, "start_id": START if shifted else None}
    model = tiny_model(case.family, 2, torch.float64, **(diffusion | case.model))
    reference = ReferencePolicy(deepcopy(model).requires_grad_(False))
    if case.trained == "gated":
        model = perturb(add_gated_lora(model, 2, seed=0))
    elif case.trained == "lora":
        attach_lora(
            model,
            rank=2,
            alpha=4.0,
            seed=0,
            train_embedding=not recipe.train.freeze_embeddings and case.objective != "preference",
        )
        perturb(model)
        lora: Transformer = model
        reference = ReferencePolicy(model, lambda: adapters_off(lora))
    model.activation_checkpointing = recipe.train.activation_checkpointing
    router = None if case.router is None else _router(model, case.router, world)
    pipeline = parallelize(model, world, compute_dtype=torch.float64)
    if recipe.objective.needs_reference:
        own = reference.model is model
        its_pipeline = pipeline if own else parallelize(reference.model, world, compute_dtype=torch.float64)
        reference = replace(reference, pipeline=its_pipeline)
    mask_id = None if autoregressive else MASK
    return recipe.objective.build(Setting(model, recipe.train, "blocked", router, mask_id, reference, world, pipeline))


def _router(model: Transformer, policy: RouterPolicy, world: World) -> RouterMonitor:
    """A monitor whose shares of the step before, which the auxiliary loss takes, are uneven."""

    def sum_over_ranks(load_KLE: Tensor) -> None:
        world.sum_tensor(load_KLE, "predictions", "pipeline")

    router = RouterMonitor(model, policy, rate=0.01, aux_weight=0.5, sum_over_ranks=sum_over_ranks)
    state = router.state_tensors()
    share_LE = state["router.share"]
    shares = torch.rand(share_LE.shape, generator=torch.Generator().manual_seed(0))
    router.load_state_tensors(state | {"router.share": shares / shares.sum(1, keepdim=True)})
    return router


def _recipe(case: Case) -> Recipe:
    values = {
        "model": "none",
        "decode_block_size": 4,
        "data": {"row_length": 16, "overlong": "truncate", "sources": [{"kind": "jsonl", "path": "none"}]},
        "objective": OBJECTIVES[case.objective],
        "train": {"tokens": 1000, "batch_rows": BATCH_ROWS, "micro_rows": 2, **case.train},
    }
    return parse_recipe(values, "test")


def _rows(case: Case) -> PackedRows:
    if case.objective == "preference":
        sides = [text(9 + (number + side) % 5, 2 * number + side, prompt=3) for number in range(4) for side in (0, 1)]
        rows = pack([[side] for side in sides], 16)
        rows.ordinal_RL.copy_(rows.ordinal_RL // 2)  # A pair shares its noise.
    else:
        # The last row is padding.
        docs = [[text(5 + number, 2 * number, prompt=2), text(8 - number // 2, 2 * number + 1)] for number in range(7)]
        rows = pack([*docs, []], 16)
    return PackedRows(**{name: getattr(rows, name) for name in Rows.__dataclass_fields__})
