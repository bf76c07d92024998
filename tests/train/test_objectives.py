"""SFT, CAP and DPO as the loop sees them: gradients against enumeration, whatever the split, the packing or the layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import refused
from scoring import score_stream
from tiny import MASK, Doc, Rows, pack, text, tiny_model
from unmask.data.packing import PackedRows
from unmask.diffusion.blocks import Phase
from unmask.diffusion.corrupt import CorruptionConfig, build_stream, noisy_copies
from unmask.diffusion.objectives import nelbo
from unmask.errors import ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer
from unmask.train.loop import accumulate, evaluate
from unmask.train.objectives.base import Objective, ReferencePolicy, Setting
from unmask.train.recipe import Recipe, parse_recipe

BLOCK = 4
PHASE = Phase("decay", BLOCK, 1000)


def recipe(micro_rows: int = 2, *, batch_rows: int = 4, kind: str = "denoise", **objective: Any) -> Recipe:
    if kind == "denoise":
        objective = {"mask_noise_steps": 0, **objective}
    values = {
        "model": "none",
        "decode_block_size": BLOCK,
        "data": {"row_length": 16, "overlong": "truncate", "sources": [{"kind": "jsonl", "path": "none"}]},
        "objective": {"kind": kind, **objective},
        "train": {"tokens": 1000, "batch_rows": batch_rows, "micro_rows": micro_rows},
    }
    return parse_recipe(values, "test")


def packed(rows: Rows) -> PackedRows:
    return PackedRows(**{name: getattr(rows, name) for name in Rows.__dataclass_fields__})


def build(model: Transformer, chosen: Recipe, backend: str = "dense", reference: ReferencePolicy | None = None) -> Objective:
    mask_id = None if chosen.objective.autoregressive else MASK
    setting = Setting(model, chosen.train, backend, mask_id=mask_id, reference=reference)  # type: ignore[arg-type]
    return chosen.objective.build(setting)


Gradients = dict[str, Tensor]


def gradients(model: Transformer, backward: Callable[[], Any]) -> Gradients:
    model.zero_grad()
    backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=tolerance * scale, rtol=0, msg=name)


DOCS = [[text(12, 0, prompt=3)], [text(5, 1, prompt=2), text(6, 2)], [text(16, 3, prompt=16)], [text(9, 4, prompt=7)]]


def enumerated_sft(model: Transformer, doc: Doc, low: float, high: float) -> Tensor:
    """`E_t E_S 1/2 [nll(S)/t + nll(S^c)/(1-t)]` per maskable token: every mask of every block, t integrated exactly."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    rates = [(low + (high - low) * (node + 1) / 2, weight / 2) for node, weight in zip(nodes, weights, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(doc.tokens), BLOCK):
        stop = min(start + BLOCK, len(doc.tokens))
        maskable = [i for i in range(start, stop) if doc.maskable[i]]
        for size in range(1, len(maskable) + 1):
            rest = len(maskable) - size
            half = sum(w * 0.5 * (t**size * (1 - t) ** rest / t + (1 - t) ** size * t**rest / (1 - t)) for t, w in rates)
            for masked in combinations(maskable, size):
                total = total + half * nll_of(model, doc.tokens[:stop], masked)
    return total / sum(doc.maskable)


def nll_of(model: Transformer, canvas: tuple[int, ...], masked: tuple[int, ...]) -> Tensor:
    block = torch.arange(len(canvas)) // BLOCK
    where, ids = torch.tensor(masked), torch.tensor(canvas)
    target = ids[where].clone()
    ids[where] = MASK
    mask = (block[:, None] >= block[None, :])[None]
    hidden = model(ids[None], torch.arange(len(canvas))[None], DenseAttend(mask))[0, where]
    logits = model.head(hidden)
    banned = torch.arange(logits.shape[-1]) == MASK
    return -logits.masked_fill(banned, float("-inf")).log_softmax(-1).gather(1, target[:, None]).sum()


