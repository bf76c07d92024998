"""The compact stream against the naive computations it replaces, prediction by prediction, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiny import MASK, Doc, Rows, pack, text, tiny_model
from unmask.diffusion.corrupt import CorruptionConfig, NoisyCopy, Stream, build_stream, noisy_copies
from unmask.diffusion.masks import blocked_mask, dense_mask
from unmask.models.arch.attention import BlockedAttend, DenseAttend
from unmask.models.arch.transformer import Transformer

Where = tuple[int, int, int, int]  # epoch, ordinal, copy, position
MODELS = {family: tiny_model(family, 3, torch.float64) for family in ("llama", "llada2")}


def nll(model: Transformer, hidden_ND: Tensor, target_N: Tensor) -> Tensor:
    """float64 [N], the mask token excluded from the distribution."""
    logits = model.head(hidden_ND)
    others = logits[:, [i for i in range(logits.shape[1]) if i != MASK]]
    return others.logsumexp(-1) - logits.gather(1, target_N[:, None])[:, 0]


@torch.no_grad()
def of_stream(model: Transformer, stream: Stream, *, blocked: bool = False) -> dict[Where, float]:
    index = stream.index
    attend = BlockedAttend(blocked_mask(index, query_tile=8, key_tile=4)) if blocked else DenseAttend(dense_mask(index))
    hidden = model(stream.tokens_BT, stream.position_BT, attend)
    at = stream.predict
    names = zip(stream.epoch_BT[at], stream.ordinal_BT[at], index.copy_BT[at], stream.position_BT[at], strict=True)
    values = nll(model, hidden[at], stream.target_N).tolist()
    return {tuple(int(part) for part in name): value for name, value in zip(names, values, strict=True)}


def identity(rows: Rows, row: int, column: int, copy: int) -> Where:
    return (int(rows.epoch_RL[row, column]), int(rows.ordinal_RL[row, column]), copy, int(rows.position_RL[row, column]))


@torch.no_grad()
def of_full_layout(model: Transformer, rows: Rows, copies: list[NoisyCopy], block_size: int) -> dict[Where, float]:
    """Each copy on its own as `[x_t | x_0]`, whole rows with their padding, the mask written out from the table."""
    length = rows.tokens_RL.shape[1]
    segment = rows.segment_RL.repeat(1, 2)
    block = (rows.position_RL // block_size).repeat(1, 2)
    noisy = torch.arange(2 * length) < length
    q_noisy, k_noisy = noisy[:, None], noisy[None, :]
    q_block, k_block = block[:, :, None], block[:, None, :]
    allowed = (
        (q_noisy & k_noisy & (q_block == k_block))
        | (q_noisy & ~k_noisy & (q_block > k_block))
        | (~q_noisy & ~k_noisy & (q_block >= k_block))
    ) & (segment[:, :, None] == segment[:, None, :])
    found: dict[Where, float] = {}
    for number, copy in enumerate(copies, start=1):
        xt = torch.where(copy.masked_RL, MASK, rows.tokens_RL)
        positions = rows.position_RL.repeat(1, 2)
        hidden = model(torch.cat((xt, rows.tokens_RL), 1), positions, DenseAttend(allowed))
        at = torch.nonzero(copy.masked_RL, as_tuple=True)
        for row, column, value in zip(*at, nll(model, hidden[at], rows.tokens_RL[at]), strict=True):
            found[identity(rows, int(row), int(column), number)] = float(value)
    return found


@torch.no_grad()
def of_single_blocks(model: Transformer, rows: Rows, copies: list[NoisyCopy], block_size: int | None) -> dict[Where, float]:
    """One forward per block: the document's clean past and the noisy block, as at inference; no packing, no second copy."""
    found: dict[Where, float] = {}
    for number, copy in enumerate(copies, start=1):
        for _, at, row in rows.places():
            tokens, masked = rows.tokens_RL[row, at], copy.masked_RL[row, at]
            size = len(tokens) if block_size is None else block_size
            for start in range(0, len(tokens), size):
                stop = min(start + size, len(tokens))
                hidden_here = masked[start:stop]
                if not hidden_here.any():
                    continue
                current = torch.where(hidden_here, MASK, tokens[start:stop])
                canvas = torch.cat((tokens[:start], current))[None]
                block = torch.arange(stop) // size
                mask = (block[:, None] >= block[None, :])[None]
                hidden = model(canvas, torch.arange(stop)[None], DenseAttend(mask))[0, start:][hidden_here]
                columns = (torch.nonzero(hidden_here)[:, 0] + start + at.start).tolist()
                for column, value in zip(columns, nll(model, hidden, tokens[start:stop][hidden_here]), strict=True):
                    found[identity(rows, row, column, number)] = float(value)
    return found


