"""Joint training of causal and noisy rows as one stream: drafts, random masks, and a clean copy that predicts the next token.

Owns the layout of shifted models that are to decode in three ways: token by token, by verified drafts, and by denoising.

Legend: R rows, L row length, N predictions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unmask.diffusion.corrupt import (
    CleanRows,
    CompactCopy,
    CorruptionConfig,
    NoisyCopy,
    Stream,
    assemble,
    causal_copy,
    largest_in_block,
    masked_copies,
    noisy_copies,
)
from unmask.diffusion.drafts import DraftConfig, draft_copies
from unmask.diffusion.masks import CLEAN


@dataclass(frozen=True)
class JointConfig:
    """What the rows of a stream are.

    Attributes:
        start_id: read before a document.
        end_ids: tokens that end a text. Those that fill a block behind the first are for the random masks alone: neither
            decoding token by token nor drafts go on behind an end.
        drafts: blocks that are all masked; None: none.
        masks: random masks; None: none.
    """

    start_id: int
    end_ids: Collection[int] = ()
    drafts: DraftConfig | None = None
    masks: CorruptionConfig | None = None

    @property
    def num_draft_copies(self) -> int:
        """Noisy copies of drafts, which come first."""
        return 0 if self.drafts is None else self.drafts.cuts


def joint_stream(rows: CleanRows, config: JointConfig, seed: int) -> Stream:
    """The rows as noisy copies of drafts, noisy copies with random masks, and a clean copy that predicts every learnt token.

    `num_maskable` counts maskable tokens once for each copy of random masks.

    Source: TiDAR (2511.08923) section 3 for the sum of both losses over one clean copy; random masks beside drafts are ours.
    """
    copies: list[CompactCopy] = []
    learnt_RL = without_fill(rows, config.end_ids)
    if config.drafts is not None:
        copies += draft_copies(rows, config.drafts, learnt_RL)[0]
    num_masked = 0
    if config.masks is not None:
        masked = noisy_copies(rows, config.masks, seed)
        copies += masked_copies(rows, masked, config.masks, first=len(copies) + 1)
        num_masked = len(masked)
    whole_RL = torch.zeros_like(rows.position_RL)  # the document as one block
    last_RL = largest_in_block(rows, whole_RL, rows.position_RL, rows.maskable_RL, -1)
    ones_RL = torch.ones_like(learnt_RL, dtype=torch.float32)
    copies.append(causal_copy(rows, last_RL, config.start_id, NoisyCopy(learnt_RL, ones_RL, ones_RL)))
    return replace(assemble(rows, copies), num_maskable=int(rows.maskable_RL.sum()) * num_masked)


def without_fill(rows: CleanRows, end_ids: Collection[int]) -> Tensor:
    """The maskable tokens [R, L] that are not end tokens right behind another one."""
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=rows.tokens_RL.device)
    ends_RL = torch.isin(rows.tokens_RL, ends) & rows.maskable_RL
    filled_RL = torch.zeros_like(ends_RL)
    same_document_RL = rows.segment_RL[:, 1:] == rows.segment_RL[:, :-1]
    filled_RL[:, 1:] = ends_RL[:, 1:] & ends_RL[:, :-1] & same_document_RL
    return rows.maskable_RL & ~filled_RL


def clean_columns(stream: Stream) -> Tensor:
    """Of each noisy prediction, the column of the clean copy that predicts the same token; int64, as many as there are."""
    index, noisy_N = stream.index, stream.copy_N != CLEAN
    length = int(stream.position_BT.max()) + 1
    key_BT = index.document_BT * length + stream.position_BT
    row_BT = torch.arange(key_BT.shape[0], device=key_BT.device)[:, None].expand_as(key_BT)
    column_BT = torch.arange(key_BT.shape[1], device=key_BT.device).expand_as(key_BT)
    clean_BT = (index.copy_BT == CLEAN) & (index.document_BT > 0)
    table = torch.zeros(key_BT.shape[0], int(key_BT.max()) + 1, dtype=torch.int64, device=key_BT.device)
    table[row_BT[clean_BT], key_BT[clean_BT]] = column_BT[clean_BT]
    row_N, column_N = (place_N[noisy_N] for place_N in stream.predict)
    return table[row_N, key_BT[row_N, column_N]]
