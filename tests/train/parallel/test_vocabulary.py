"""Vocabulary-parallel losses: likelihood, entropy, confidence and gradients of the plain functions, for any split."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unmask.diffusion.objectives import token_nll, token_scores
from unmask.train.parallel.layouts import Layout
from unmask.train.parallel.vocabulary import VocabularyShard, parallel_nll, parallel_scores

COMBINE: dict[object, Callable[[Tensor], Tensor]] = {
    dist.ReduceOp.SUM: lambda parts: parts.sum(0),
    dist.ReduceOp.MAX: lambda parts: parts.amax(0),
    dist.ReduceOp.MIN: lambda parts: parts.amin(0),
}


class Table:
    """Where the threads that stand for ranks lay their tensors."""

    def __init__(self, size: int) -> None:
        self._barrier, self._parts = threading.Barrier(size, timeout=20), [torch.empty(0)] * size

    def reduce(self, rank: int, tensor: Tensor, operation: object) -> Tensor:
        self._parts[rank] = tensor.clone()
        self._barrier.wait()
        tensor.copy_(COMBINE[operation](torch.stack(self._parts)))
        self._barrier.wait()
        return tensor


class ThreadShard(VocabularyShard):
    """A share of the vocabulary whose ranks are threads."""

    def __init__(self, table: Table, rank: int, span: tuple[int, int]) -> None:
        object.__setattr__(self, "start", span[0])
        object.__setattr__(self, "stop", span[1])
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "rank", rank)

    def reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        reduced: Tensor = self.table.reduce(self.rank, tensor, operation)  # type: ignore[attr-defined]
        return reduced


@dataclass(frozen=True)
class Task:
    """Predictions to score, by a head of `vocabulary` rows over `size` ranks."""

    seed: int
    size: int
    vocabulary: int
    count: int
    chunk: int
    banned: bool
    rounded: bool

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int | None]:
        """Head, hidden states, targets (never the mask token), mask token; whole numbers make equal logits."""
        generator = torch.Generator().manual_seed(self.seed)
        head, hidden = (torch.randn(rows, 6, generator=generator, dtype=dtype) for rows in (self.vocabulary, self.count))
        if self.rounded:
            head, hidden = head.round(), hidden.round()
        mask_id = int(torch.randint(self.vocabulary, (), generator=generator)) if self.banned else None
        target = torch.randint(self.vocabulary, (self.count,), generator=generator)
        if mask_id is not None:
            target[target == mask_id] = (mask_id + 1) % self.vocabulary
        return head, hidden, target, mask_id


tasks = st.builds(
    Task,
    seed=st.integers(0, 1000),
    size=st.integers(1, 4),
    vocabulary=st.integers(2, 23),
    count=st.integers(0, 9),
    chunk=st.integers(3, 12),
    banned=st.booleans(),
    rounded=st.booleans(),
)


def over_ranks(
    task: Task, score: Callable[[Tensor, Tensor, Tensor, int | None, ThreadShard], list[Tensor]]
) -> list[list[Tensor]]:
    """`score` of every rank, with its rows of the head; what it returns, and gradients of the head's rows and hidden states."""
    head, hidden, target, mask_id = task.tensors(torch.float64)
    layout, table = Layout(0, (task.vocabulary,)), Table(task.size)

    def rank_scores(rank: int) -> list[Tensor]:
        own_head = layout.part(head, rank, task.size).requires_grad_()
        own_hidden = hidden.clone().requires_grad_()
        shard = ThreadShard(table, rank, layout.spans(rank, task.size)[0])
        outputs = score(own_head, own_hidden, target, mask_id, shard)
        gradients = torch.autograd.grad(outputs[0], (own_head, own_hidden), allow_unused=True, materialize_grads=True)
        return [*(output.detach() for output in outputs[1:]), *gradients]

    with ThreadPoolExecutor(task.size) as threads:
        ranks = list(threads.map(rank_scores, range(task.size)))
    whole_head = layout.restore(torch.cat([rank[-2] for rank in ranks]), task.size)
    hidden_gradient = torch.stack([rank[-1] for rank in ranks]).sum(0)
    return [[*rank[:-2], whole_head, hidden_gradient] for rank in ranks]


def weighted(values_N: Tensor) -> Tensor:
    """A loss that tells positions apart."""
    return (values_N * torch.arange(1, len(values_N) + 1)).sum()


@settings(max_examples=25, deadline=None)
@given(tasks)
def test_the_likelihood_and_its_gradient_are_those_of_the_whole_vocabulary(task: Task) -> None:
    head, hidden, target, mask_id = task.tensors(torch.float64)
    head.requires_grad_()
    hidden.requires_grad_()
    nll_N = token_nll(lambda x: x @ head.T, hidden, target, mask_id)
    expected = [nll_N.detach(), *torch.autograd.grad(weighted(nll_N), (head, hidden))]

    def score(own: Tensor, x_ND: Tensor, target_N: Tensor, banned: int | None, shard: ThreadShard) -> list[Tensor]:
        found_N = parallel_nll(lambda x: x @ own.T, x_ND, target_N, banned, shard, chunk=task.chunk)
        return [weighted(found_N), found_N]

    for found in over_ranks(task, score):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(tasks, st.sampled_from([0.5, 1.0, 2.0]))
def test_scores_and_their_gradients_are_those_of_the_whole_vocabulary(task: Task, temperature: float) -> None:
    head, hidden, target, mask_id = task.tensors(torch.float64)
    head.requires_grad_()
    hidden.requires_grad_()
    plain = token_scores(lambda x: x @ head.T, hidden, target, mask_id, temperature=temperature)
    loss = weighted(plain.nll_N) + 0.3 * weighted(plain.entropy_N)
    values = [plain.nll_N.detach(), plain.entropy_N.detach(), plain.correct_N, plain.confidence_N]
    expected = [*values, *torch.autograd.grad(loss, (head, hidden))]

    def score(own: Tensor, x_ND: Tensor, target_N: Tensor, banned: int | None, shard: ThreadShard) -> list[Tensor]:
        found = parallel_scores(lambda x: x @ own.T, x_ND, target_N, banned, shard, temperature=temperature, chunk=task.chunk)
        total = weighted(found.nll_N) + 0.3 * weighted(found.entropy_N)
        return [total, found.nll_N, found.entropy_N, found.correct_N, found.confidence_N]

    for found in over_ranks(task, score):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    task = Task(seed=3, size=1, vocabulary=11, count=4, chunk=8, banned=True, rounded=False)
    head, hidden, target, mask_id = task.tensors(dtype)
    shard = ThreadShard(Table(1), 0, (0, 11))
    assert parallel_nll(lambda x: x @ head.T, hidden, target, mask_id, shard).dtype == torch.float32
    assert token_nll(lambda x: x @ head.T, hidden, target, mask_id).dtype == torch.float32
