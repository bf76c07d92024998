"""Drafts that learn from the tokens that verify them: the sum written by hand, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import refused
from steps import BLOCK, PHASE, log_p, one_step, packed_rows, recipe_of
from tiny import MASK, Doc, perturb, text, tiny_model
from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.diffusion.corrupt import Stream
from unmask.diffusion.objectives import TokenScores
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.gated_lora import add_gated_lora, is_gated_lora
from unmask.models.arch.transformer import Checkpointing, Transformer
from unmask.train.forward import layer_outputs
from unmask.train.loop import evaluate
from unmask.train.metrics import MetricRecord
from unmask.train.objectives.base import Objective, Setting, WeightedNll
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.world import World
from unmask.train.recipe import Recipe

START, DECAY = 1, 0.8
DOCS = [text(10, 0, prompt=3), text(5, 1, prompt=2), text(13, 2, prompt=6), text(6, 3, prompt=6)]
KINDS = {"gated": 3, "full": None}


def rows() -> PackedRows:
    return packed_rows([[DOCS[0], DOCS[1]], [DOCS[3]], [DOCS[2]], []])


def recipe(micro_rows: int = 4, **objective: Any) -> Recipe:
    values = {"kind": "draft", "cuts": 1, "decay": DECAY, **objective}
    return recipe_of(values, batch_rows=4, micro_rows=micro_rows)


def tiny(rank: int | None) -> Transformer:
    model = tiny_model("llama", 2, torch.float64, mask_id=MASK, start_id=START)
    return model if rank is None else perturb(add_gated_lora(model, rank, seed=0))


def build(model: Transformer, chosen: Recipe, backend: str = "dense", world: World | None = None) -> Objective:
    setting = Setting(model, chosen.train, backend, mask_id=MASK, world=world or World.single())  # type: ignore[arg-type]
    return chosen.objective.build(setting)


def step(model: Transformer, chosen: Recipe, backend: str = "dense") -> tuple[MetricRecord, dict[str, Tensor]]:
    return one_step(model, build(model, chosen, backend), rows())


def states(model: Transformer, doc: Doc, first: int, stop: int) -> list[Tensor]:
    """States behind each layer, and the last, of a document up to `stop`: causal up to `first`, all masks behind it."""
    canvas = [START, *doc.tokens[:first], *[MASK] * (stop - first - 1)]
    allowed = torch.ones(stop, stop, dtype=torch.bool)
    allowed[: first + 1] = allowed.tril()[: first + 1]
    noisy = None if model.config.gated_lora_rank is None else (torch.arange(stop) > first)[None]
    with layer_outputs(model) as outputs:
        last = model(torch.tensor(canvas)[None], torch.arange(stop)[None], DenseAttend(allowed[None]), noisy_BT=noisy)
    return [output[0] for output in (*outputs, last)]


def by_hand(model: Transformer) -> dict[str, Tensor]:
    """The terms of the loss, block by block, every one in a forward pass of its own; teachers without a gradient."""
    parts: dict[str, list[Tensor]] = {"draft": [], "kl": [], "align": []}
    total = 0.0
    for doc in DOCS:
        learnt = [p for p, maskable in enumerate(doc.maskable) if maskable]
        with torch.no_grad():
            verify = states(model, doc, len(doc.tokens) - 1, len(doc.tokens))
        for first in learnt[::BLOCK]:
            stop = min(first + BLOCK, len(doc.tokens))
            draft = states(model, doc, first, stop)
            for p in range(first + 1, stop):
                weight = DECAY ** (p - first - 1)
                total += weight
                ours, theirs = log_p(model, draft[-1][p]), log_p(model, verify[-1][p]).detach()
                parts["draft"].append(-weight * ours[doc.tokens[p]])
                parts["kl"].append(weight * (theirs.exp() * (theirs - ours).nan_to_num(0)).sum())
                cosines = [torch.cosine_similarity(a[p], b[p], dim=0) for a, b in zip(draft[:-1], verify[:-1], strict=True)]
                parts["align"].append(1 - torch.stack(cosines).mean())
    counts = {"draft": total, "kl": total, "align": len(parts["align"])}
    return {name: torch.stack(part).sum() / counts[name] for name, part in parts.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", [(1.0, 0.7, 2.0), (0.0, 1.0, 0.0), (0.5, 0.0, 1.0)])
def test_the_loss_is_the_sum_written_by_hand(kind: str, weights: tuple[float, float, float]) -> None:
    """Its terms and their gradient, in float64; of gated LoRA nothing else has one."""
    model = tiny(KINDS[kind])
    terms = {name: (weight, term) for weight, (name, term) in zip(weights, by_hand(model).items(), strict=True) if weight}
    loss = torch.stack([weight * term for weight, term in terms.values()]).sum()
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    nll, kl, align = weights
    figures, found = step(model, recipe(nll=nll, kl=kl, align=align))
    means = {name: float(term.detach()) for name, (_, term) in terms.items()}
    assert figures == pytest.approx({**means, "loss": float(loss.detach())})
    assert found.keys() == expected.keys()
    assert kind == "full" or all(map(is_gated_lora, found))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6 * float(gradient.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_nothing_depends_on_the_split(kind: str, backend: str) -> None:
    model = tiny(KINDS[kind])
    whole, single = (step(model, recipe(micro_rows, kl=0.5, align=2.0, cuts=2), backend) for micro_rows in (4, 1))
    assert single[0] == pytest.approx(whole[0], rel=1e-6)
    for name, expected in whole[1].items():
        torch.testing.assert_close(single[1][name], expected, rtol=0, atol=1e-6 * float(expected.abs().max()), msg=name)


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_activation_checkpointing_changes_nothing(checkpointing: Checkpointing) -> None:
    model, chosen = tiny(3), recipe(kl=0.5, align=2.0)
    figures, expected = step(model, chosen)
    model.activation_checkpointing = checkpointing
    again, found = step(model, chosen)
    assert again == pytest.approx(figures)
    assert all(torch.allclose(found[name], gradient) for name, gradient in expected.items())


def test_without_a_teacher_nothing_is_paid_for_one() -> None:
    """The likelihood alone is that of a stream whose clean copy ends where drafts stop reading it."""
    model = tiny(3)
    batch = build(model, recipe()).prepare(rows(), PHASE, 0)
    assert isinstance(batch, WeightedNll)
    taught = build(model, recipe(kl=1.0)).prepare(rows(), PHASE, 0)
    assert batch.stream.tokens_BT.shape[1] < taught.stream.tokens_BT.shape[1]  # type: ignore[attr-defined]
    alone, beside = step(model, recipe())[0], step(model, recipe(kl=1.0))[0]
    assert alone["loss"] == pytest.approx(beside["draft"])


def test_held_out_drafts_are_counted_up_to_three_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_right(_: Setting, stream: Stream) -> TokenScores:
        count = len(stream.target_N)
        return TokenScores(torch.zeros(count), torch.zeros(count), torch.ones(count, dtype=torch.bool), torch.ones(count))

    monkeypatch.setattr(Setting, "scores", all_right)
    found = evaluate(build(tiny(3), recipe()), rows(), Phase("decay", 8, 1000))
    assert found["accepted_length"] == pytest.approx((6 + 2 + 6) / 3)  # a block for each answer: all behind its first token
    assert found["accepted_of_3"] == pytest.approx((3 + 2 + 3) / 3)


@pytest.mark.parametrize("objective", [{"nll": 0}, {"nll": 2.0}, {"nll": -1, "kl": 1}, {"kl": -1}, {"align": -1}])
def test_weights_that_mean_nothing_are_refused(objective: dict[str, float]) -> None:
    with refused(ConfigError, f"objective.{next(iter(objective))}"):
        recipe(**objective)


@pytest.mark.parametrize("key", ["kl", "align"])
@pytest.mark.parametrize("dimension", ["tensor", "context", "pipeline"])
def test_ranks_that_have_parts_of_models_or_rows_are_refused(key: str, dimension: str) -> None:
    with refused(ConfigError, f"objective.{key}", f"parallel.{dimension}"):
        recipe(**{key: 1.0}).objective.check_dims(ParallelDims(**{dimension: 2}))
