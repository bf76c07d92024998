"""Router policies: who moves what, and the loads by kind of token."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tiny import MASK, Rows, pack, text, tiny_model
from unmask.diffusion.corrupt import CorruptionConfig, Stream, corrupt
from unmask.diffusion.objectives import nelbo, token_nll
from unmask.models.arch.moe import MoE, route
from unmask.models.arch.transformer import Transformer
from unmask.train.forward import predicted_hidden
from unmask.train.router import RouterMonitor, RouterPolicy

EXPERTS, ACTIVE, LAYERS = 8, 2, 2


def rows() -> Rows:
    return pack([[text(9, 0, prompt=3)], [text(6, 1), text(4, 2)], [text(5, 3, prompt=1)], []], 12)


def layers(model: Transformer) -> list[MoE]:
    return [block.mlp for block in model.blocks if isinstance(block.mlp, MoE)]


def monitored(policy: RouterPolicy, **settings: float) -> tuple[Transformer, RouterMonitor]:
    model = tiny_model("llada2", 3, mask_id=MASK)
    return model, RouterMonitor(model, policy, **{"rate": 0.01, "aux_weight": 0.5, **settings})


def step(model: Transformer, monitor: RouterMonitor, bounds: tuple[int, ...] = (0, 4)) -> dict[str, float]:
    """One batch in micro-batches `bounds[i]:bounds[i + 1]`, gradients left in place."""
    batch = rows()
    monitor.begin_step(int((batch.segment_RL > 0).sum()))
    for start, stop in pairwise(bounds):
        stream = corrupt(batch.rows(start, stop), CorruptionConfig(MASK, 4, complementary=True), 0)
        hidden = predicted_hidden(model, stream, "dense", router=monitor)
        (nelbo(token_nll(model.head, hidden, stream.target_N, MASK), stream.weight_N) / 40).backward()
    return monitor.end_step()


def reference_loads(model: Transformer, stream: Stream) -> Tensor:
    """[masked/visible, layer, expert], from the inputs of every routed layer."""
    masked = torch.zeros_like(stream.tokens_BT, dtype=torch.bool)
    masked[stream.predict] = True
    kinds = [masked, ~masked & (stream.index.document_BT > 0)]
    loads = torch.zeros(2, LAYERS, EXPERTS)

    def hook(number: int):  # type: ignore[no-untyped-def]
        def count(moe: MoE, inputs: tuple[Tensor]) -> None:
            _, chosen = route(moe.router_logits(inputs[0].flatten(0, 1)), moe.expert_bias, moe.moe)
            for kind, at in enumerate(kinds):
                for expert in chosen[at.flatten()].flatten().tolist():
                    loads[kind, number, expert] += 1

        return count

    handles = [moe.register_forward_pre_hook(hook(number)) for number, moe in enumerate(layers(model))]
    predicted_hidden(model, stream, "dense")
    for handle in handles:
        handle.remove()
    return loads


def test_loads_are_counted_by_kind_and_without_padding() -> None:
    model, monitor = monitored("frozen")
    expected = reference_loads(model, corrupt(rows(), CorruptionConfig(MASK, 4, complementary=True), 0))
    figures = step(model, monitor)
    for kind, name in enumerate(("masked", "visible")):
        busiest = (expected[kind].amax(1) / expected[kind].mean(1)).max()
        assert figures[f"load_{name}"] == pytest.approx(float(busiest))
        assert figures[f"idle_{name}"] == pytest.approx(float((expected[kind] == 0).float().mean()))
    assert figures["load_masked"] != figures["load_visible"]


def test_the_load_of_ranks_is_that_of_their_experts() -> None:
    model = tiny_model("llada2", 3, mask_id=MASK)
    monitor = RouterMonitor(model, "frozen", rate=0.01, aux_weight=0.5, expert_ranks=2)
    load_LR = reference_loads(model, corrupt(rows(), CorruptionConfig(MASK, 4, complementary=True), 0)).sum(0).view(2, 2, -1)
    share_LR = load_LR.sum(2) / load_LR.sum((1, 2))[:, None]
    assert step(model, monitor)["load_rank"] == pytest.approx(float(2 * share_LR.max()))


@pytest.mark.parametrize("policy", ["frozen", "bias", "aux"])
def test_what_each_policy_moves(policy: RouterPolicy) -> None:
    model, monitor = monitored(policy)
    before = [moe.expert_bias.clone() for moe in layers(model)]
    step(model, monitor)
    for moe, bias in zip(layers(model), before, strict=True):
        assert (moe.router.grad is not None and bool(moe.router.grad.any())) == (policy != "frozen")
        assert torch.equal(moe.expert_bias, bias) == (policy != "bias")
        assert moe.gate_up.grad is not None
        assert moe.gate_up.grad.any()
    assert not any(moe.expert_bias.requires_grad for moe in layers(model))


def test_the_bias_moves_by_the_rate_against_the_load_error() -> None:
    model, monitor = monitored("bias", rate=0.01)
    stream = corrupt(rows(), CorruptionConfig(MASK, 4, complementary=True), 0)
    load = reference_loads(model, stream).sum(0)
    before = torch.stack([moe.expert_bias.clone() for moe in layers(model)])
    step(model, monitor)
    moved = torch.stack([moe.expert_bias for moe in layers(model)]) - before
    torch.testing.assert_close(moved, 0.01 * (load.mean(1, keepdim=True) - load).sign())


def test_the_bias_policy_balances() -> None:
    model, monitor = monitored("bias", rate=0.02)
    with torch.no_grad():
        layers(model)[0].expert_bias[:2] += 1.0  # two experts get everything
    first = step(model, monitor)["load_visible"]
    for _ in range(80):
        model.zero_grad()
        last = step(model, monitor)["load_visible"]
    assert first > 3.5
    assert last < 2.6


def test_no_policy_depends_on_the_split_of_the_batch() -> None:
    """The auxiliary loss uses the step before, so a second step tells."""
    results = []
    for bounds in ((0, 4), (0, 1, 2, 3, 4)):
        model, monitor = monitored("aux")
        step(model, monitor)
        model.zero_grad()
        figures = step(model, monitor, bounds)
        results.append((figures, [moe.router.grad for moe in layers(model)]))
    assert results[0][0] == results[1][0]
    for whole, split in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(whole, split, atol=1e-5, rtol=1e-4)


def test_the_auxiliary_loss_is_that_of_the_formula() -> None:
    """Its gradient is the difference between weights 0.5 and 0; here against the formula under autograd."""
    gradients = []
    for weight in (0.5, 1e-12):
        model, monitor = monitored("aux", aux_weight=weight)
        step(model, monitor)
        model.zero_grad()
        share = monitor.state_tensors()["router.share"].clone()
        step(model, monitor)
        gradients.append(layers(model)[-1].router.grad)
    model, _ = monitored("frozen")
    stream = corrupt(rows(), CorruptionConfig(MASK, 4, complementary=True), 0)
    seen: list[Tensor] = []
    last = layers(model)[-1]
    last.router.requires_grad_(True)
    last.register_forward_pre_hook(lambda moe, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    with torch.no_grad():
        predicted_hidden(model, stream, "dense")
    scores = torch.sigmoid(seen[0][stream.index.document_BT.flatten() > 0] @ last.router.T)
    mean = (scores / scores.sum(1, keepdim=True)).sum(0) / int((rows().segment_RL > 0).sum())
    (0.5 * EXPERTS * (share[-1] * mean).sum()).backward()
    torch.testing.assert_close(gradients[0] - gradients[1], last.router.grad, atol=1e-5, rtol=1e-3)
    assert last.router.grad is not None
    assert last.router.grad.abs().max() > 1e-3


def test_activation_checkpointing_counts_once_and_keeps_the_gradient() -> None:
    results = []
    for checkpointed in (False, True):
        model, monitor = monitored("aux")
        model.activation_checkpointing = checkpointed
        step(model, monitor)
        model.zero_grad()
        results.append((step(model, monitor), [p.grad for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    for plain, recomputed in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_state_comes_back() -> None:
    model, monitor = monitored("bias")
    step(model, monitor)
    saved = {name: tensor.clone() for name, tensor in monitor.state_tensors().items()}
    other, fresh = monitored("bias")
    fresh.load_state_tensors(saved)
    assert all(torch.equal(a.expert_bias, b.expert_bias) for a, b in zip(layers(model), layers(other), strict=True))
    assert torch.equal(fresh.state_tensors()["router.share"], saved["router.share"])
