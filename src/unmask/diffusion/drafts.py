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
    block_ids,
    causal_copy,
    compact,
    extreme_in_block,
)
from unmask.errors import ConfigError


@dataclass(frozen=True)
class DraftConfig:
    """Layout of drafts: blocks of `block_size`, whose first token a verify token predicts and the others are drafts.

    Every document is cut into blocks in `cuts` ways, over one clean copy, the first so that a block begins where an answer
    does. Draft token `n` of a block (from 0) weighs `decay ** n`, since it is accepted only if all before it are.
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


def draft_stream(rows: CleanRows, config: DraftConfig) -> Stream:
    """The rows with a noisy copy for each cut: of every block the maskable tokens behind its first one, all masked.

    The draft tokens of a block attend to the clean tokens up to and including the one that predicts its first maskable token,
    and to each other. `num_maskable` counts predictions.

    Source: TiDAR (2511.08923) section 3; cutting the blocks in several ways is ours.
    """
    copies, last_RL = draft_copies(rows, config, rows.maskable_RL)
    return assemble(rows, [*copies, causal_copy(rows, last_RL, config.start_id)])


def draft_copies(rows: CleanRows, config: DraftConfig, learnt_RL: Tensor) -> tuple[list[CompactCopy], Tensor]:
    """The noisy copies of `draft_stream`, of the tokens `learnt_RL`, and the last clean position that each document needs."""
    copies: list[CompactCopy] = []
    masks_RL = torch.full_like(rows.tokens_RL, config.mask_id)
    last_RL = torch.full_like(rows.position_RL, -1)
    whole_RL = torch.zeros_like(rows.position_RL)  # the document as one block
    begin_RL = _first_learnt(rows, whole_RL, learnt_RL)
    for cut in range(config.cuts):
        offset_RL = rows.position_RL - begin_RL + cut * config.block_size // config.cuts
        first_RL = _first_learnt(rows, block_ids(offset_RL, config.block_size), learnt_RL)
        drafted_RL = learnt_RL & (rows.position_RL > first_RL)
        weight_RL = config.decay ** (rows.position_RL - first_RL - 1).clamp(min=0).float()
        predicted = NoisyCopy(drafted_RL, torch.ones_like(weight_RL), weight_RL)
        copies.append(compact(rows, drafted_RL, masks_RL, cut + 1, first_RL + 1, predicted))
        last_RL = torch.maximum(last_RL, torch.where(drafted_RL, first_RL, -1))
    return copies, extreme_in_block(rows, whole_RL, last_RL, last_RL >= 0, "amax", -1)


def _first_learnt(rows: CleanRows, block_RL: Tensor, learnt_RL: Tensor) -> Tensor:
    """Position in the document of the first learnt token of each token's block; the row length where there is none."""
    return extreme_in_block(rows, block_RL, rows.position_RL, learnt_RL, "amin", block_RL.shape[1])