def rows_to_score() -> Rows:
    """Pre-training documents, prompts of every alignment, gaps in the supervision, padding, a row with nothing to learn."""
    gaps = Doc(text(13, 7).tokens, tuple(i in (2, 3, 8, 12) for i in range(13)), 7)
    return pack(
        [
            [text(11, 0), text(9, 1, prompt=4, epoch=2)],
            [text(7, 2, prompt=3), text(1, 3), text(10, 4, prompt=9)],
            [text(6, 5, prompt=6)],
            [gaps, text(5, 6, prompt=5)],
        ],
        23,
    )


CONFIGS = [
    CorruptionConfig(MASK, block_size, complementary=complementary, sampling=sampling)
    for block_size, complementary, sampling in [
        (1, False, "bernoulli"),
        (2, True, "bernoulli"),
        (4, False, "fixed_count"),
        (4, True, "bernoulli"),
        (5, False, "bernoulli"),
        (8, True, "fixed_count"),
    ]
]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_size}-{c.num_copies}-{c.sampling}")
def test_the_compact_stream_equals_both_naive_layouts(family: str, config: CorruptionConfig) -> None:
    model, rows = MODELS[family], rows_to_score()
    assert config.block_size is not None
    copies = noisy_copies(rows, config, 1)
    found = of_stream(model, build_stream(rows, copies, config))
    assert len(found) == sum(int(copy.masked_RL.sum()) for copy in copies) > 0
    for naive in (
        of_full_layout(model, rows, copies, config.block_size),
        of_single_blocks(model, rows, copies, config.block_size),
    ):
        assert found == pytest.approx(naive, abs=1e-9, rel=0)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("complementary", [False, True])
def test_full_sequence_diffusion_is_one_bidirectional_forward(family: str, complementary: bool) -> None:
    model, rows, config = MODELS[family], rows_to_score(), CorruptionConfig(MASK, None, complementary=complementary)
    copies = noisy_copies(rows, config, 1)
    found, naive = of_stream(model, build_stream(rows, copies, config)), of_single_blocks(model, rows, copies, None)
    assert found == pytest.approx(naive, abs=1e-9, rel=0)


@pytest.mark.parametrize("family", MODELS)
def test_tiled_attention_computes_the_same(family: str) -> None:
    rows, config = rows_to_score(), CorruptionConfig(MASK, 4, complementary=True)
    stream = build_stream(rows, noisy_copies(rows, config, 1), config)
    model = MODELS[family]
    assert of_stream(model, stream, blocked=True) == pytest.approx(of_stream(model, stream), abs=1e-9, rel=0)


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(1, 10), st.integers(0, 6)), min_size=1, max_size=4),
    st.sampled_from([None, 1, 3, 4]),
    st.booleans(),
)
def test_a_document_scores_the_same_alone_and_packed(
    sizes: list[tuple[int, int]], block_size: int | None, complementary: bool
) -> None:
    docs = [text(length, n, prompt=min(prompt, length)) for n, (length, prompt) in enumerate(sizes)]
    config = CorruptionConfig(MASK, block_size, complementary=complementary)
    together = pack([docs], 45)
    packed_nll = of_stream(MODELS["llama"], build_stream(together, noisy_copies(together, config, 0), config))
    alone_nll: dict[Where, float] = {}
    for doc in docs:
        alone = pack([[doc]], len(doc.tokens))
        alone_nll |= of_stream(MODELS["llama"], build_stream(alone, noisy_copies(alone, config, 0), config))
    assert packed_nll == pytest.approx(alone_nll, abs=1e-9, rel=0)
