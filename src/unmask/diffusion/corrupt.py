"""x0 -> xt: which tokens are masked, and the stream `[x_t | x_t' | x_0]` a model reads.

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
    """How rows are corrupted. `block_size` None: full-sequence diffusion, one block per document and no clean copy.

    `draws` corruptions (or complementary pairs) share one clean copy; their rates divide the bandwidth evenly. `start_id`: the
    model is shifted (`ModelConfig.start_id`), None: it reads at each position the token that stands there. `ar_loss_weight`:
    weight of the next-token loss of a shifted model's clean copy, beside the NELBO; 0: none.
    """

    mask_id: int
    block_size: int | None
    bandwidth: Bandwidth = field(default_factory=Bandwidth)
    complementary: bool = False
    sampling: MaskSampling = "bernoulli"
    draws: int = 1
    start_id: int | None = None
    ar_loss_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size <= 0:
            raise ConfigError(f"block size is {self.block_size}; it must be positive, or null for the whole sequence")
        if self.draws < 1:
            raise ConfigError(f"{self.draws} draws of the mask; use 1 or more")
        if self.ar_loss_weight and self.start_id is None:
            raise ConfigError(
                f"ar_loss_weight is {self.ar_loss_weight:g}, but only a shifted model's clean copy predicts the next token"
            )

    @property
    def num_copies(self) -> int:
        """Noisy copies of each row. A block of one token is always masked: no complement, and every draw would be the same."""
        return 1 if self.block_size == 1 else self.draws * (2 if self.complementary else 1)


@dataclass(frozen=True)
class NoisyCopy:
    """One corruption of the rows: what is masked, at which rate, and the weight of each prediction."""

    masked_RL: Tensor
    t_RL: Tensor
    weight_RL: Tensor


@dataclass(frozen=True)
class Stream:
    """What the model reads and must predict.

    `predict` are (row, column) indices of the N masked positions in the stream; `target_N` their clean tokens, `weight_N`
    the objective's weights (float32), `t_N` their mask rates. The last `num_guided` of them are next-token predictions of the
    clean copy instead. `num_maskable` counts maskable tokens once per noisy copy: the objective's normaliser. `ordinal_BT`
    identifies documents for `embedding_noise`.
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
    num_guided: int = 0

    @property
    def num_masked(self) -> int:
        """Predictions of masked positions, which come first."""
        return len(self.target_N) - self.num_guided


def block_ids(position_RL: Tensor, block_size: int | None) -> Tensor:
    """Block of each token, counted from the start of its document."""
    return torch.zeros_like(position_RL) if block_size is None else position_RL // block_size


def block_groups(rows: CleanRows, block_RL: Tensor) -> tuple[Tensor, int]:
    """Number every (row, document, block) from 0, with blocks from -L to L: of each position (int64 [R, L]), and how many."""
    num_rows, length = block_RL.shape
    row_RL = torch.arange(num_rows, device=block_RL.device)[:, None].expand_as(block_RL)
    document_RL = row_RL * (length + 1) + rows.segment_RL
    found, group_RL = (document_RL * (2 * length + 2) + block_RL).unique(return_inverse=True)
    return group_RL, len(found)


def noisy_copies(rows: CleanRows, config: CorruptionConfig, seed: int) -> list[NoisyCopy]:
    """Draw the masks of `config.draws` corruptions, or of as many complementary pairs.

    Bernoulli: each maskable token of a block is masked with probability t, weight 1/t; the complement has rate 1 - t.
    Fixed count: with m maskable tokens in the block, k of them are masked. Alone, k is uniform on 1..m with weight m/k; in a
    pair, k is uniform on 0..m, so that both members have the same law, with weights (m + 1)/k and (m + 1)/(m - k).
    Block size 1: everything is masked with weight 1.

    Returns:
        For every draw one `NoisyCopy`, or two that partition the maskable tokens.

    Source: LLaDA2.0 Eqs 1-3, complementary masking section 4.1. Departs: fixed-count masks are ours, equal in expectation.
    """
    if config.block_size == 1:
        ones = torch.ones_like(rows.maskable_RL, dtype=torch.float32)
        return [NoisyCopy(rows.maskable_RL, ones, ones)]
    return [copy for draw in range(config.draws) for copy in _draw(rows, config, seed, draw)]


