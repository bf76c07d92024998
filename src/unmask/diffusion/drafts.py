"""Draft tokens of self-speculative decoding as a training stream: behind the first token of a block everything is masked.

Owns the layout of drafts. In a forward of the engine the verify tokens, up to the first unknown one, are causal, and the draft
tokens behind are all masked (`engine.sequences.speculative`); here the clean copy holds the former and each noisy copy the
latter, for every block of a row at once.

Legend: R rows, L row length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.diffusion.corrupt import (
    CleanRows,
    CompactCopy,
    NoisyCopy,
    Stream,
    assemble,
    causal_copy,
    compact,
    largest_in_block,
)
from unmask.errors import ConfigError


@dataclass(frozen=True)
class DraftConfig:
    """Layout of drafts: blocks of `block_size`, whose first token a verify token predicts and the others are drafts.

    Every answer is cut into blocks of its own in `cuts` ways, over one clean copy, the first so that a block begins where it
    does: no draft goes over a user's turn, which decoding reads before it drafts. Draft token `n` of a block (from 0) weighs
    `decay ** n`, since it is accepted only if all before it are.
    """

    mask_id: int
    start_id: int
    block_size: int
    cuts: int = 1
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ConfigError(f"block size is {self.block_size}; drafts take blocks of 2 tokens or more")
        if self.cuts < 1 or self.cuts > self.block_size:
            raise ConfigError(f"cuts is {self.cuts}; use 1 to {self.block_size}, the block size")


def draft_stream(rows: CleanRows, config: DraftConfig, *, verified: bool = False) -> Stream:
    """The rows with a noisy copy for each cut: of every block the maskable tokens behind its first one, all masked.

    The draft tokens of a block attend to the clean tokens up to and including the one that predicts its first maskable token,
    and to each other. `num_maskable` counts predictions. The clean copy predicts nothing and ends where drafts stop reading it;
    `verified`: it goes on to the row that verifies the last draft, so that each draft token has its verify token there
    (`joint.clean_columns`).

    Source: TiDAR (2511.08923) section 3; cutting the blocks in several ways is ours.
    """
    copies, last_RL = draft_copies(rows, config, rows.maskable_RL)
    if verified:
        whole_RL = torch.zeros_like(rows.position_RL)
        last_RL = largest_in_block(rows, whole_RL, rows.position_RL, rows.maskable_RL, -1)
    return assemble(rows, [*copies, causal_copy(rows, last_RL, config.start_id)])


def draft_copies(rows: CleanRows, config: DraftConfig, learnt_RL: Tensor) -> tuple[list[CompactCopy], Tensor]:
    """The noisy copies of `draft_stream`, of the tokens `learnt_RL`, and the last clean position that each document needs."""
    copies: list[CompactCopy] = []
    masks_RL = torch.full_like(rows.tokens_RL, config.mask_id)
    last_RL = torch.full_like(rows.position_RL, -1)
    begin_RL = _begin_of_answer(rows, learnt_RL)
    for cut in range(config.cuts):
        offset_RL = rows.position_RL - begin_RL + cut * config.block_size // config.cuts
        first_RL = torch.maximum(rows.position_RL - offset_RL % config.block_size, begin_RL)
        drafted_RL = learnt_RL & (rows.position_RL > first_RL)
        weight_RL = config.decay ** (rows.position_RL - first_RL - 1).clamp(min=0).float()
        predicted = NoisyCopy(drafted_RL, torch.ones_like(weight_RL), weight_RL)
        copies.append(compact(rows, drafted_RL, masks_RL, cut + 1, first_RL + 1, predicted))
        last_RL = torch.maximum(last_RL, torch.where(drafted_RL, first_RL, -1))
    whole_RL = torch.zeros_like(rows.position_RL)  # the document as one block
    return copies, largest_in_block(rows, whole_RL, last_RL, last_RL >= 0, -1)


def _begin_of_answer(rows: CleanRows, learnt_RL: Tensor) -> Tensor:
    """Position in the document of the first of the learnt tokens, one behind the other, that each learnt token is among."""
    goes_on_RL = torch.zeros_like(learnt_RL)
    goes_on_RL[:, 1:] = learnt_RL[:, :-1] & (rows.segment_RL[:, 1:] == rows.segment_RL[:, :-1])
    column_L = torch.arange(learnt_RL.shape[1], device=learnt_RL.device)
    begin_RL = torch.where(learnt_RL & ~goes_on_RL, column_L, 0).cummax(dim=1).values
    return rows.position_RL.gather(1, begin_RL)
