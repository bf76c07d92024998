"""The NELBO: its exact value by enumeration, its estimators, its normalisation and the vocabulary projection."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from math import comb

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoring import score_stream
from tiny import MASK, VOCAB, Rows, pack, text, tiny_model
from unmask.diffusion.corrupt import CorruptionConfig, MaskSampling, corrupt
from unmask.diffusion.objectives import ban_mask, nelbo, token_nll
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer


def exact_block_nelbo(nll_of: Callable[[Sequence[int]], Tensor], maskable: Sequence[int]) -> Tensor:
    """The NELBO of one block by enumeration of its 2^m - 1 masks (m maskable positions): exact, for small blocks.

    `sum_{S nonempty} 1 / (m C(m, |S|)) (m / |S|) sum_{i in S} nll_i(S)`.

    Args:
        nll_of: gives the negative log-likelihoods of the tokens at the masked positions S, summed or as a vector.
        maskable: positions that may be masked.

    Returns:
        Scalar in nats, *not* divided by the number of tokens.

    Source: LLaDA2.0 Eq. 1 integrated over t: a rate drawn uniformly makes every mask size 1..m equally likely.
    """
    m = len(maskable)
    total = torch.zeros((), dtype=torch.float64)
    for size in range(1, m + 1):
        for masked in combinations(maskable, size):
            total = total + nll_of(masked).double().sum() / (m * comb(m, size)) * (m / size)
    return total


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("summed", [False, True])
def test_enumeration_equals_the_integral_over_t(m: int, summed: bool) -> None:
    """`int_0^1 (1/t) sum_S t^|S| (1-t)^(m-|S|) nll(S) dt`: a polynomial, so that Gauss-Legendre integrates it exactly."""
    maskable = [3 * i + 2 for i in range(m)]
    drawn = random.Random(m)
    subsets = [s for size in range(1, m + 1) for s in combinations(maskable, size)]
    table = {s: torch.tensor([drawn.random() for _ in s], dtype=torch.float64) for s in subsets}
    nodes, weights = np.polynomial.legendre.leggauss(20)
    integral = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        expected_sum = sum(node ** len(s) * (1 - node) ** (m - len(s)) * float(table[s].sum()) for s in subsets)
        integral += weight * expected_sum / node

    def nll_of(masked: Sequence[int]) -> Tensor:
        values = table[tuple(masked)]
        return values.sum() if summed else values

    assert float(exact_block_nelbo(nll_of, maskable)) == pytest.approx(integral, rel=1e-12)


def test_nothing_maskable_costs_nothing() -> None:
    def refuse(masked: Sequence[int]) -> Tensor:
        raise AssertionError(f"asked for {masked}")

    assert float(exact_block_nelbo(refuse, [])) == 0.0


@torch.no_grad()
def exact_document_nelbo(model: Transformer, tokens: tuple[int, ...], prompt: int, block_size: int) -> float:
    """Sum over blocks of the enumerated NELBO, every mask scored by a forward over the clean past and the noisy block."""
    total = 0.0
    for start in range(0, len(tokens), block_size):
        stop = min(start + block_size, len(tokens))
        block = torch.arange(stop) // block_size
        mask = (block[:, None] >= block[None, :])[None]

        def nll_of(masked: Sequence[int], stop: int = stop, mask: Tensor = mask) -> Tensor:
            where = torch.tensor(masked)
            canvas = torch.tensor(tokens[:stop])
            target = canvas[where].clone()
            canvas[where] = MASK
            hidden = model(canvas[None], torch.arange(stop)[None], DenseAttend(mask))[0, where]
            logits = model.head(hidden)
            logits[:, MASK] = float("-inf")
            return -logits.log_softmax(-1).gather(1, target[:, None])[:, 0]

        total += float(exact_block_nelbo(nll_of, [i for i in range(start, stop) if i >= prompt]))
    return total


@pytest.mark.parametrize(
    ("length", "prompt", "block_size"), [(7, 0, 4), (7, 2, 3), (3, 0, None)], ids=["cpt", "prompt", "whole"]
)
@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("sampling", ["bernoulli", "fixed_count"])
def test_the_estimator_is_unbiased(
    length: int, prompt: int, block_size: int | None, complementary: bool, sampling: MaskSampling
) -> None:
    """Several thousand identical documents under their own masks, through the training step, against enumeration."""
    draws, model = 4000, tiny_model("llama", 5, torch.float64, num_layers=1)
    tokens = text(length, 0).tokens
    exact = exact_document_nelbo(model, tokens, prompt, block_size or length) / (length - prompt)
    one = pack([[text(length, 0, prompt=prompt)]], length)
    many = Rows(*(getattr(one, name).repeat(draws, 1) for name in Rows.__dataclass_fields__))
    many.ordinal_RL.copy_(torch.arange(draws)[:, None])
    config = CorruptionConfig(MASK, block_size, complementary=complementary, sampling=sampling)
    stream = corrupt(many, config, seed=0)
    with torch.no_grad():
        nll_N = score_stream(model, stream, MASK, "dense").double()
    estimate = float(nelbo(nll_N, stream.weight_N)) / stream.num_maskable
    per_document = torch.zeros(draws, dtype=torch.float64).index_add_(0, stream.predict[0], nll_N * stream.weight_N)
    error = float(per_document.std()) / draws**0.5 * draws / stream.num_maskable
    assert abs(estimate - exact) < 4 * error
    unweighted = float(nelbo(nll_N, torch.ones_like(nll_N))) / stream.num_maskable
    assert abs(unweighted - exact) > 8 * error, "the tolerance would not notice a missing 1/t"


def test_nelbo_is_the_weighted_sum() -> None:
    nll, weight = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 4.0])
    assert float(nelbo(nll, weight)) == pytest.approx(14)
    assert float(nelbo(nll[:0], weight[:0])) == 0.0


class Head(nn.Module):
    """A vocabulary projection that counts its rows and likes nothing better than the mask token."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(VOCAB, 8, generator=generator))
        self.calls: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls.append(len(hidden))
        favourite = 50.0 * (torch.arange(VOCAB) == MASK).to(hidden.dtype)
        return torch.nn.functional.linear(hidden, self.weight) + favourite


