"""What verified decoding asks of a model, as a training stream: everything behind what is known is masked, a block far.

Owns the layout of drafts. The engine's rows up to the first unknown token are causal, and the open ones behind all read the
mask (`engine.verified`); here the clean copy is the former, and each noisy copy the latter, for every block of a row at once.

Legend: R rows, L row length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.diffusion.corrupt import CleanRows, Stream, assemble, block_groups, block_ids, compact, read_inputs
from unmask.diffusion.masks import CLEAN
from unmask.errors import ConfigError


@dataclass(frozen=True)
class DraftConfig:
    """How drafts are asked for: blocks of `block_size`, of which the first token is the causal rows' own.

    `draws` cut every document into blocks at as many different places, over one clean copy: the first so that a block begins
    with what is learnt, where an answer does. A draft `n` tokens behind the first one weighs `decay ** n`, since it counts
    only where all those before it hold.
    """

    mask_id: int
    start_id: int
    block_size: int
    draws: int = 1
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ConfigError(f"block size is {self.block_size}; drafts take blocks of 2 tokens or more")
        if self.draws < 1 or self.draws > self.block_size:
            raise ConfigError(f"{self.draws} draws of drafts; use 1 to {self.block_size}, the block size")


def draft_stream(rows: CleanRows, config: DraftConfig) -> Stream:
    """The rows with a noisy copy for each draw: of every block what lies behind its first maskable token, masked throughout.

    A block's open rows see the clean rows up to and including the one that predicts its first maskable token, and each other.
    `num_maskable` counts what is predicted.

    Source: TiDAR (2511.08923) section 3; the shift of the blocks by draws is ours.
    """
    pieces, orders, picked = [], [], []
    masks_RL = torch.full_like(rows.tokens_RL, config.mask_id)
    last_RL = torch.full_like(rows.position_RL, -1)
    begin_RL = _first_maskable(rows, torch.zeros_like(rows.position_RL))
    for draw in range(config.draws):
        behind_RL = rows.position_RL - begin_RL + draw * config.block_size // config.draws
        block_RL = block_ids(behind_RL, config.block_size)
        first_RL = _first_maskable(rows, block_RL)
        drafted_RL = rows.maskable_RL & (rows.position_RL > first_RL)
        pieces.append(compact(rows, drafted_RL, masks_RL, draw + 1))
        orders.append(first_RL + 1)
        weight_RL = config.decay ** (rows.position_RL - first_RL - 1).clamp(min=0).float()
        picked.append((drafted_RL, weight_RL, torch.ones_like(weight_RL)))
        last_RL = torch.maximum(last_RL, torch.where(drafted_RL, first_RL, -1))
    clean_RL = (rows.position_RL <= _largest(rows, last_RL)) & (rows.segment_RL > 0)
    first_of_all = torch.zeros_like(rows.position_RL)
    pieces.append(compact(rows, clean_RL, read_inputs(rows, rows.tokens_RL, first_of_all, config.start_id), CLEAN))
    return assemble(rows, pieces, [*orders, rows.position_RL], picked)


def _first_maskable(rows: CleanRows, block_RL: Tensor) -> Tensor:
    """Position in the document of the first maskable token of each one's block; past the row where there is none."""
    group_RL, count = block_groups(rows, block_RL)
    first = torch.full((count,), block_RL.shape[1], dtype=torch.int64, device=block_RL.device)
    first.scatter_reduce_(0, group_RL[rows.maskable_RL], rows.position_RL[rows.maskable_RL], "amin")
    return first[group_RL]


def _largest(rows: CleanRows, values_RL: Tensor) -> Tensor:
    """The largest value of each position's document."""
    group_RL, count = block_groups(rows, torch.zeros_like(values_RL))
    largest = torch.full((count,), -1, dtype=torch.int64, device=values_RL.device)
    largest.scatter_reduce_(0, group_RL.flatten(), values_RL.flatten(), "amax")
    return largest[group_RL]
