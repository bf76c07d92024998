"""The training forward: hidden states at the predicted positions of a stream.

Owns the choice of attention backend, and the split forward of models with gated LoRA. Knows nothing of optimisers, files or the
loop.

Legend: B rows, T stream positions, N predictions, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from unmask.diffusion.corrupt import Stream
from unmask.diffusion.joint import clean_columns
from unmask.diffusion.masks import CLEAN, StreamIndex, blocked_mask, dense_mask, flex_mask_mod
from unmask.models.arch.attention import Attend, BlockedAttend, DenseAttend, FlexAttend
from unmask.models.arch.transformer import Layers, Transformer
from unmask.train.passes import StageLayers
from unmask.train.router import RouterMonitor

if TYPE_CHECKING:
    from unmask.train.parallel.context import ContextShard

AttentionBackend = Literal["dense", "blocked", "flex"]


def make_attend(index: StreamIndex, backend: AttentionBackend, num_queries: int | None = None) -> Attend:
    """Attention under the training mask of a stream; all backends compute the same.

    `num_queries`: the queries are so many of the first positions, the keys all.
    """
    rows, length = index.copy_BT.shape
    if backend == "flex":
        # Imported here: it loads torch._dynamo, which takes seconds and which only this backend needs.
        from torch.nn.attention.flex_attention import create_block_mask

        device, queries = index.copy_BT.device, num_queries or length
        return FlexAttend(create_block_mask(flex_mask_mod(index), rows, None, queries, length, device=device))
    asking = None if num_queries is None else index[:, :num_queries]
    if backend == "dense":
        return DenseAttend(dense_mask(index, queries=asking))
    return BlockedAttend(blocked_mask(index, queries=asking))


def predicted_hidden(
    model: Transformer,
    stream: Stream,
    backend: AttentionBackend,
    noise_BTD: Tensor | None = None,
    router: RouterMonitor | None = None,
    context: ContextShard | None = None,
) -> Tensor:
    """Hidden states [N, D] of the stream's predictions.

    `noise_BTD` is added to the embeddings; `router` counts which experts the tokens are sent to; `context` is this rank's share
    of the positions, which the predictions must belong to (None: all of them).
    """
    at = stream.predict if context is None else context.local(stream).predict
    if model.config.gated_lora_rank is not None:
        return gated_hidden(model, model, stream, backend, noise_BTD, context)[at]
    return stream_hidden(model, stream, backend, noise_BTD, router, context)[at]


@contextmanager
def layer_outputs(model: Transformer) -> Iterator[list[Tensor]]:
    """What every layer of the model gives in the forward pass inside the `with` block, in order; [B, T, D] each."""
    outputs: list[Tensor] = []
    # Behind the block the hooks are gone: a layer that is computed once more for its gradient is not recorded again.
    handles = [block.register_forward_hook(lambda module, args, out: outputs.append(out)) for block in model.blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class DraftStates(NamedTuple):
    """Hidden states that predict the N draft tokens of a stream, and those of the verify tokens that predict the same.

    `draft_ND` and `verify_ND` are what the head reads, `draft_LND` and `verify_LND` what each layer gives (empty where not
    asked for). No gradient reaches `verify_ND`.
    """

    draft_ND: Tensor
    verify_ND: Tensor
    draft_LND: list[Tensor]
    verify_LND: list[Tensor]


def draft_states(
    model: Transformer, stream: Stream, backend: AttentionBackend, router: RouterMonitor | None = None, *, layers: bool
) -> DraftStates:
    """States of a `draft_stream` whose clean copy verifies every draft, in one forward; `layers`: behind each layer, too."""
    (row_N, draft_N), verify_N = stream.predict, clean_columns(stream)
    outputs = list[Tensor]()
    with layer_outputs(model) if layers else nullcontext(outputs) as outputs:
        if model.config.gated_lora_rank is None:
            noisy_BTD = clean_BTD = stream_hidden(model, stream, backend, None, router)
        else:
            noisy_BTD, clean_BTD = _gated_and_clean_hidden(model, stream, backend)
    noisy_LBTD = clean_LBTD = outputs
    if model.config.gated_lora_rank is not None:
        # Two passes: the clean copy's comes first, and has columns of its own.
        clean_LBTD, noisy_LBTD = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
        verify_N = verify_N - num_noisy(stream)
    return DraftStates(
        noisy_BTD[row_N, draft_N],
        clean_BTD[row_N, verify_N].detach(),
        [x_BTD[row_N, draft_N] for x_BTD in noisy_LBTD],
        [x_BTD[row_N, verify_N] for x_BTD in clean_LBTD],
    )


def _gated_and_clean_hidden(model: Transformer, stream: Stream, backend: AttentionBackend) -> tuple[Tensor, Tensor]:
    """`gated_hidden`, and the hidden states of the clean copy, which it drops."""
    clean: list[Tensor] = []

    def clean_layers(tokens_BT: Tensor, positions_BT: Tensor, attend: Attend, **options: Tensor | None) -> Tensor:
        clean.append(model(tokens_BT, positions_BT, attend, **options))
        return clean[0]

    return gated_hidden(clean_layers, model, stream, backend, None), clean[0]


def stream_hidden(
    layers: Layers,
    stream: Stream,
    backend: AttentionBackend,
    noise_BTD: Tensor | None,
    router: RouterMonitor | None,
    context: ContextShard | None = None,
) -> Tensor:
    """Hidden states [B, T, D] of a stream, or of this rank's share of it; the arguments are those of `predicted_hidden`."""
    attend = make_attend(stream.index, backend)
    if context is not None:
        layers = context.divide(layers)
    if router is None:
        return layers(stream.tokens_BT, stream.position_BT, attend, input_noise=noise_BTD)
    with router.watching(stream if context is None else context.local(stream), attend) as watched:
        return layers(stream.tokens_BT, stream.position_BT, watched, input_noise=noise_BTD)