def hidden_and_targets(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 8, generator=generator), torch.randint(0, MASK, (count,), generator=generator)


def test_the_mask_token_is_never_predicted() -> None:
    hidden, target = hidden_and_targets(9)
    head = Head()
    logits = head(hidden)
    assert (logits.argmax(-1) == MASK).all()
    banned = ban_mask(logits, MASK)
    assert (banned[:, MASK] == float("-inf")).all()
    keep = [i for i in range(VOCAB) if i != MASK]
    assert torch.equal(banned[:, keep], logits[:, keep])
    expected = logits[:, keep].logsumexp(-1) - logits.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(token_nll(head, hidden, target, MASK), expected)


@pytest.mark.parametrize("chunk", [1, 3, 4, 9, 10])
def test_chunks_change_neither_losses_nor_gradients(chunk: int) -> None:
    hidden, target = hidden_and_targets(9)
    results = []
    for size in (2048, chunk):
        head, leaf = Head(), hidden.clone().requires_grad_()
        losses = token_nll(head, leaf, target, MASK, chunk=size)
        assert max(head.calls) <= size
        (losses * torch.linspace(0.5, 2, 9)).sum().backward()
        results.append((losses.detach(), leaf.grad, head.weight.grad))
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain)


def test_losses_are_float32_whatever_the_model_computes_in() -> None:
    hidden, target = hidden_and_targets(5)
    head = Head()
    assert token_nll(head, hidden, target, MASK).dtype == torch.float32
    head, low = head.to(torch.bfloat16), hidden.to(torch.bfloat16)
    found = token_nll(head, low, target, MASK)
    exact = ban_mask(head(low).float(), MASK).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, -exact)


def gradients(model: Transformer, rows: Rows, config: CorruptionConfig, bounds: list[int]) -> dict[str, Tensor]:
    """Accumulated over micro-batches `bounds[i]:bounds[i + 1]`, normalised by the whole batch."""
    model.zero_grad()
    num_maskable = int(rows.maskable_RL.sum()) * config.num_copies
    for start, stop in pairwise(bounds):
        stream = corrupt(rows.rows(start, stop), config, seed=3)
        (nelbo(score_stream(model, stream, MASK, "dense"), stream.weight_N) / num_maskable).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["llama", "llada2"])
@pytest.mark.parametrize(
    "config",
    [CorruptionConfig(MASK, 4), CorruptionConfig(MASK, None, complementary=True, sampling="fixed_count")],
    ids=["block", "whole-pair"],
)
def test_the_gradient_does_not_depend_on_micro_batches(family: str, config: CorruptionConfig) -> None:
    """Rows differ in length, prompt and padding; one has nothing to learn."""
    model = tiny_model(family, 2, torch.float64)
    rows = pack(
        [
            [text(12, 0)],
            [text(5, 1, prompt=2), text(6, 2)],
            [text(9, 3, prompt=9)],
            [text(3, 4)],
            [text(12, 5, prompt=10)],
        ],
        12,
    )
    whole = gradients(model, rows, config, [0, 5])
    scale = max(float(g.abs().max()) for g in whole.values())
    for bounds in ([0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 3, 4, 5]):
        parts = gradients(model, rows, config, bounds)
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, atol=1e-6 * scale, rtol=0, msg=f"{name} under {bounds}")


@pytest.mark.parametrize("block_size", [None, 1, 4])
@pytest.mark.parametrize("complementary", [False, True])
def test_a_batch_with_nothing_to_learn_costs_zero(block_size: int | None, complementary: bool) -> None:
    model = tiny_model("llama")
    rows = pack([[text(8, 0, prompt=8)], [text(3, 1, prompt=3)], []], 8)
    stream = corrupt(rows, CorruptionConfig(MASK, block_size, complementary=complementary), 0)
    assert stream.num_maskable == len(stream.target_N) == 0
    for backend in ("dense", "blocked"):
        model.zero_grad()
        loss = nelbo(score_stream(model, stream, MASK, backend), stream.weight_N)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [2048, 4])
def test_gradient_is_that_of_cross_entropy_without_the_mask_token(dtype: torch.dtype, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator).to(dtype).requires_grad_() for n in (9, VOCAB))
    target, scale = torch.arange(9), torch.linspace(0, 2, 9)
    nll_N = token_nll(lambda h: h @ weight.T, hidden, target, MASK, chunk=chunk)
    expected = F.cross_entropy(ban_mask((hidden @ weight.T).float(), MASK), target, reduction="none")
    found, plain = (torch.autograd.grad((nll * scale).sum(), (hidden, weight)) for nll in (nll_N, expected))
    for mine, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=20 * torch.finfo(dtype).eps, rtol=0)
    assert not found[1][MASK].any()


def test_logits_are_left_alone_and_a_second_backward_pass_is_refused() -> None:
    logits = torch.randn(4, VOCAB, requires_grad=True)
    before, nll_N = logits.detach().clone(), token_nll(lambda h: h, logits, torch.arange(4), MASK)
    nll_N.sum().backward(retain_graph=True)
    assert torch.equal(logits.detach(), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        nll_N.sum().backward()
