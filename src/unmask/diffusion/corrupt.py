"""Corruption, x0 -> xt: which tokens are masked, and the stream `[x_t | x_t' | x_0]` that a model reads in training.

Owns masking, complementary pairs and the training layout. Knows tensors only. All noise is a function of (seed, epoch,
document, position): a document is corrupted the same way alone or packed, on one rank or on many.

Legend: R rows, L row length, C noisy copies, T stream positions, N predictions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from unmask.diffusion.masks import CLEAN, StreamIndex
from unmask.diffusion.noise import NoiseKey
from unmask.diffusion.schedule import Bandwidth, elbo_weight, stratified_t
from unmask.errors import ConfigError

MaskSampling = Literal["bernoulli", "fixed_count"]


class CleanRows(Protocol):
    """Packed rows of clean documents. `segment_RL` is 0 on padding and counts documents from 1; positions restart in each
    document; `epoch_RL` and `ordinal_RL` identify the document for its noise."""

    @property
    def tokens_RL(self) -> Tensor: ...
    @property
    def segment_RL(self) -> Tensor: ...
    @property
    def position_RL(self) -> Tensor: ...
    @property
    def maskable_RL(self) -> Tensor: ...
    @property
    def epoch_RL(self) -> Tensor: ...
    @property
    def ordinal_RL(self) -> Tensor: ...


@dataclass(frozen=True)
class CorruptionConfig:
    """How rows are corrupted.

    Attributes:
        mask_id: token that marks masked positions.
        block_size: tokens of a block; None: full-sequence diffusion, one block per document and no clean copy.
        bandwidth: interval of the mask rate.
        complementary: masks come in pairs, each token masked in one of the two.
        sampling: masks per block, as of `noisy_copies`.
        mask_samples: masks (or complementary pairs) that share one clean copy; their rates divide the bandwidth evenly.
        start_id: the model is shifted and reads this token before a document (`ModelConfig.start_id`); None: not shifted.
    """

    mask_id: int
    block_size: int | None
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    complementary: bool = False
    sampling: MaskSampling = "bernoulli"
    mask_samples: int = 1
    start_id: int | None = None

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size <= 0:
            raise ConfigError(f"block size is {self.block_size}; it must be positive, or null for the whole sequence")
        if self.mask_samples < 1:
            raise ConfigError(f"mask_samples is {self.mask_samples}; use 1 or more")

    @property
    def num_copies(self) -> int:
        """Noisy copies of each row. A block of one token is always masked: no complement, and all samples would be the same."""
        return 1 if self.block_size == 1 else self.mask_samples * (2 if self.complementary else 1)


@dataclass(frozen=True)
class NoisyCopy:
    """One corruption of the rows: what is masked and thus predicted, at which rate, and the weight of each prediction."""

    masked_RL: Tensor
    t_RL: Tensor
    weight_RL: Tensor


@dataclass(frozen=True)
class Stream:
    """The input of a training forward and its targets.

    `predict` are (row, column) indices of the N predictions in the stream, copy by copy; `target_N` their clean tokens,
    `weight_N` the objective's weights (float32), `t_N` their mask rates. `num_maskable` counts maskable tokens once per noisy
    copy: the objective's normaliser. `ordinal_BT` identifies documents for `embedding_noise`.
    """

    tokens_BT: Tensor
    position_BT: Tensor
    index: StreamIndex
    epoch_BT: Tensor
    ordinal_BT: Tensor
    predict: tuple[Tensor, Tensor]
    target_N: Tensor
    weight_N: Tensor
    t_N: Tensor
    num_maskable: int

    @property
    def copy_N(self) -> Tensor:
        """The copy that each prediction is in."""
        return self.index.copy_BT[self.predict]


def block_ids(position_RL: Tensor, block_size: int | None) -> Tensor:
    """Block of each token, counted from the start of its document."""
    return torch.zeros_like(position_RL) if block_size is None else position_RL // block_size


def block_groups(rows: CleanRows, block_RL: Tensor) -> tuple[Tensor, int]:
    """Number every (row, document, block) from 0, with blocks from -L to L: of each position (int64 [R, L]), and how many."""
    num_rows, length = block_RL.shape
    row_RL = torch.arange(num_rows, device=block_RL.device)[:, None].expand_as(block_RL)
    document_RL = row_RL * (length + 1) + rows.segment_RL
    groups, group_RL = (document_RL * (2 * length + 2) + block_RL).unique(return_inverse=True)
    return group_RL, len(groups)


def largest_in_block(rows: CleanRows, block_RL: Tensor, values_RL: Tensor, where_RL: Tensor, otherwise: int) -> Tensor:
    """Of each token, the largest of the values in its block at `where_RL`; `otherwise` where there are none."""
    group_RL, num_groups = block_groups(rows, block_RL)
    largest = torch.full((num_groups,), otherwise, dtype=torch.int64, device=block_RL.device)
    largest.scatter_reduce_(0, group_RL[where_RL], values_RL[where_RL], "amax", include_self=False)
    return largest[group_RL]


def noisy_copies(rows: CleanRows, config: CorruptionConfig, seed: int) -> list[NoisyCopy]:
    """Sample `config.mask_samples` masks, or as many complementary pairs.

    Bernoulli: each maskable token of a block is masked with probability t, weight 1/t; the complement has rate 1 - t.
    Fixed count: with m maskable tokens in the block, k of them are masked. Alone, k is uniform on 1..m with weight m/k; in a
    pair, k is uniform on 0..m, so that both members have the same law, with weights (m + 1)/k and (m + 1)/(m - k).
    Block size 1: everything is masked with weight 1.

    Returns:
        For every sample one `NoisyCopy`, or two that partition the maskable tokens.

    Source: LLaDA2.0 Eqs 1-3, complementary masking section 4.1. Departs: fixed-count masks are ours, equal in expectation.
    """
    if config.block_size == 1:
        ones = torch.ones_like(rows.maskable_RL, dtype=torch.float32)
        return [NoisyCopy(rows.maskable_RL, ones, ones)]
    return [copy for sample in range(config.mask_samples) for copy in _sample_masks(rows, config, seed, sample)]


def _sample_masks(rows: CleanRows, config: CorruptionConfig, seed: int, sample: int) -> list[NoisyCopy]:
    """One mask or complementary pair, number `sample` (from 0) of `config.mask_samples`."""
    key = NoiseKey(seed, rows.epoch_RL)
    maskable_RL = rows.maskable_RL
    block_RL = block_ids(rows.position_RL, config.block_size)
    t_RL = stratified_t(key, rows.ordinal_RL, block_RL, config.bandwidth, turn=sample / config.mask_samples)
    u_RL = key.uniform("mask", rows.ordinal_RL, rows.position_RL, *([sample] if sample else []))
    if config.sampling == "bernoulli":
        masked_RL = maskable_RL & (u_RL < t_RL)
        first = NoisyCopy(masked_RL, t_RL, elbo_weight(t_RL))
        second = NoisyCopy(maskable_RL & ~masked_RL, 1 - t_RL, elbo_weight(1 - t_RL))
    else:
        size_RL, rank_RL = _rank_in_block(rows, block_RL, u_RL)
        paired = config.complementary
        levels_RL = size_RL + 1 if paired else size_RL
        count_RL = (t_RL * levels_RL).ceil().clamp(min=1) - (1 if paired else 0)
        masked_RL = maskable_RL & (rank_RL < count_RL)
        first = NoisyCopy(masked_RL, count_RL / size_RL, levels_RL / count_RL)
        rest_RL = size_RL - count_RL
        second = NoisyCopy(maskable_RL & ~masked_RL, rest_RL / size_RL, levels_RL / rest_RL)
    return [first, second] if config.complementary else [first]


def _rank_in_block(rows: CleanRows, block_RL: Tensor, u_RL: Tensor) -> tuple[Tensor, Tensor]:
    """Number of maskable tokens of each token's block, and the token's rank among them by `u_RL`; both float32 [R, L]."""
    group_RL, _ = block_groups(rows, block_RL)
    group = group_RL.flatten()
    maskable = rows.maskable_RL.flatten()
    size = torch.bincount(group, weights=maskable.double())
    by_u = torch.where(maskable, u_RL.flatten(), 2.0).argsort(stable=True)
    order = by_u[group[by_u].argsort(stable=True)]
    starts = torch.bincount(group).cumsum(0) - torch.bincount(group)
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - starts[group[order]]
    size_RL = size[group].float().view_as(block_RL)
    return size_RL, rank.float().view_as(block_RL)


def build_stream(rows: CleanRows, copies: list[NoisyCopy], config: CorruptionConfig) -> Stream:
    """Concatenate noisy and clean copies, without the blocks that no prediction depends on.

    Noisy copies hold only blocks with a maskable token (so never a prompt); the clean copy holds only blocks that some noisy
    block may attend to, so never a document's last block. Full-sequence diffusion has no clean copy.

    The clean copy of a shifted model is causal, as its parent is: noisy blocks are numbered by their first position, and every
    clean token is a block of its own.

    Source: BD3-LM's `[x_t | x_0]`; the 3L layout of a complementary pair and both omissions are ours. The causal clean copy:
        NBDiff (2512.06776).
    """
    stream_copies = masked_copies(rows, copies, config)
    if config.block_size is not None:
        block_RL = block_ids(rows.position_RL, config.block_size)
        last_RL = largest_in_block(rows, torch.zeros_like(block_RL), block_RL, rows.maskable_RL, -1)
        stream_copies.append(clean_copy(rows, (block_RL < last_RL) & (rows.segment_RL > 0), block_RL, config.start_id))
    return replace(assemble(rows, stream_copies), num_maskable=int(rows.maskable_RL.sum()) * len(copies))


def masked_copies(rows: CleanRows, copies: list[NoisyCopy], config: CorruptionConfig, first: int = 1) -> list[CompactCopy]:
    """Noisy copies number `first`, `first + 1`, ... of a stream: the blocks with a maskable token, those of `copies` masked."""
    block_RL = block_ids(rows.position_RL, config.block_size)
    learnt_RL = largest_in_block(rows, block_RL, torch.ones_like(block_RL), rows.maskable_RL, 0)
    keep_RL = learnt_RL.bool() & (rows.segment_RL > 0)
    order_RL = block_RL if config.start_id is None else block_RL * (config.block_size or 0)
    compacted: list[CompactCopy] = []
    for number, copy in enumerate(copies, start=first):
        xt_RL = torch.where(copy.masked_RL, config.mask_id, rows.tokens_RL)
        inputs_RL = read_inputs(rows, xt_RL, block_RL, config.start_id)
        compacted.append(compact(rows, keep_RL, inputs_RL, number, order_RL, copy))
    return compacted


def clean_copy(
    rows: CleanRows, keep_RL: Tensor, block_RL: Tensor, start_id: int | None, predicted: NoisyCopy | None = None
) -> CompactCopy:
    """The clean copy of a stream, which holds the positions `keep_RL`; that of a shifted model is causal."""
    order_RL = block_RL if start_id is None else rows.position_RL
    return compact(rows, keep_RL, read_inputs(rows, rows.tokens_RL, block_RL, start_id), CLEAN, order_RL, predicted)


def causal_copy(rows: CleanRows, last_RL: Tensor, start_id: int, predicted: NoisyCopy | None = None) -> CompactCopy:
    """The clean copy of a shifted model, which holds each document up to its position `last_RL`."""
    keep_RL = (rows.position_RL <= last_RL) & (rows.segment_RL > 0)
    return clean_copy(rows, keep_RL, rows.position_RL, start_id, predicted)


def assemble(rows: CleanRows, copies: Sequence[CompactCopy]) -> Stream:
    """Concatenate copies of the rows, the noisy ones first, to a stream; its `num_maskable` counts its predictions."""
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    offset = 0
    for copy in copies:
        if copy.predicted is not None:
            row_N, column_N = torch.nonzero(copy.gather(copy.predicted.masked_RL) & copy.valid, as_tuple=True)
            at = (row_N, copy.source[row_N, column_N])
            weight_N, t_N = copy.predicted.weight_RL[at], copy.predicted.t_RL[at]
            columns.append((row_N, column_N + offset, rows.tokens_RL[at], weight_N, t_N))
        offset += copy.valid.shape[1]
    row_N, column_N, target_N, weight_N, t_N = (torch.cat(column) for column in zip(*columns, strict=True))

    def gather(values_RL: Tensor) -> Tensor:
        return torch.cat([copy.gather(values_RL) for copy in copies], dim=1)

    return Stream(
        tokens_BT=torch.cat([copy.tokens for copy in copies], dim=1),
        position_BT=gather(rows.position_RL),
        index=StreamIndex(
            document_BT=gather(rows.segment_RL),
            block_BT=torch.cat([copy.gather(copy.order_RL) for copy in copies], dim=1),
            copy_BT=torch.cat([torch.full_like(copy.tokens, copy.number) for copy in copies], dim=1),
        ),
        epoch_BT=gather(rows.epoch_RL),
        ordinal_BT=gather(rows.ordinal_RL),
        predict=(row_N, column_N),
        target_N=target_N,
        weight_N=weight_N.float(),
        t_N=t_N.float(),
        num_maskable=len(target_N),
    )


def read_inputs(rows: CleanRows, xt_RL: Tensor, block_RL: Tensor, start_id: int | None) -> Tensor:
    """The model's input at each position of a copy `xt_RL`: the token there; for a shifted model, the token before.

    The token before a block is always clean, since the blocks before are; before a document it is the start token.

    Source: DiffuLLaMA (2410.17891), shift operation. Departs: the input is delayed instead of the output, which keeps blocks
        as they are.
    """
    if start_id is None:
        return xt_RL
    before_RL = xt_RL.roll(1, dims=1)
    same_document_RL = rows.segment_RL == rows.segment_RL.roll(1, dims=1)
    same_document_RL[:, 0] = False
    new_block_RL = block_RL != block_RL.roll(1, dims=1)
    read_RL = torch.where(new_block_RL, rows.tokens_RL.roll(1, dims=1), before_RL)
    return torch.where(same_document_RL, read_RL, start_id)


@dataclass(frozen=True)
class CompactCopy:
    """A copy of the rows in the stream, without the positions it does not need.

    Attributes:
        source: the row positions it holds (0 where `valid` is False).
        tokens: the inputs there.
        number: of the copy.
        order_RL: int64 block numbers, as the mask compares them.
        predicted: what it predicts of what it holds; None: nothing.
    """

    source: Tensor
    valid: Tensor
    tokens: Tensor
    number: int
    order_RL: Tensor
    predicted: NoisyCopy | None

    def gather(self, values_RL: Tensor) -> Tensor:
        """The values of the positions it holds; zero where there is none."""
        gathered = values_RL.gather(1, self.source)
        return torch.where(self.valid, gathered, torch.zeros_like(gathered))


def compact(
    rows: CleanRows, keep_RL: Tensor, tokens_RL: Tensor, number: int, order_RL: Tensor, predicted: NoisyCopy | None
) -> CompactCopy:
    """Copy `number` of the rows: in every row the kept positions, moved to the front; as wide as the fullest row."""
    width = max(1, int(keep_RL.sum(1).max()))
    order = torch.argsort((~keep_RL).to(torch.int8), dim=1, stable=True)[:, :width]
    valid = keep_RL.gather(1, order)
    source = torch.where(valid, order, torch.zeros_like(order))
    tokens = torch.where(valid, tokens_RL.gather(1, source), rows.tokens_RL.gather(1, source))
    return CompactCopy(source, valid, tokens, number, order_RL, predicted)


def corrupt(rows: CleanRows, config: CorruptionConfig, seed: int) -> Stream:
    """Mask the rows and lay them out: `build_stream(rows, noisy_copies(rows))`."""
    return build_stream(rows, noisy_copies(rows, config, seed), config)


def next_token_stream(rows: CleanRows) -> Stream:
    """The rows as an autoregressive model reads them: clean, causal in each document, each maskable token predicted from the
    position before. A document's first token is not predicted and not counted."""
    predicted_RL = torch.zeros_like(rows.maskable_RL)
    predicted_RL[:, :-1] = rows.maskable_RL[:, 1:] & (rows.segment_RL[:, 1:] == rows.segment_RL[:, :-1])
    row_N, column_N = torch.nonzero(predicted_RL, as_tuple=True)
    ones = torch.ones(len(row_N), dtype=torch.float32, device=row_N.device)
    return Stream(
        tokens_BT=rows.tokens_RL,
        position_BT=rows.position_RL,
        index=StreamIndex(rows.segment_RL, rows.position_RL, torch.full_like(rows.tokens_RL, CLEAN)),
        epoch_BT=rows.epoch_RL,
        ordinal_BT=rows.ordinal_RL,
        predict=(row_N, column_N),
        target_N=rows.tokens_RL[row_N, column_N + 1],
        weight_N=ones,
        t_N=ones,
        num_maskable=len(row_N),
    )


