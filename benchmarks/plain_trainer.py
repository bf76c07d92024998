"""The trainer everybody writes, which `train_step.py` measures ours against: short, obvious, and right.

The network is transformers' own class with its default attention (`sdpa`), as people would take it. Every noisy copy is a row
of its own, `[x_t | x_0]` of 2L tokens under a dense boolean mask, prompt and padding included; the head projects every position
onto the whole vocabulary, and the masked ones are picked from the loss afterwards. bfloat16 is autocast over float32 weights.
The masks are ours (`noisy_copies`), so the gradient must be ours too.

Legend: R rows, L row length, T = 2L (or L without a clean copy), V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from unmask.data.packing import PackedRows
from unmask.diffusion.corrupt import CorruptionConfig, block_ids, noisy_copies


def load_network(folder: Path) -> nn.Module:
    """The checkpoint as transformers sees it, in float32."""
    network: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # It drops the input gradient of the padding token, which here ends every answer, too.
    embedding = network.get_submodule("model.embed_tokens")
    assert isinstance(embedding, nn.Embedding)
    embedding.padding_idx = None
    return network.train()


def layout(rows: PackedRows, xt_RL: Tensor, block_size: int | None, *, clean_copy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and positions [R, T] of `[x_t | x_0]` (or of `x_t` alone), and who may attend to whom [R, 1, T, T]."""
    copies = 2 if clean_copy else 1
    tokens = torch.cat((xt_RL, rows.tokens_RL), 1) if clean_copy else xt_RL
    positions, document = rows.position_RL.repeat(1, copies), rows.segment_RL.repeat(1, copies)
    block = block_ids(positions, block_size)
    noisy = (torch.arange(tokens.shape[1]) < xt_RL.shape[1]).expand_as(tokens)
    q_block, k_block = block[:, :, None], block[:, None, :]
    q_noisy, k_noisy = noisy[:, :, None], noisy[:, None, :]
    allowed = (
        (q_noisy & k_noisy & (q_block == k_block))
        | (q_noisy & ~k_noisy & (q_block > k_block))
        | (~q_noisy & ~k_noisy & (q_block >= k_block))
    ) & (document[:, :, None] == document[:, None, :])
    return tokens, positions, allowed[:, None]


def accumulate(
    network: nn.Module, rows: PackedRows, config: CorruptionConfig, seed: int, dtype: torch.dtype, *, clean_copy: bool = True
) -> float:
    """Add the gradient of the rows' NELBO; returns it (nats a token). `clean_copy`: False for full-sequence diffusion only."""
    copies = noisy_copies(rows, config, seed)
    masked = torch.cat([copy.masked_RL for copy in copies])
    weight = torch.cat([copy.weight_RL for copy in copies])
    x0 = rows.tokens_RL.repeat(len(copies), 1)
    tall = PackedRows(*(getattr(rows, name).repeat(len(copies), 1) for name in rows.__dataclass_fields__))
    xt = torch.where(masked, config.mask_id, x0)
    tokens, positions, allowed = layout(tall, xt, config.block_size, clean_copy=clean_copy)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = network(input_ids=tokens, position_ids=positions, attention_mask=allowed, use_cache=False).logits
    logits = logits.float()
    logits[..., config.mask_id] = float("-inf")
    # The clean copy has logits, too; nobody asks for them.
    target = torch.cat((x0, x0), 1) if clean_copy else x0
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)[:, : x0.shape[1]]
    loss = torch.where(masked, nll * weight, 0.0).sum() / tall.num_maskable
    loss.backward()
    return float(loss.detach())
