"""The kernels' gated LoRA: noisy rows against torch, and clean rows against the packed parent, to the bit."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from models.native.test_packed import SLOTS, exactly_summed, new_kv_cache, plain_attend, rounded_product, run_with_threads
from tiny import MASK, row_errors, tiny_model
from unmask.engine.backends.native import NativeBackend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.arch.layers import GatedLoraLinear
from unmask.models.arch.transformer import Transformer
from unmask.models.native.interface import Kernels
from unmask.models.native.packing import FLOAT_BITS, pack_model
from unmask.models.native.rotation import mix, mixed_channels

# Odd sizes and ranks, so that every tail of every loop runs; each with a rank.
MODELS = {
    "llama": (20, {"family": "llama", "hidden_size": 52, "ffn_size": 75, "num_heads": 6, "num_kv_heads": 2, "head_dim": 24}),
    "qwen2": (5, {"family": "qwen2", "hidden_size": 48, "num_heads": 7, "num_kv_heads": 1, "head_dim": 12}),
    "qwen3": (52, {"family": "qwen3", "hidden_size": 67, "num_heads": 3, "num_kv_heads": 3, "head_dim": 10}),
    "biased": (16, {"family": "llama", "out_bias": True, "mlp_bias": True, "qkv_bias": True, "ffn_size": 128}),
}
# (tokens, past, noisy, block size, slots)
Part = tuple[Sequence[int], int, bool, int, Sequence[int]]


def parent_of(name: str, **changes: object) -> Transformer:
    """As a shifted diffusion model, whose context is the parent's."""
    sizes = MODELS[name][1] | {"mask_id": MASK, "start_id": 1, "block_size": 8} | changes
    return exactly_summed(tiny_model(**sizes, std=0.2))  # type: ignore[arg-type]


def child_of(name: str, parent: Transformer) -> Transformer:
    """The parent with updates about as large as what they are added to."""
    child = add_gated_lora(parent, MODELS[name][0], seed=0).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for module in child.modules():
        if isinstance(module, GatedLoraLinear):
            module.gated_out.normal_(std=0.1, generator=generator)
    child.mask_vector = nn.Parameter(torch.randint(-9, 10, (child.config.hidden_size,), generator=generator).float(), False)
    return child


class Rounded(nn.Module):
    """A gated layer in the kernels' arithmetic: integers summed exactly, in float64; the update always of 8 bits."""

    def __init__(self, layer: nn.Module, bits: int, mixed: int = 1) -> None:
        super().__init__()
        assert isinstance(layer, GatedLoraLinear)
        self.layer, self.bits, self.mixed = layer, bits, mixed

    def forward(self, x: Tensor, open_: Tensor | None = None) -> Tensor:
        x, layer = mix(x, self.mixed), self.layer
        out = self.product(x, mix(layer.weight, self.mixed) / self.mixed, self.bits)
        if layer.bias is not None:
            out = out + layer.bias
        if open_ is None:
            return out
        low = self.product(x, mix(layer.gated_in, self.mixed) / self.mixed, 8)
        return out + self.product(low, layer.gated_out, 8) * open_[..., None]

    def product(self, x: Tensor, weight: Tensor, bits: int) -> Tensor:
        return rounded_product(x, weight, bits, by_group=self.bits == 4)


def rounded(model: Transformer, bits: int) -> Transformer:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, GatedLoraLinear):
            mixed = mixed_channels(model.config.ffn_size) if name.endswith("down") and bits == 8 else 1
            model.set_submodule(name, Rounded(layer, bits, mixed))
    return model


def batch_of(*parts: Part) -> Batch:
    slices = [
        SequenceSlice(tokens, past, slots, block_size, 0 if noisy else past + len(tokens))
        for tokens, past, noisy, block_size, slots in parts
    ]
    return Batch(slices, 1, "cpu")


def clean(tokens: Sequence[int], past: int, slots: Sequence[int]) -> Part:
    return tokens, past, False, 1, slots


def noisy(tokens: Sequence[int], past: int, slots: Sequence[int], block_size: int = 2**40) -> Part:
    return tokens, past, True, block_size, slots


def text(count: int, *, masks: bool = False) -> list[int]:
    """Random tokens, of which every third may be a mask."""
    source = random.Random(count)
    return [MASK if masks and i % 3 == 1 else source.randrange(MASK) for i in range(count)]


