"""Joint training as the loop sees it: the sum written by hand, its parts, and what it does not depend on."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import refused
from steps import BLOCK, PHASE, log_p, one_step, packed_rows, recipe_of
from tiny import MASK, Doc, Rows, text, tiny_model
from unmask.data.packing import PackedRows
from unmask.diffusion.corrupt import CorruptionConfig, noisy_copies
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Checkpointing, Transformer
from unmask.train.forward import layer_outputs
from unmask.train.loop import evaluate
from unmask.train.metrics import MetricRecord
from unmask.train.objectives.base import Objective, ReferencePolicy, Setting
from unmask.train.parallel.dims import ParallelDims
from unmask.train.parallel.world import World
from unmask.train.recipe import Recipe, parse_recipe

START, END = 1, 2
DECAY, LAMBDA, SHARE = 0.8, 0.4, 0.3


def ended(length: int, ordinal: int, *, prompt: int) -> Doc:
    """A document that is filled to a whole number of blocks with end tokens."""
    doc = text(length, ordinal, prompt=prompt)
    ids = tuple(START + 5 if token == END else token for token in doc.tokens)
    num_ends = 1 + -(length + 1) % BLOCK
    return replace(doc, tokens=ids + (END,) * num_ends, maskable=doc.maskable + (True,) * num_ends)


DOCS = [ended(10, 0, prompt=3), ended(5, 1, prompt=2), ended(13, 2, prompt=6), ended(6, 3, prompt=6)]


def rows() -> PackedRows:
    return packed_rows([[DOCS[0]], [DOCS[1], DOCS[3]], [DOCS[2]], []])


def recipe(micro_rows: int = 4, **objective: Any) -> Recipe:
    values = {"kind": "joint", "decay": DECAY, "diffusion_weight": LAMBDA, **objective}
    return recipe_of(values, batch_rows=4, micro_rows=micro_rows)


def tiny(**changes: Any) -> Transformer:
    return tiny_model("llama", 2, torch.float64, mask_id=MASK, start_id=START, eos_ids=(END,), **changes)


def build(model: Transformer, chosen: Recipe, backend: str = "dense", world: World | None = None) -> Objective:
    parent = ReferencePolicy(deepcopy(tiny()).requires_grad_(False))
    setting = Setting(model, chosen.train, backend, None, MASK, parent, world or World.single())  # type: ignore[arg-type]
    return chosen.objective.build(setting)


def step(model: Transformer, chosen: Recipe, backend: str = "dense") -> tuple[MetricRecord, dict[str, Tensor]]:
    return one_step(model, build(model, chosen, backend), rows())


def hidden(model: Transformer, doc: Doc, masked: Sequence[int], start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
    """States [stop, D] of a document up to `stop`, causal before `start`; and behind each layer."""
    canvas = [START, *(MASK if p in masked else token for p, token in enumerate(doc.tokens))][:stop]
    allowed = torch.ones(stop, stop, dtype=torch.bool)
    allowed[:start] = allowed.tril()[:start]
    with layer_outputs(model) as outputs:
        last = model(torch.tensor(canvas)[None], torch.arange(stop)[None], DenseAttend(allowed[None]))[0]
    return last, [output[0] for output in outputs]


def learnt(doc: Doc) -> list[int]:
    """What is learnt of it but for the tokens that fill its last block."""
    end = doc.tokens.index(END)
    return [p for p, maskable in enumerate(doc.maskable) if maskable and p <= end]


class ByHand:
    """The terms of the loss, document by document and block by block, every one in a forward pass of its own."""

    def __init__(self, model: Transformer) -> None:
        self.parts: dict[str, list[Tensor]] = {name: [] for name in ("ar", "draft", "denoise", "align", "kl")}
        self.num_drafts, self.model, self.parent = 0.0, model, tiny()
        config = CorruptionConfig(MASK, BLOCK, complementary=True, sampling="fixed_count", start_id=START)
        packed = rows()
        for (_, ordinal), at, row in Rows(**vars(packed)).places():
            doc = next(doc for doc in DOCS if doc.ordinal == ordinal)
            self._clean(doc)
            self._drafts(doc)
            for copy in noisy_copies(packed, config, 0):
                self._denoise(doc, copy.masked_RL[row, at].tolist(), copy.weight_RL[row, at].tolist())

    def terms(self) -> dict[str, Tensor]:
        num_masked = 2 * sum(sum(doc.maskable) for doc in DOCS)
        counts = {"draft": self.num_drafts, "denoise": num_masked}
        return {name: torch.stack(part).sum() / counts.get(name, len(part)) for name, part in self.parts.items()}

    def _clean(self, doc: Doc) -> None:
        self.clean, self.clean_layers = hidden(self.model, doc, (), len(doc.tokens), len(doc.tokens))
        theirs = log_p(self.parent, hidden(self.parent, doc, (), len(doc.tokens), len(doc.tokens))[0]).detach()
        for p in learnt(doc):
            ours = log_p(self.model, self.clean[p])
            self.parts["ar"].append(-ours[doc.tokens[p]])
            self.parts["kl"].append((theirs[p].exp() * (theirs[p] - ours).nan_to_num(0)).sum())

    def _drafts(self, doc: Doc) -> None:
        places = learnt(doc)
        for first in places[::BLOCK]:
            block = [p for p in places if first < p < first + BLOCK]
            weights = [DECAY**i for i in range(len(block))]
            self.num_drafts += sum(weights)
            if block:  # the first token is the last verify token's, and no draft has seen it
                self._predict("draft", doc, block, range(first, block[-1]), first + 1, weights)

    def _denoise(self, doc: Doc, masked: list[bool], weights: list[float]) -> None:
        for start in range(0, len(doc.tokens), BLOCK):
            places = [p for p in range(start, start + BLOCK) if masked[p]]
            if places:
                self._predict("denoise", doc, places, places, start, [weights[p] for p in places])

    def _predict(self, name: str, doc: Doc, places: list[int], masked: Sequence[int], start: int, weights: list[float]) -> None:
        stop = places[-1] + 1 if name == "draft" else start + BLOCK
        last, layers = hidden(self.model, doc, masked, start, stop)
        for p, weight in zip(places, weights, strict=True):
            self.parts[name].append(-weight * log_p(self.model, last[p])[doc.tokens[p]])
            cosines = [
                torch.cosine_similarity(noisy[p], clean[p].detach(), dim=0)
                for noisy, clean in zip(layers, self.clean_layers, strict=True)
            ]
            self.parts["align"].append(1 - torch.stack(cosines).mean())


def test_the_loss_is_the_sum_written_by_hand() -> None:
    """All five terms and the gradient of the whole, in float64."""
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    terms = ByHand(model).terms()
    weights = {"ar": 1.0, "draft": LAMBDA * SHARE, "denoise": LAMBDA * (1 - SHARE), "align": 2.0, "kl": 0.7}
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    model.zero_grad()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    figures, found = step(model, recipe(draft_share=SHARE, align=2.0, parent_kl=0.7))
    assert figures == pytest.approx(
        {**{name: float(term.detach()) for name, term in terms.items()}, "loss": float(loss.detach()), "mask_noise": 0}
    )
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6 * float(gradient.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_nothing_depends_on_the_split(backend: str) -> None:
    model, results = tiny(), []
    for micro_rows in (4, 1, 2):
        chosen = recipe(micro_rows, align=2.0, parent_kl=0.5, cuts=2, mask_samples=2)
        figures, gradient = step(model, chosen, backend)
        results.append((figures | evaluate(build(model, chosen, backend), rows(), PHASE), gradient))
    for figures, gradient in results[1:]:
        assert figures == pytest.approx(results[0][0], rel=1e-6)
        for name, expected in results[0][1].items():
            torch.testing.assert_close(gradient[name], expected, rtol=0, atol=1e-6 * float(expected.abs().max()), msg=name)


def test_the_weight_of_the_diffusion_loss_scales_its_gradient() -> None:
    """With lambda 0 nothing but the next token is learnt."""
    model = tiny()
    plain, once, twice = (step(model, recipe(diffusion_weight=weight)) for weight in (0.0, 0.2, 0.4))
    assert plain[0].keys() == {"loss", "ar", "mask_noise"}
    assert plain[0]["loss"] == pytest.approx(plain[0]["ar"])
    for name, gradient in plain[1].items():
        by_one, by_two = once[1][name] - gradient, twice[1][name] - gradient
        torch.testing.assert_close(by_two, 2 * by_one, atol=1e-6 * float(by_two.abs().max()), rtol=0, msg=name)
    alone = [step(model, recipe(draft_share=share))[0] for share in (0, 1)]
    assert [figures.keys() - plain[0].keys() for figures in alone] == [{"denoise"}, {"draft"}]


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_activation_checkpointing_changes_nothing(checkpointing: Checkpointing) -> None:
    model, chosen = tiny(), recipe(align=2.0, parent_kl=0.5)
    figures, expected = step(model, chosen)
    model.activation_checkpointing = checkpointing
    again, found = step(model, chosen)
    assert again == pytest.approx(figures)
    assert all(torch.allclose(found[name], gradient) for name, gradient in expected.items())


def test_held_out_figures() -> None:
    """Of all three ways of decoding; end tokens that fill a block count for denoising alone."""
    model = tiny()
    held_out = evaluate(build(model, recipe()), rows(), PHASE)
    assert {"ar_nll", "accepted_length", "draft_nll", "nelbo", "ce_t100"} <= held_out.keys()
    assert held_out["ar_nll"] == pytest.approx(float(ByHand(model).terms()["ar"].detach()))
    assert 0 <= held_out["accepted_length"] <= BLOCK - 1


@pytest.mark.parametrize(
    ("objective", "train", "names"),
    [
        ({}, {"gated_lora_rank": 2}, ("train.gated_lora_rank",)),
        ({"parent_kl": 1.0}, {"lora": {"rank": 2}}, ("objective.parent_kl", "train.freeze_embeddings")),
        ({"draft_share": 1.5}, {}, ("objective.draft_share",)),
    ],
)
def test_recipes_that_contradict_themselves(objective: dict[str, Any], train: dict[str, Any], names: tuple[str, ...]) -> None:
    values = recipe().model_dump(mode="json")
    with refused(ConfigError, *names):
        parse_recipe(values | {"objective": values["objective"] | objective, "train": values["train"] | train}, "test")


def test_drafts_take_blocks() -> None:
    values = recipe().model_dump(mode="json") | {"schedule": {"stable": 1.0}}
    with refused(ConfigError, "objective.draft_share", 0.5):
        parse_recipe(values, "test")
    parse_recipe(values | {"objective": values["objective"] | {"draft_share": 0}}, "test")


@pytest.mark.parametrize("name", ["align", "parent_kl"])
def test_what_cannot_be_divided_is_refused(name: str) -> None:
    world = World.single()
    world.dims = ParallelDims(context=2)
    with refused(ConfigError, f"objective.{name}", "parallel.context"):
        build(tiny(), recipe(**{name: 1.0}), world=world)