def _draw(rows: CleanRows, config: CorruptionConfig, seed: int, draw: int) -> list[NoisyCopy]:
    """One corruption or complementary pair, the `draw`-th of `config.draws`."""
    key = NoiseKey(seed, rows.epoch_RL)
    maskable_RL = rows.maskable_RL
    block_RL = block_ids(rows.position_RL, config.block_size)
    t_RL = stratified_t(key, rows.ordinal_RL, block_RL, config.bandwidth, turn=draw / config.draws)
    u_RL = key.uniform("mask", rows.ordinal_RL, rows.position_RL, *([draw] if draw else []))
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
    """How many maskable tokens a token's block has, and where the token stands among them when ordered by `u_RL`."""
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
    """Lay noisy and clean tokens side by side, leaving out what no prediction depends on.

    Noisy copies hold only blocks with something maskable (a prompt never needs one); the clean copy holds only blocks that
    some noisy block may look back at, so a document's last block is never there twice. Full-sequence diffusion has no
    clean copy at all. What is left out cannot change any prediction. With `ar_loss_weight` the clean copy predicts, too: every
    maskable token, with that weight, and holds what that takes.

    A shifted model's clean copy is causal, as its parent is: its blocks are numbered by their first position, and every
    clean token is a block of its own.

    Source: BD3-LM's `[x_t | x_0]`; the 3L layout of a complementary pair and both omissions are ours. The causal clean copy
        and its loss: NBDiff (2512.06776).
    """
    block_RL = block_ids(rows.position_RL, config.block_size)
    shifted, guided = config.start_id is not None, config.ar_loss_weight > 0
    noisy_RL, clean_RL = _needed(rows, block_RL, last_clean=guided)
    order_RL = block_RL * (config.block_size or 0) if shifted else block_RL
    clean_order_RL = rows.position_RL if shifted else block_RL
    parts: list[tuple[Tensor, Tensor, int]] = []
    for number, copy in enumerate(copies, start=1):
        xt_RL = torch.where(copy.masked_RL, config.mask_id, rows.tokens_RL)
        parts.append((noisy_RL, read_inputs(rows, xt_RL, block_RL, config.start_id), number))
    if config.block_size is not None or guided:
        parts.append((clean_RL, read_inputs(rows, rows.tokens_RL, block_RL, config.start_id), CLEAN))
    pieces = [compact(rows, *part) for part in parts]
    predicted = list(copies)
    if guided:
        ones_RL = torch.ones_like(order_RL, dtype=torch.float32)
        predicted.append(NoisyCopy(rows.maskable_RL, ones_RL, ones_RL * config.ar_loss_weight * len(copies)))
    picked = [(copy.masked_RL, copy.weight_RL, copy.t_RL) for copy in predicted]
    orders = [clean_order_RL if piece.copy == CLEAN else order_RL for piece in pieces]
    stream = assemble(rows, pieces, orders, picked)
    num_guided = int((stream.index.copy_BT[stream.predict] == CLEAN).sum())
    return replace(stream, num_maskable=int(rows.maskable_RL.sum()) * len(copies), num_guided=num_guided)


