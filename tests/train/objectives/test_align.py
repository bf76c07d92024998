"""Denoising aligned with the frozen parent: the sum written by hand, what it does not depend on, what it does not go with."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import refused
from steps import BLOCK, PHASE, one_step, packed_rows, recipe_of
from tiny import MASK, Doc, text, tiny_model
from unmask.data.packing import PackedRows
from unmask.diffusion.corrupt import corrupt
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.arch.transformer import Transformer
from unmask.train.forward import layer_outputs
from unmask.train.objectives.base import Objective, ReferencePolicy, Setting
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.world import World
from unmask.train.recipe import Recipe

WEIGHT, START = 2.0, 1
DOCS = [text(12, 0, prompt=3), text(8, 1, prompt=2), text(8, 2, prompt=0), text(4, 3, prompt=0)]
"""The last two predict their first token, which the parent does not."""


def rows() -> PackedRows:
    return packed_rows([[DOCS[0], DOCS[3]], [DOCS[1], DOCS[2]], []])


def recipe(micro_rows: int = 3, train: dict[str, Any] | None = None, **objective: Any) -> Recipe:
    values = {"kind": "denoise", "align": WEIGHT, **objective}
    return recipe_of(values, batch_rows=3, micro_rows=micro_rows, **(train or {}))


def parent() -> Transformer:
    return tiny_model("llama", 2, torch.float64, mask_id=MASK)


def child(**changes: Any) -> Transformer:
    model = tiny_model("llama", 2, torch.float64, mask_id=MASK, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return model


def build(model: Transformer, chosen: Recipe, backend: str = "dense", world: World | None = None) -> Objective:
    policy = ReferencePolicy(deepcopy(parent()).requires_grad_(False))
    setting = Setting(model, chosen.train, backend, None, MASK, policy, world or World.single())  # type: ignore[arg-type]
    return chosen.objective.build(setting)


def step(model: Transformer, chosen: Recipe, backend: str = "dense") -> tuple[dict[str, Any], dict[str, Tensor]]:
    return one_step(model, build(model, chosen, backend), rows())


def states(model: Transformer, ids: list[int], allowed: Tensor) -> list[Tensor]:
    with layer_outputs(model) as outputs:
        model(torch.tensor(ids)[None], torch.arange(len(ids))[None], DenseAttend(allowed[None]))
    return [output[0] for output in outputs]


def by_hand(model: Transformer, chosen: Recipe, start_id: int | None) -> Tensor:
    """The alignment term, document by document and block by block, every one in a forward pass of its own."""
    stream = corrupt(rows(), chosen.objective.corruption(  # type: ignore[union-attr]
        build(model, chosen).setting, PHASE, complementary=True), chosen.train.seed)  # fmt: skip
    where = zip(stream.index.document_BT[stream.predict].tolist(), stream.predict[0].tolist(), strict=True)
    packed, masked = [[DOCS[0], DOCS[3]], [DOCS[1], DOCS[2]], []], dict[tuple[int, int, int, int], list[int]]()
    for (document, row), position, copy in zip(
        where, stream.position_BT[stream.predict].tolist(), stream.copy_N.tolist(), strict=True
    ):
        masked.setdefault((row, document - 1, copy, position // BLOCK), []).append(position)
    parts: list[Tensor] = []
    for (row, number, _, block), places in masked.items():
        doc: Doc = packed[row][number]
        stop, tokens = (block + 1) * BLOCK, list(doc.tokens)
        causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
        theirs = states(parent(), tokens, causal)
        noisy = [MASK if p in places else token for p, token in enumerate(tokens)][:stop]
        position = torch.arange(stop)
        if start_id is None:
            allowed = position[None, :] // BLOCK <= position[:, None] // BLOCK
        else:
            noisy = [start_id, *noisy[:-1]]
            allowed = (position[None, :] <= position[:, None]) | (position[:, None] // BLOCK == block)
            # The token before a block is clean, and the blocks before are, too.
        ours = states(model, noisy, allowed)
        for p in places:
            if p > 0:
                cosines = [torch.cosine_similarity(x[p], y[p - 1].detach(), dim=0) for x, y in zip(ours, theirs, strict=True)]
                parts.append(1 - torch.stack(cosines).mean())
    return torch.stack(parts).mean()


@pytest.mark.parametrize("start_id", [None, START])
def test_the_term_is_what_is_computed_by_hand(start_id: int | None) -> None:
    """Value and gradient, of models that are not shifted and that are."""
    model, chosen = child(start_id=start_id), recipe(complementary=True)
    figures, with_it = step(model, chosen)
    plain_figures, without = step(model, recipe(complementary=True, align=0.0))
    model.zero_grad()
    term = by_hand(model, chosen, start_id)
    term.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert figures["align"] == pytest.approx(float(term.detach()))
    assert figures["loss"] == pytest.approx(plain_figures["loss"] + WEIGHT * float(term.detach()))
    for name, gradient in expected.items():
        scale = float(with_it[name].abs().max())
        torch.testing.assert_close(with_it[name] - without[name], WEIGHT * gradient, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
@pytest.mark.parametrize("cap", [None, {"weight": 1.0}])
def test_nothing_depends_on_the_split(backend: str, cap: dict[str, float] | None) -> None:
    model = child()
    first, *others = (step(model, recipe(micro_rows, cap=cap), backend) for micro_rows in (3, 1))
    for figures, gradient in others:
        assert figures == pytest.approx(first[0], rel=1e-6)
        for name, expected in first[1].items():
            torch.testing.assert_close(gradient[name], expected, rtol=0, atol=1e-6 * float(expected.abs().max()), msg=name)


def test_what_it_does_not_go_with_is_refused() -> None:
    with refused(ConfigError, "train.gated_lora_rank", "objective.align"):
        checked(train={"gated_lora_rank": 2})
    with refused(ConfigError, "train.freeze_embeddings", "objective.align"):
        checked(train={"lora": {"rank": 2}})
    checked(train={"lora": {"rank": 2}, "freeze_embeddings": True})
    gated = add_gated_lora(tiny_model("llama", 2, mask_id=MASK, start_id=START), 2, seed=0)
    with refused(ConfigError, "objective.align"):
        build(gated, recipe())
    with refused(ConfigError, "objective.align", "parallel.tensor"):
        recipe().objective.check_dims(ParallelDims(tensor=2))


def checked(**changes: Any) -> None:
    chosen = recipe(**changes)
    chosen.objective.check(chosen.data, chosen.train, chosen.blocks)