@pytest.mark.parametrize(("bandwidth", "per_row"), [((0.3, 0.8), 1), ((0.0, 1.0), 1), ((0.0, 1.0), 4)])
def test_the_sft_gradient_is_that_of_the_enumerated_objective(bandwidth: tuple[float, float], per_row: int) -> None:
    """Thousands of pairs of masks over copies of a prompt with a response, `per_row` to a copy, through the real objective."""
    draws, model = 3000 // per_row, tiny_model("llama", 5, torch.float64, num_layers=1)
    doc = text(7, 0, prompt=2)
    exact = gradients(model, lambda: enumerated_sft(model, doc, *bandwidth).backward())
    one = pack([[doc]], 8)
    many = Rows(*(getattr(one, name).repeat(draws, 1) for name in Rows.__dataclass_fields__))
    many.ordinal_RL.copy_(torch.where(many.segment_RL > 0, torch.arange(draws)[:, None], 0))
    sampling = "bernoulli" if bandwidth == (0.3, 0.8) else "fixed_count"
    config = recipe(draws // 2, batch_rows=draws, bandwidth=bandwidth, sampling=sampling, mask_samples=per_row)
    objective = build(model, config)
    found = gradients(model, lambda: accumulate(objective, packed(many), PHASE, 0))
    difference = math.sqrt(sum(float((found[name] - exact[name]).square().sum()) for name in exact))
    size = math.sqrt(sum(float(gradient.square().sum()) for gradient in exact.values()))
    assert difference < 0.04 * size


@pytest.mark.parametrize("cap", [None, {"weight": 0.7, "temperature": 0.8}])
@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_neither_figures_nor_gradient_depend_on_the_split(cap: dict[str, float] | None, backend: str) -> None:
    model = tiny_model("llama", 2, torch.float64, mask_id=MASK)
    rows = packed(pack(DOCS, 16))
    results = []
    for micro_rows in (4, 1, 2):
        objective = build(model, recipe(micro_rows, cap=cap), backend)
        figures: dict[str, Any] = {}
        found = gradients(model, lambda: figures.update(accumulate(objective, rows, PHASE, 0)))  # noqa: B023
        results.append((figures | evaluate(objective, rows, PHASE), found))
    for figures, found in results[1:]:
        assert figures == pytest.approx(results[0][0], rel=1e-5)
        assert_same(found, results[0][1])
    assert ("correct_entropy" in results[0][0]) == (cap is not None)


def test_rows_without_the_document_mask_are_one_document_each() -> None:
    """Packed and joined, two texts train as their concatenation does; packed alone they do not."""
    first, second, alone = text(5, 1), text(6, 2), text(7, 3)
    both = Doc((*first.tokens, *second.tokens), (*first.maskable, *second.maskable), first.ordinal, first.epoch)
    model = tiny_model("llama", 3, torch.float64)
    objective = build(model, recipe(2, batch_rows=2))
    apart, whole = (packed(pack(docs, 16)) for docs in ([[first, second], [alone]], [[both], [alone]]))
    wanted = gradients(model, lambda: accumulate(objective, whole, PHASE, 0))
    assert_same(gradients(model, lambda: accumulate(objective, apart.joined(), PHASE, 0)), wanted)
    found = gradients(model, lambda: accumulate(objective, apart, PHASE, 0))
    assert any(not torch.allclose(found[name], wanted[name], rtol=1e-3) for name in wanted)


def one_by_one(model: Transformer, docs: list[Doc]) -> Tensor:
    """Mean cross-entropy of every learnt token after the first, each document alone and causal."""
    losses = []
    for doc in docs:
        ids, place = torch.tensor(doc.tokens)[None], torch.arange(len(doc.tokens))[None]
        causal = torch.ones(len(doc.tokens), len(doc.tokens), dtype=torch.bool).tril()[None]
        log_p = model.head(model(ids, place, DenseAttend(causal)))[0].log_softmax(-1)
        losses += [-log_p[i - 1, token] for i, token in enumerate(doc.tokens) if i and doc.maskable[i]]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("backend", ["dense", "blocked"])
@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_next_token_training_is_plain_causal_cross_entropy(micro_rows: int, backend: str) -> None:
    model = tiny_model("llama", 2, torch.float64)
    docs = [text(6, 0, prompt=2), text(5, 1), text(9, 2, prompt=5), text(4, 3), text(1, 4), text(7, 5, prompt=7)]
    rows = packed(pack([[docs[0], docs[1], docs[3]], [docs[2], docs[4]], [docs[5]], []], 16))
    objective = build(model, recipe(micro_rows, kind="next_token"), backend)
    figures: dict[str, Any] = {}
    found = gradients(model, lambda: figures.update(accumulate(objective, rows, PHASE, 0)))
    expected = gradients(model, lambda: one_by_one(model, docs).backward())
    assert_same(found, expected)
    assert figures == pytest.approx({"loss": float(one_by_one(model, docs).detach())}, rel=1e-6)
    assert evaluate(objective, rows, PHASE) == pytest.approx({"nelbo": figures["loss"]}, rel=1e-6)


@pytest.mark.parametrize("cap", [None, {"weight": 0.7}])
def test_neither_loss_nor_gradient_depends_on_the_packing(cap: dict[str, float] | None) -> None:
    model = tiny_model("llama", 2, torch.float64)
    docs = [text(6, 0, prompt=2), text(5, 1), text(9, 2, prompt=5), text(4, 3)]
    results = []
    for layout in (
        [[docs[0], docs[1], docs[3]], [docs[2]], [], []],
        [[doc] for doc in docs],
        [[docs[2], docs[0]], [docs[3], docs[1]], [], []],
    ):
        objective = build(model, recipe(cap=cap), "blocked")
        results.append(gradients(model, lambda: accumulate(objective, packed(pack(layout, 16)), PHASE, 0)))  # noqa: B023
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_a_pair_is_the_mean_of_its_halves_and_of_two_rows() -> None:
    """`[x_t | x_t' | x_0]` against `[x_t | x_0]` and `[x_t' | x_0]` apart."""
    model = tiny_model("llama", 2, torch.float64)
    rows, chosen = pack(DOCS, 16), recipe(4)
    corruption = CorruptionConfig(MASK, BLOCK, complementary=True, sampling="fixed_count")
    copies = noisy_copies(rows, corruption, chosen.train.seed)
    assert len(copies) == 2

    def half(copy: Any) -> Tensor:
        stream = build_stream(rows, [copy], corruption)
        return nelbo(score_stream(model, stream, MASK, "dense"), stream.weight_N) / int(rows.maskable_RL.sum())

    apart = gradients(model, lambda: ((half(copies[0]) + half(copies[1])) / 2).backward())
    expected = float((half(copies[0]) + half(copies[1])).detach() / 2)
    figures: dict[str, Any] = {}
    together = gradients(model, lambda: figures.update(accumulate(build(model, chosen), packed(rows), PHASE, 0)))
    assert figures["loss"] == pytest.approx(expected, rel=1e-6)
    assert_same(together, apart)


def test_cap_of_weight_zero_trains_as_without() -> None:
    model, rows = tiny_model("llama", 2, torch.float64), packed(pack(DOCS, 16))
    plain = gradients(model, lambda: accumulate(build(model, recipe()), rows, PHASE, 0))
    capped = build(model, recipe(cap={"weight": 0.0}))
    figures: dict[str, Any] = {}
    assert_same(gradients(model, lambda: figures.update(accumulate(capped, rows, PHASE, 0))), plain)
    assert 0 <= figures["accuracy"] <= 1
    assert 0 <= figures["confident_accuracy"] <= 1


def test_cap_adds_the_mean_entropy_of_right_predictions() -> None:
    model, rows = tiny_model("llama", 2, torch.float64), packed(pack(DOCS, 16))
    figures = [accumulate(build(model, recipe(cap={"weight": weight})), rows, PHASE, 0) for weight in (0.0, 3.0)]
    assert figures[0]["accuracy"] > 0
    assert figures[1]["loss"] - figures[0]["loss"] == pytest.approx(3 * figures[0]["correct_entropy"], rel=1e-5)


def pairs(count: int = 2) -> PackedRows:
    """Chosen and rejected by turns: a prompt of three tokens, responses of different lengths; both sides share their noise."""
    rows = []
    for i in range(count):
        prompt = text(3, 100 + i).tokens
        for side in range(2):
            tokens = prompt + text(5 + 3 * side, 200 + 2 * i + side).tokens
            rows.append([Doc(tokens, tuple(j >= 3 for j in range(len(tokens))), i)])
    return packed(pack(rows, 16))


def swapped(rows: PackedRows) -> PackedRows:
    order = [i ^ 1 for i in range(rows.num_rows)]
    return PackedRows(**{name: getattr(rows, name)[order] for name in Rows.__dataclass_fields__})


def dpo(model: Transformer, reference: Transformer, micro_rows: int = 4, **preference: Any) -> Objective:
    return build(model, recipe(micro_rows, kind="preference", **preference), reference=ReferencePolicy(reference))


def moved(model: Transformer, seed: int = 9, by: float = 0.02) -> Transformer:
    other, generator = deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return other


def test_dpo_at_equal_policy_and_reference_is_exactly_log_2() -> None:
    model = tiny_model("llama", 2, torch.float64)
    figures = accumulate(dpo(model, deepcopy(model)), pairs(), PHASE, 0)
    assert figures["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert figures["margin_variance"] == figures["reward_margin"] == 0.0
    assert figures["reward_accuracy"] == 0.5


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_response() -> None:
    model = tiny_model("llama", 2, torch.float64)
    reference, rows = deepcopy(model), pairs(1)
    gradient = gradients(model, lambda: accumulate(dpo(model, reference), rows, PHASE, 0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.003 * gradient[name]
    before, after = ([_nelbo(scored, rows, side) for side in range(2)] for scored in (reference, model))
    assert after[0] < before[0], "the chosen response became less likely"
    assert after[1] > before[1], "the rejected response became more likely"
    figures = accumulate(dpo(model, reference), rows, PHASE, 0)
    assert figures["reward_accuracy"] == 1.0
    assert figures["reward_margin"] > 0
    assert figures["loss"] < math.log(2)


@torch.no_grad()
def _nelbo(model: Transformer, rows: PackedRows, side: int) -> float:
    doc_tokens = tuple(rows.tokens_RL[side][rows.segment_RL[side] > 0].tolist())
    doc = Doc(doc_tokens, tuple(rows.maskable_RL[side][: len(doc_tokens)].tolist()), 0)
    return float(enumerated_sft(model, doc, 0.0, 1.0)) * sum(doc.maskable)


def test_swapping_chosen_and_rejected_flips_the_sign() -> None:
    """At equal policy and reference the gradient is `-beta/2 * d margin`: exactly odd."""
    model = tiny_model("llama", 2, torch.float64)
    reference = deepcopy(model)
    forward = gradients(model, lambda: accumulate(dpo(model, reference), pairs(), PHASE, 0))
    backward = gradients(model, lambda: accumulate(dpo(model, reference), swapped(pairs()), PHASE, 0))
    assert_same(forward, {name: -gradient for name, gradient in backward.items()})
    other = moved(model)
    margins = [accumulate(dpo(other, model), rows, PHASE, 0)["reward_margin"] for rows in (pairs(), swapped(pairs()))]
    assert margins[0] == pytest.approx(-margins[1], rel=1e-5)
    assert margins[0] != 0


def test_dpo_does_not_depend_on_the_split() -> None:
    model = tiny_model("llama", 2, torch.float64)
    policy, results = moved(model), []
    for micro_rows in (4, 2):
        figures: dict[str, Any] = {}
        objective = dpo(policy, model, micro_rows)
        results.append((gradients(policy, lambda: figures.update(accumulate(objective, pairs(), PHASE, 0))), figures))  # noqa: B023
    assert_same(results[1][0], results[0][0])
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)


def test_many_samples_estimate_the_exact_margin_with_less_variance() -> None:
    model = tiny_model("llama", 2, torch.float64, num_layers=1)
    policy, rows = moved(model), pairs(1)
    exact = [_nelbo(model, rows, side) - _nelbo(policy, rows, side) for side in range(2)]
    many = PackedRows(**{name: getattr(rows, name).repeat(16, 1) for name in Rows.__dataclass_fields__})
    epoch = torch.arange(32)[:, None] // 2
    passes = [replace(many, epoch_RL=(epoch + 16 * number).expand_as(many.epoch_RL).clone()) for number in range(16)]
    objective = dpo(policy, model, 32, batch_rows=32, mask_samples=16, beta=1.0)
    estimates = torch.tensor([evaluate(objective, each, PHASE)["reward_margin"] for each in passes])
    assert float(estimates.std()) / len(passes) ** 0.5 < 0.06
    assert float(estimates.mean()) == pytest.approx(exact[0] - exact[1], rel=0.1)
    of_few, of_many = (
        evaluate(dpo(policy, model, mask_samples=samples, beta=1.0), rows, PHASE)["margin_variance"] for samples in (2, 128)
    )
    assert of_many < of_few / 20
    assert "margin_variance" not in evaluate(dpo(policy, model, mask_samples=1), rows, PHASE)


def test_the_reference_is_asked_under_its_own_context() -> None:
    model, entered = tiny_model("llama", 2, torch.float64), []

    @contextmanager
    def as_reference() -> Iterator[None]:
        entered.append(torch.is_grad_enabled())
        yield

    chosen = recipe(4, kind="preference", mask_samples=2)
    accumulate(build(model, chosen, reference=ReferencePolicy(model, as_reference)), pairs(), PHASE, 0)
    assert entered == [False]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"micro_rows": 1}, "even"),
        ({"complementary": True}, "complementary"),
        ({"cap": {"weight": 1.0}}, "cap"),
        ({"mask_noise_steps": 5}, "mask_noise_steps"),
    ],
)
def test_a_preference_recipe_refuses_what_it_would_ignore(changes: dict[str, Any], name: str) -> None:
    with refused(ConfigError, name):
        recipe(**{"micro_rows": 4, "kind": "preference", **changes})