def assemble(
    rows: CleanRows, pieces: Sequence[Piece], orders: Sequence[Tensor], picked: Sequence[tuple[Tensor, Tensor, Tensor]]
) -> Stream:
    """The parts of a stream side by side.

    Args:
        rows: what they are taken from.
        pieces: the parts.
        orders: of each, int64 [R, L] numbers of the blocks, as the mask compares them.
        picked: of each of the first parts, what it predicts (bool [R, L]; what it does not hold is left out), the weight and
            the mask rate.

    Returns:
        The stream; `num_maskable` counts its predictions.
    """
    found: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    offset = 0
    for (wanted_RL, weight_RL, t_RL), piece in zip(picked, pieces, strict=False):
        row_N, column_N = torch.nonzero(piece.gather(wanted_RL) & piece.valid, as_tuple=True)
        at = (row_N, piece.source[row_N, column_N])
        found.append((row_N, column_N + offset, rows.tokens_RL[at], weight_RL[at], t_RL[at]))
        offset += piece.valid.shape[1]
    row_N, column_N, target_N, weight_N, t_N = (torch.cat(columns) for columns in zip(*found, strict=True))
    return Stream(
        tokens_BT=torch.cat([piece.tokens for piece in pieces], dim=1),
        position_BT=torch.cat([piece.gather(rows.position_RL) for piece in pieces], dim=1),
        index=StreamIndex(
            document_BT=torch.cat([piece.gather(rows.segment_RL) for piece in pieces], dim=1),
            block_BT=torch.cat([piece.gather(order_RL) for piece, order_RL in zip(pieces, orders, strict=True)], dim=1),
            copy_BT=torch.cat([torch.full_like(piece.tokens, piece.copy) for piece in pieces], dim=1),
        ),
        epoch_BT=torch.cat([piece.gather(rows.epoch_RL) for piece in pieces], dim=1),
        ordinal_BT=torch.cat([piece.gather(rows.ordinal_RL) for piece in pieces], dim=1),
        predict=(row_N, column_N),
        target_N=target_N,
        weight_N=weight_N.float(),
        t_N=t_N.float(),
        num_maskable=len(target_N),
    )


def read_inputs(rows: CleanRows, xt_RL: Tensor, block_RL: Tensor, start_id: int | None) -> Tensor:
    """What the model reads at each position of a copy `xt_RL`: the token there; shifted, the one before.

    The token before a block is always clean: blocks that lie before are given. Before a document stands the start token.

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
class Piece:
    """One part of the stream: which row positions it takes (0 where `valid` is False), and what stands there."""

    source: Tensor
    valid: Tensor
    tokens: Tensor
    copy: int

    def gather(self, values_RL: Tensor) -> Tensor:
        taken = values_RL.gather(1, self.source)
        return torch.where(self.valid, taken, torch.zeros_like(taken))


def _needed(rows: CleanRows, block_RL: Tensor, *, last_clean: bool) -> tuple[Tensor, Tensor]:
    """Row positions that a noisy copy, and the clean copy, must hold; `last_clean`: the latter with the last noisy block."""
    group_RL, num_groups = block_groups(rows, block_RL)
    document_RL, num_documents = block_groups(rows, torch.zeros_like(block_RL))
    noisy_block = torch.zeros(num_groups, dtype=torch.bool, device=block_RL.device)
    noisy_block[group_RL[rows.maskable_RL]] = True
    noisy_RL = noisy_block[group_RL] & (rows.segment_RL > 0)
    last_noisy = torch.full((num_documents,), -1, dtype=torch.int64, device=block_RL.device)
    last_noisy.scatter_reduce_(0, document_RL[noisy_RL], block_RL[noisy_RL], "amax")
    last_RL = last_noisy[document_RL]
    clean_RL = block_RL <= last_RL if last_clean else block_RL < last_RL
    return noisy_RL, clean_RL & (rows.segment_RL > 0)


def compact(rows: CleanRows, keep_RL: Tensor, tokens_RL: Tensor, copy: int) -> Piece:
    """Move the kept positions of every row to its front; the width is the fullest row's."""
    width = max(1, int(keep_RL.sum(1).max()))
    order = torch.argsort((~keep_RL).to(torch.int8), dim=1, stable=True)[:, :width]
    valid = keep_RL.gather(1, order)
    source = torch.where(valid, order, torch.zeros_like(order))
    tokens = torch.where(valid, tokens_RL.gather(1, source), rows.tokens_RL.gather(1, source))
    return Piece(source, valid, tokens, copy)


def corrupt(rows: CleanRows, config: CorruptionConfig, seed: int) -> Stream:
    """Mask the rows and lay them out: `build_stream(rows, noisy_copies(rows))`."""
    return build_stream(rows, noisy_copies(rows, config, seed), config)


def next_token_stream(rows: CleanRows) -> Stream:
    """The rows as an autoregressive model reads them: clean, causal in each document, every maskable token predicted one
    position ahead. A document's first token has nobody to predict it and counts for nothing."""
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