def gated_hidden(
    clean_layers: Layers,
    noisy_layers: Layers,
    stream: Stream,
    backend: AttentionBackend,
    noise_BTD: Tensor | None,
    context: ContextShard | None = None,
) -> Tensor:
    """Hidden states of the noisy copies, which come first in the stream, of a model with gated LoRA.

    The clean copy passes through frozen weights only, so it runs first, without a graph, and leaves its keys and values.
    """
    if context is not None:
        clean_layers, noisy_layers = context.divide(clean_layers), context.divide(noisy_layers)
    index = stream.index
    count = num_noisy(stream)
    noisy, clean = (slice(None), slice(count)), (slice(None), slice(count, None))
    assert bool((stream.predict[1] < count).all()), "the clean copy predicts nothing here"
    attend_noisy = make_attend(index, backend, count)
    if count < index.copy_BT.shape[1]:
        attend_clean, attend_noisy = over_clean_copy(make_attend(index[clean], backend), attend_noisy)
        with torch.no_grad():
            clean_layers(stream.tokens_BT[clean], stream.position_BT[clean], attend_clean)
    noise = None if noise_BTD is None else noise_BTD[noisy]
    noisy_BT = torch.ones_like(index.copy_BT[noisy], dtype=torch.bool)
    return noisy_layers(stream.tokens_BT[noisy], stream.position_BT[noisy], attend_noisy, input_noise=noise, noisy_BT=noisy_BT)


def over_clean_copy(attend_clean: Attend, attend_all: Attend) -> tuple[Attend, Attend]:
    """Attention of the clean copy, which leaves its keys and values, and of the noisy copies after it, which read them, too.

    Args:
        attend_clean: of the clean copy to itself.
        attend_all: of the noisy copies to themselves and, behind these, the clean copy.
    """
    clean_kv: dict[int, tuple[Tensor, Tensor]] = {}

    def leave(layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        # Values alone: as they come they are a part of what was projected together.
        clean_kv[layer] = (k_BGTS, v_BGTS.contiguous())
        return attend_clean(layer, q_BHTS, k_BGTS, v_BGTS)

    def read(layer: int, q_BHTS: Tensor, k_BGTS: Tensor, v_BGTS: Tensor) -> Tensor:
        k, v = clean_kv[layer]
        return attend_all(layer, q_BHTS, torch.cat((k_BGTS, k), dim=2), torch.cat((v_BGTS, v), dim=2))

    return leave, read


def stage_hidden(
    layers: StageLayers,
    received: tuple[Tensor, ...] | None,
    stream: Stream,
    backend: AttentionBackend,
    noise_BTD: Tensor | None,
    router: RouterMonitor | None,
    context: ContextShard | None,
    *,
    gated: bool,
) -> tuple[Tensor, ...]:
    """Hidden states of a stream after the layers of one stage, in the parts that `stage_lengths` names.

    `received` are those of the stage before; `gated`: the model has gated LoRA. Other arguments as of `predicted_hidden`.
    """
    if not gated:
        one = partial(layers, received_BTD=None if received is None else received[0])
        return (stream_hidden(one, stream, backend, noise_BTD, router, context),)
    clean: list[Tensor] = []

    def clean_layers(tokens_BT: Tensor, positions_BT: Tensor, attend: Attend, **options: Tensor | None) -> Tensor:
        before_BTD = None if received is None else received[1]
        clean.append(layers(tokens_BT, positions_BT, attend, received_BTD=before_BTD, **options))
        return clean[0]

    noisy_layers = partial(layers, received_BTD=None if received is None else received[0])
    return (gated_hidden(clean_layers, noisy_layers, stream, backend, noise_BTD, context), *clean)


def stage_lengths(stream: Stream, context_ranks: int, *, gated: bool) -> tuple[int, ...]:
    """Positions, of this rank, of each part of a stream that stages run by itself: with gated LoRA noisy copies, clean copy."""
    length = stream.tokens_BT.shape[1]
    count = num_noisy(stream) if gated else length
    return tuple(-(-part // context_ranks) for part in (count, length - count) if part)


def num_noisy(stream: Stream) -> int:
    """Positions of the noisy copies, which come first."""
    return int((stream.index.copy_BT[0] != CLEAN).sum())