def slots_of(*counts: int) -> list[list[int]]:
    """Scattered slots of several sequences."""
    order = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(len(counts))).tolist()
    return [[order.pop() for _ in range(count)] for count in counts]


def plain_forward(model: Transformer, batch: Batch, kv_cache: Tensor, noisy_T: Tensor) -> Tensor:
    hidden_BTD: Tensor = model(
        batch.tokens_T[None], batch.positions_T[None], plain_attend(batch, kv_cache), noisy_BT=noisy_T[None]
    )
    return hidden_BTD.squeeze(0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_arithmetic(any_kernels: Kernels, name: str, bits: int) -> None:
    """One layer, to rounding; a row errs more where an activation lay between two integers and was rounded the other way."""
    child = child_of(name, parent_of(name, num_layers=1))
    packed = NativeBackend(pack_model(child, bits, rotate=False), any_kernels)
    a, b, c, d = slots_of(14, 21, 50, 80)
    batch = batch_of(
        noisy(text(3, masks=True), 0, a), clean(text(21), 0, b), clean(text(9), 0, c), noisy(text(41, masks=True), 9, c),
        noisy(text(1), 3, a), clean(text(15), 0, d), noisy(text(64, masks=True), 15, d, 16),
    )  # fmt: skip
    kv_cache, plain = new_kv_cache(child.config), new_kv_cache(child.config)
    hidden, gated = packed.forward(batch, kv_cache), batch.is_noisy_T
    reference = rounded(child, bits)
    expected = plain_forward(reference, batch, plain, gated)
    errors = row_errors(hidden, expected)
    for which in (errors[gated], errors[~gated]):
        assert which.median() < 1e-5
        assert (which > 1e-4).float().mean() < 0.1
        assert which.max() < 5e-2
    written = (x.transpose(2, 3).flatten(3)[:, :, a[:4] + b + c + d[:79]] for x in (kv_cache, plain))
    assert row_errors(*written).max() < 1e-4
    # The updates are no small part of it.
    unopened = plain_forward(reference, batch, plain, torch.zeros_like(gated))
    assert (row_errors(expected, unopened)[gated] > 0.1).all()


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_approximates_the_model_itself(kernels: Kernels, name: str, bits: int, rotate: bool) -> None:
    """Rotated or not, what is left is the error of rounding."""
    child = child_of(name, parent_of(name))
    packed, (slots,) = NativeBackend(pack_model(child, bits, rotate=rotate), kernels), slots_of(64)
    batch = batch_of(clean(text(24), 0, slots), noisy(text(40, masks=True), 24, slots))
    logits = packed.logits(packed.forward(batch, new_kv_cache(child.config)))
    expected = child.head(plain_forward(child, batch, new_kv_cache(child.config), batch.is_noisy_T))
    assert row_errors(logits, expected).mean() < (0.06 if bits == 8 else 0.4)


@pytest.mark.parametrize("name", MODELS)
def test_floats_give_what_the_model_gives(any_kernels: Kernels, name: str) -> None:
    child = child_of(name, parent_of(name))
    packed, (slots,) = NativeBackend(pack_model(child, FLOAT_BITS), any_kernels), slots_of(64)
    batch = batch_of(clean(text(24), 0, slots), noisy(text(40, masks=True), 24, slots))
    hidden = packed.forward(batch, new_kv_cache(child.config))
    expected = plain_forward(child.double(), batch, new_kv_cache(child.config).double(), batch.is_noisy_T)
    assert row_errors(hidden, expected).max() < 1e-5


@pytest.mark.parametrize(("bits", "rotate"), [(8, True), (8, False), (4, True), (4, False), (FLOAT_BITS, None)])
@pytest.mark.parametrize("name", MODELS)
def test_closed_rows_are_the_packed_parents(kernels: Kernels, name: str, bits: int, rotate: bool | None) -> None:
    """Alone, and with noisy rows before, between and behind them, some of their own sequence."""
    parent = parent_of(name)
    packed, packed_parent = (
        NativeBackend(pack_model(model, bits, rotate=rotate), kernels) for model in (child_of(name, parent), parent)
    )
    a, b, c, d = slots_of(50, 17, 33, 8)
    parts = clean(text(40), 0, a), clean(text(1), 0, b), clean(text(16), 1, b), clean(text(25), 0, c)
    kv_cache = new_kv_cache(parent.config)
    expected = packed_parent.forward(batch_of(*parts), kv_cache)
    alone = new_kv_cache(parent.config)
    assert torch.equal(packed.forward(batch_of(*parts), alone), expected)
    assert torch.equal(alone, kv_cache)
    together, batch = new_kv_cache(parent.config), batch_of(
        noisy(text(8, masks=True), 0, d), parts[0], noisy(text(9, masks=True), 40, a), *parts[1:],
        noisy(text(5, masks=True), 25, c),
    )  # fmt: skip
    hidden = packed.forward(batch, together)
    assert torch.equal(hidden[~batch.is_noisy_T], expected)
    clean_slots = a[:40] + b + c[:25]
    assert torch.equal(together[:, :, :, clean_slots], kv_cache[:, :, :, clean_slots])
    assert torch.equal(packed.logits(expected), packed_parent.logits(expected))


@pytest.mark.parametrize("bits", [8, 4, FLOAT_BITS])
@pytest.mark.parametrize("name", MODELS)
def test_an_open_row_is_the_same_bits_in_any_company(any_kernels: Kernels, name: str, bits: int) -> None:
    """With 1, 2 and 3 threads, after its context in the same forward or an earlier one, at other slots, block by block."""
    packed = NativeBackend(pack_model(child_of(name, parent_of(name)), bits), any_kernels)
    sizes = ((8, 8), (24, 40), (0, 16), (16, 1))
    places = slots_of(*(context + count for context, count in sizes))
    contexts = [clean(text(context), 0, slots) for (context, _), slots in zip(sizes, places, strict=True)]
    drafts = [noisy(text(n, masks=True), past, slots, 8) for (past, n), slots in zip(sizes, places, strict=True)]
    batch = batch_of(contexts[1], drafts[2], contexts[0], drafts[1], contexts[3], drafts[3], drafts[0])
    hidden, kv_cache = run_with_threads(1, packed, batch)
    for threads in (2, 3):
        assert all(map(torch.equal, run_with_threads(threads, packed, batch), (hidden, kv_cache)))
    drafted = batch.segments_C6[batch.segments_C6[:, 4] == 1].tolist()
    for number, (start, stop, *_) in zip((2, 1, 3, 0), drafted, strict=True):
        past, count = sizes[number]
        (other,) = slots_of(past + count)
        alone = new_kv_cache(packed.config)
        if past:
            packed.forward(batch_of(clean(text(past), 0, other)), alone)
        tokens = drafts[number][0]
        parts = (noisy(tokens[at : at + 8], past + at, other, 8) for at in range(0, count, 8))
        blocks = [packed.forward(batch_of(part), alone) for part in parts]
        assert torch.equal(torch.cat(blocks), hidden[start:stop])
        assert torch.equal(alone[:, :, :, other], kv_cache[:, :, :, places[number]])


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_updates_of_zero_change_no_bit(kernels: Kernels, name: str, bits: int, rotate: bool) -> None:
    """So that the mask vector alone makes noisy rows what they are: those of a parent with that embedding."""
    parent, child = parent_of(name, tied_head=False), add_gated_lora(parent_of(name, tied_head=False), MODELS[name][0], seed=0)
    vector = torch.randn(parent.config.hidden_size, generator=torch.Generator().manual_seed(0))
    a, b = slots_of(50, 17)
    batch = batch_of(clean(text(20), 0, a), noisy(text(30, masks=True), 20, a), noisy(text(17, masks=True), 0, b))

    def run(model: Transformer) -> tuple[Tensor, Tensor]:
        kv_cache = new_kv_cache(model.config)
        return NativeBackend(pack_model(model, bits, rotate=rotate), kernels).forward(batch, kv_cache), kv_cache

    before = run(parent)
    assert all(map(torch.equal, run(child), before))
    child.mask_vector = nn.Parameter(vector)
    parent.embed.weight[MASK] = vector
    after = run(parent)
    assert not torch.equal(after[0], before[0])
    assert all(map(torch.equal, run(child), after))