def embedding_noise(stream: Stream, mask_id: int, hidden_size: int, norm: float, seed: int) -> Tensor:
    """Gaussian noise for the embedding layer's output at masked positions, zero elsewhere.

    Args:
        stream: what the model reads.
        mask_id: token that marks masked positions.
        hidden_size: D.
        norm: expected L2 norm of a noise vector.
        seed: the run's seed.

    Returns:
        float32 [B, T, D].

    Source: LLaDA2.0 section 3 (mask-embedding noise). Departs: scale is ours, since the report gives none.
    """
    at = torch.nonzero(stream.tokens_BT == mask_id, as_tuple=True)
    key = NoiseKey(seed, stream.epoch_BT[at][:, None])
    identity = (stream.ordinal_BT[at][:, None], stream.position_BT[at][:, None], stream.index.copy_BT[at][:, None])
    dim = torch.arange(hidden_size, device=stream.tokens_BT.device)[None]
    u = key.uniform("embedding", *identity, dim)
    v = key.uniform("embedding", *identity, dim + hidden_size)
    gaussian = (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * torch.pi * v)
    noise = torch.zeros(*stream.tokens_BT.shape, hidden_size, dtype=torch.float32, device=u.device)
    noise[at] = (gaussian * norm / hidden_size**0.5).float()
    return noise
