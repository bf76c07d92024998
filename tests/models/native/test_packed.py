"""The C++ kernels against the same quantised arithmetic written plainly in torch, and against themselves in other company."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unmask
from conformance.sequential import SequentialAttend
from helpers import refused
from tiny import row_errors, tiny_model
from unmask.engine.backends.native import NativeBackend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.errors import ConfigError
from unmask.models.arch.config import ModelConfig, MoEConfig, RopeConfig
from unmask.models.arch.layers import FeedForward, RMSNorm, apply_rope, rope_cos_sin
from unmask.models.arch.moe import MoE, route
from unmask.models.arch.transformer import Block, Transformer
from unmask.models.native.interface import Kernels
from unmask.models.native.packing import FLOAT_BITS, PackedWeights, pack_matrix, pack_model
from unmask.models.native.quantize import GROUP, QuantizedMatrix, quantize
from unmask.models.native.rotation import mix, mixed_channels

SLOTS = 300
# Odd sizes, so that every tail of every loop runs; a vocabulary of more than one chunk; one head and many a kv head.
MODELS = {
    "llama": {"family": "llama", "hidden_size": 52, "ffn_size": 75, "num_heads": 6, "num_kv_heads": 2, "head_dim": 24},
    "qwen2": {"family": "qwen2", "hidden_size": 48, "num_heads": 7, "num_kv_heads": 1, "head_dim": 12, "vocab_size": 1559},
    "qwen3": {"family": "qwen3", "hidden_size": 67, "num_heads": 3, "num_kv_heads": 3, "head_dim": 10},
    "partial": {"family": "llama", "head_dim": 24, "rope": RopeConfig(fraction=0.75), "vocab_size": 800},
    "mixture": {
        "family": "llada2",
        "num_layers": 2,
        "hidden_size": 52,
        "ffn_size": 75,
        "moe": MoEConfig(num_experts=12, num_active=3, expert_size=32, num_groups=4, num_active_groups=2, num_dense_layers=0),
    },
    "bare_mixture": {
        "family": "llada2",
        "num_layers": 2,
        "num_heads": 3,
        "num_kv_heads": 1,
        "rope": RopeConfig(),
        "moe": MoEConfig(num_experts=7, num_active=2, expert_size=19, num_shared=0, routed_scale=0.5, normalize=False),
    },
    "biased": {"family": "llama", "out_bias": True, "mlp_bias": True, "qkv_bias": True, "ffn_size": 128},
}


def model_of(name: str, **changes: object) -> Transformer:
    return exactly_summed(tiny_model(**(MODELS[name] | changes), std=0.2))  # type: ignore[arg-type]


def exactly_summed(model: Transformer) -> Transformer:
    """With embeddings that are whole numbers, so that the first norm sums them without rounding in any order."""
    model.requires_grad_(False)
    model.embed.weight.mul_(15).round_()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.uniform_(0.5, 1.5, generator=generator)
    return model


def new_kv_cache(c: ModelConfig) -> Tensor:
    """A KV cache as the kernels take it: [L, 2, G, slots, S]."""
    return torch.zeros(c.num_layers, 2, c.num_kv_heads, SLOTS, c.head_dim)


def plain_attend(batch: Batch, kv_cache: Tensor) -> SequentialAttend:
    """Attention in PyTorch over the kernels' KV cache, seen as one of cache blocks of one token."""
    return SequentialAttend(batch, kv_cache.transpose(2, 3)[:, :, :, None])


def rounded_product(x: Tensor, weight: Tensor, bits: int, *, by_group: bool) -> Tensor:
    """`x W^T` with the kernels' quantisation: integers summed exactly, in float64."""
    matrix = quantize(weight, bits)
    if isinstance(matrix, QuantizedMatrix) and not by_group:
        q, scale = rounded_to_bytes(x)
        return (q @ matrix.integers_NK.double().T).float() * scale * matrix.scale_N
    q, scale = rounded_to_bytes(F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)))
    return ((q * scale).flatten(-2)[..., : x.shape[-1]] @ matrix.dequantize().double().T).float()


def rounded_to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers up to 127, in float64, and the scale of each last dimension."""
    peak = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, torch.full_like(peak, 127) / peak, 0)  # `127 / peak` would multiply by a rounded reciprocal
    return (x * inverse).round().double(), peak / 127


class Reference:
    """A forward and a head with the kernels' quantisation; `out_bits`: of what adds to the hidden states, experts apart."""

    def __init__(self, model: Transformer, bits: int, out_bits: int | None = None) -> None:
        self.model, self.bits, self.out_bits = model, bits, out_bits or bits

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, bits: int) -> Tensor:
        out = rounded_product(x, weight, bits, by_group=self.bits == 4)
        return out if bias is None else out + bias

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.model.config.norm_eps).sqrt().reciprocal() * weight

    def block(self, block: Block, x: Tensor, cos: Tensor, sin: Tensor, attend: SequentialAttend) -> Tensor:
        a, c = block.attention, self.model.config
        normed = self.norm(x, block.attention_norm.weight)
        heads = self.linear(normed, a.qkv.weight, a.qkv.bias, self.bits).unflatten(-1, (-1, c.head_dim)).transpose(1, 2)
        q, k, v = heads.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if a.query_norm is not None and a.key_norm is not None:
            q, k = a.query_norm(q), a.key_norm(k)
        out = attend(block.layer, apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        x = x + self.linear(out.transpose(1, 2).flatten(2), a.out.weight, a.out.bias, self.out_bits)
        normed = self.norm(x, block.mlp_norm.weight)
        if not isinstance(block.mlp, MoE):
            return x + self.feed_forward(normed, block.mlp)
        return x + self.experts(normed[0], block.mlp)[None]

    def feed_forward(self, x: Tensor, mlp: FeedForward) -> Tensor:
        return self.gated(x, mlp.gate_up.weight, mlp.down.weight, self.out_bits, mlp.gate_up.bias, mlp.down.bias)

    def gated(self, x: Tensor, gate_up: Tensor, down: Tensor, down_bits: int, *biases: Tensor | None) -> Tensor:
        gate_up_bias, down_bias = biases or (None, None)
        gate, up = self.linear(x, gate_up, gate_up_bias, self.bits).chunk(2, dim=-1)
        count = mixed_channels(down.shape[1]) if self.bits == 8 else 1
        return self.linear(mix(F.silu(gate) * up, count), mix(down, count) / count, down_bias, down_bits)

    def experts(self, x: Tensor, mlp: MoE) -> Tensor:
        weights, indices = route(mlp.router_logits(x), mlp.expert_bias, mlp.moe)
        out = torch.zeros_like(x) if mlp.shared is None else self.feed_forward(x, mlp.shared)
        for expert in range(mlp.moe.num_experts):
            rows, ranks = (indices == expert).nonzero(as_tuple=True)
            if len(rows):
                out[rows] += weights[rows, ranks, None] * self.gated(x[rows], mlp.gate_up[expert], mlp.down[expert], self.bits)
        return out

    def forward(self, batch: Batch, kv_cache: Tensor) -> Tensor:
        model, attend = self.model, plain_attend(batch, kv_cache)
        x = model.embed(batch.tokens_T[None])
        cos, sin = rope_cos_sin(batch.positions_T[None], model.inv_freq, model.rope_factor, x.dtype)
        for block in model.blocks:
            x = self.block(block, x, cos, sin, attend)
        return model.norm(x)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden, self.model.head_weight, None, 8)


def batch_of(*parts: tuple[Sequence[int], int, int, Sequence[int]]) -> Batch:
    """A batch of sequences `(tokens, first position, block size, slots)`."""
    return Batch([SequenceSlice(tokens, past, slots, size) for tokens, past, size, slots in parts], 1, "cpu")


def random_tokens(count: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(60) for _ in range(count)]


def prompt_and(packed: NativeBackend, reference: Reference, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Errors of `count` rows that follow a prompt in blocks of 8, at scattered slots: of hidden states and of keys."""
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(seed)).tolist()
    kv_cache, plain = new_kv_cache(packed.config), new_kv_cache(packed.config)
    past = 0
    for size in (21, count):
        batch = batch_of((random_tokens(size, seed=seed + size), past, 8, slots[: past + size]))
        hidden, expected = packed.forward(batch, kv_cache), reference.forward(batch, plain)
        past += size
    assert kv_cache[:, :, :, slots[past:]].count_nonzero() == 0
    written = (x[:, :, :, slots[:past]].transpose(2, 3).flatten(3) for x in (kv_cache, plain))
    return row_errors(hidden, expected), row_errors(*written)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_arithmetic(any_kernels: Kernels, name: str, bits: int) -> None:
    model = model_of(name, num_layers=1)
    compare(NativeBackend(pack_model(model, bits, rotate=False), any_kernels), Reference(model, bits))


@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_matrices_of_8_bits_among_those_of_4_equal_the_plain_arithmetic(any_kernels: Kernels, name: str) -> None:
    model = model_of(name, num_layers=1)
    compare(NativeBackend(pack_wide(model), any_kernels), Reference(model, 4, 8))


def pack_wide(model: Transformer) -> PackedWeights:
    """A model of 4 bits whose attention output and down projections, but for routed experts', have 8."""
    weights = pack_model(model, 4)
    for number, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        prefix, mlp = (
            (f"blocks.{number}.", block.mlp)
            if not isinstance(block.mlp, MoE)
            else (f"blocks.{number}.shared.", block.mlp.shared)
        )
        assert isinstance(mlp, FeedForward)
        weights.matrices[f"blocks.{number}.out.base"] = pack_matrix(block.attention.out.weight, 8)
        weights.matrices[f"{prefix}down.base"] = pack_matrix(mlp.down.weight, 8)
    return weights


def compare(packed: NativeBackend, reference: Reference) -> None:
    """One layer, to rounding; a row errs more where an activation lay between two integers and was rounded the other way."""
    everything = []
    for count in (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 200):
        repeats = [prompt_and(packed, reference, count, seed) for seed in range(5 if count < 8 else 1)]
        hidden, stored = (torch.cat(errors) for errors in zip(*repeats, strict=True))
        assert hidden.median() < 1e-5
        assert stored.max() < 1e-4
        everything.append(hidden)
        inputs = torch.randint(
            -9, 10, (count, packed.config.hidden_size), generator=torch.Generator().manual_seed(count)
        ).float()
        torch.testing.assert_close(packed.logits(inputs), reference.logits(inputs), rtol=1e-5, atol=5e-5)
    errors = torch.cat(everything)
    assert (errors > 1e-4).float().mean() < 0.1
    assert errors.max() < 5e-2


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_run_in_order(kernels: Kernels, name: str) -> None:
    """Three layers, where one activation rounded the other way reaches every later row: close, not equal."""
    model = model_of(name, num_layers=3)
    hidden, stored = prompt_and(NativeBackend(pack_model(model, 8, rotate=False), kernels), Reference(model, 8), 32, seed=0)
    assert hidden.mean() < 4e-2
    assert stored.mean() < 4e-2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_approximates_the_model_itself(kernels: Kernels, name: str, rotate: bool, bits: int) -> None:
    """Rotated or not, what is left is the error of rounding."""
    model = model_of(name)
    packed, kv_cache, plain = (
        NativeBackend(pack_model(model, bits, rotate=rotate), kernels),
        *(new_kv_cache(model.config) for _ in range(2)),
    )
    batch = batch_of((random_tokens(64), 0, 16, range(64)))
    logits = packed.logits(packed.forward(batch, kv_cache))
    expected = model.head(model(batch.tokens_T[None], batch.positions_T[None], plain_attend(batch, plain)))[0]
    assert row_errors(logits, expected).mean() < (0.06 if bits == 8 else 0.4)


def test_positions_beyond_those_at_hand_are_rotated_to_the_same_bits(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden = model_of("llama"), []
    for at_hand in (512, 2):
        monkeypatch.setattr("unmask.models.native.packed._FIRST_POSITIONS", at_hand)
        packed, kv_cache = NativeBackend(pack_model(model, 8), kernels), new_kv_cache(model.config)
        parts = [packed.forward(batch_of((random_tokens(9), past, 1, range(past + 9))), kv_cache) for past in (0, 9, 18)]
        hidden.append(torch.cat(parts))
    assert torch.equal(*hidden)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_with_threads(count: int, packed: NativeBackend, batch: Batch) -> tuple[Tensor, Tensor]:
    kv_cache = new_kv_cache(packed.config)
    with threads_set(count):
        return packed.forward(batch, kv_cache), kv_cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_floats_give_what_the_model_gives(any_kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    """But for the order of sums; bfloat16 weights are exact, and so take half the memory whatever their dtype."""
    model = model_of(name, vocab_size=800).to(dtype)
    weights, exact = pack_model(model, FLOAT_BITS), model.double()
    taken = {matrix.bits for name, matrix in weights.matrices.items() if name != "head"}
    assert (taken, weights.vectors["embed"].dtype) == ({8 * dtype.itemsize}, torch.bfloat16)  # of whole numbers
    packed, slots = NativeBackend(weights, any_kernels), range(64)
    plain = new_kv_cache(model.config).double()
    for count in (1, 2, 5, 64) if any_kernels.variant != "portable" else (9,):
        batch = batch_of((random_tokens(count), 0, 16, slots[:count]))
        logits = packed.logits(packed.forward(batch, new_kv_cache(model.config)))
        hidden = exact(batch.tokens_T[None], batch.positions_T[None], plain_attend(batch, plain))
        assert row_errors(logits, exact.head(hidden)[0]).max() < 1e-5


@pytest.mark.parametrize("bits", [8, 4, FLOAT_BITS])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_the_same_bits_in_any_company(any_kernels: Kernels, name: str, bits: int) -> None:
    """Alone with its sequence, among others, with other slots, in smaller forwards, and with other numbers of threads."""
    compare_company(NativeBackend(pack_model(model_of(name), bits), any_kernels))


@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_a_row_of_8_bits_among_those_of_4_is_the_same_bits_in_any_company(any_kernels: Kernels, name: str) -> None:
    compare_company(NativeBackend(pack_wide(model_of(name)), any_kernels))


def compare_company(packed: NativeBackend) -> None:
    texts = [random_tokens(n, seed=n) for n in (40, 1, 64, 9, 17)]
    bounds = torch.tensor([0, *(len(t) for t in texts)]).cumsum(0).tolist()
    together = [(text, 0, 8, range(bounds[i], bounds[i + 1])) for i, text in enumerate(texts)]
    hidden, kv_cache = run_with_threads(1, packed, batch_of(*together))
    logits = packed.logits(hidden)
    for threads in (2, 3):
        other, other_kv_cache = run_with_threads(threads, packed, batch_of(*together))
        assert torch.equal(other, hidden)
        assert torch.equal(other_kv_cache, kv_cache)
    with threads_set(3):
        assert torch.equal(packed.logits(hidden[5:]), logits[5:])
        many = packed.greedy(hidden)
    assert all(map(torch.equal, many, packed.greedy(hidden)))
    for i, text in enumerate(texts):
        alone, slots = new_kv_cache(packed.config), torch.randperm(SLOTS).tolist()
        parts = [
            packed.forward(batch_of((text[past : past + 8], past, 8, slots[: min(past + 8, len(text))])), alone)
            for past in range(0, len(text), 8)
        ]
        assert torch.equal(torch.cat(parts), hidden[bounds[i] : bounds[i + 1]])
        assert torch.equal(alone[:, :, :, slots[: len(text)]], kv_cache[:, :, :, bounds[i] : bounds[i + 1]])


@pytest.mark.parametrize("rows", [1, 20])
def test_a_long_context_is_the_same_bits_with_any_number_of_threads(any_kernels: Kernels, rows: int) -> None:
    """Its keys are summed in parts that threads share, and equal the plain sum."""
    model, context = model_of("qwen2", num_layers=1), 2500
    packed = NativeBackend(pack_model(model, 8, rotate=False), any_kernels)
    c, generator = model.config, torch.Generator().manual_seed(rows)
    kv_cache = torch.randn(c.num_layers, 2, c.num_kv_heads, context + rows, c.head_dim, generator=generator)
    slots = torch.randperm(context + rows, generator=generator).tolist()
    batch = batch_of((random_tokens(rows), context, 8, slots))
    with threads_set(1):
        expected = packed.forward(batch, kv_cache)
    for threads in (2, 3, 5):
        with threads_set(threads):
            assert torch.equal(packed.forward(batch, kv_cache), expected)
    plain = Reference(model, 8).forward(batch, kv_cache.clone())
    assert row_errors(expected, plain).median() < 1e-5


@pytest.mark.parametrize("block_size", [1, 5, 32])
def test_block_causal_visibility(kernels: Kernels, block_size: int) -> None:
    """A later token changes exactly the rows that may see it."""
    model = model_of("llama")
    packed = NativeBackend(pack_model(model, 8), kernels)
    tokens, slots = random_tokens(70), range(70)
    before = packed.forward(batch_of((tokens, 0, block_size, slots)), new_kv_cache(model.config))
    tokens[43] = (tokens[43] + 1) % 60
    after = packed.forward(batch_of((tokens, 0, block_size, slots)), new_kv_cache(model.config))
    changed = (before != after).any(dim=1).tolist()
    assert changed == [position // block_size >= 43 // block_size for position in range(70)]


@pytest.mark.parametrize("banned_id", [None, 3, 767, 768, 1558])
def test_greedy_is_the_argmax_of_the_logits(any_kernels: Kernels, banned_id: int | None) -> None:
    model = model_of("qwen2")
    packed = NativeBackend(pack_model(model, 8), any_kernels)
    for count in (1, 8, 65, 130):
        hidden = torch.randn(count, model.config.hidden_size, generator=torch.Generator().manual_seed(count))
        logits = packed.logits(hidden)
        if banned_id is not None:
            logits[:, banned_id] = float("-inf")
        tokens, probability = packed.greedy(hidden, banned_id)
        assert torch.equal(tokens, logits.argmax(-1))
        torch.testing.assert_close(probability, logits.softmax(-1).amax(-1), rtol=1e-5, atol=0)
        for i in range(0, count, 7):
            alone = packed.greedy(hidden[i : i + 1], banned_id)
            assert (alone[0][0], alone[1][0]) == (tokens[i], probability[i])


def test_greedy_takes_the_lowest_of_equal_tokens_unless_banned(kernels: Kernels) -> None:
    model = model_of("qwen2")
    hidden = torch.randn(1, model.config.hidden_size)
    twins = (40, 41, 780, 1558)
    model.embed.weight[list(twins)] = hidden / hidden.norm() * 20
    packed = NativeBackend(pack_model(model, 8, rotate=False), kernels)
    assert packed.greedy(hidden)[0].item() == 40
    assert packed.greedy(hidden, 40)[0].item() == 41
    # Three or four equal shares.
    assert packed.greedy(hidden)[1].item() == pytest.approx(1 / 4, rel=1e-3)
    assert packed.greedy(hidden, 780)[1].item() == pytest.approx(1 / 3, rel=1e-3)


def test_extreme_logits_have_finite_probabilities(kernels: Kernels) -> None:
    model = model_of("qwen2")
    model.embed.weight.mul_(1e4)
    packed = NativeBackend(pack_model(model, 8, rotate=False), kernels)
    hidden = torch.cat((torch.zeros(1, model.config.hidden_size), torch.ones(1, model.config.hidden_size) * 100))
    tokens, probability = packed.greedy(hidden)
    assert tokens[0] == 0
    assert probability[0].item() == pytest.approx(1 / model.config.vocab_size, rel=1e-5)
    assert probability[1].item() == 1.0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bfloat16_weights_are_packed_too(kernels: Kernels, family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    exact = NativeBackend(pack_model(model.bfloat16().float(), 8), kernels)
    packed = NativeBackend(pack_model(model.bfloat16(), 8), kernels)
    batch = batch_of((random_tokens(5), 0, 4, range(5)))
    torch.testing.assert_close(
        packed.forward(batch, new_kv_cache(model.config)),
        exact.forward(batch, new_kv_cache(model.config)),
        rtol=0.02,
        atol=0.02,
    )


def test_unsupported_models_are_named(kernels: Kernels) -> None:
    with refused(ConfigError, "3-bit"):
        NativeBackend(pack_model(tiny_model("llama"), 3), kernels)
    model = tiny_model("llama").requires_grad_(False)
    with refused(ConfigError, "float32"):
        NativeBackend(pack_model(model, 8), kernels).forward(batch_of(([1], 0, 1, [0])), new_kv_cache(model.config).double())


TEXT = """Photosynthesis is how plants, algae and some bacteria turn light into chemical energy. Chlorophyll in leaves absorbs
mostly red and blue light; water is split, oxygen is released, and carbon dioxide is built into sugar. The first stage needs
light directly, the second does not. def area(radius): return 3.14159 * radius ** 2. Ingredients: two eggs, 250 g of flour."""


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "cosine", "agreement", "divergence"), [(8, 0.995, 0.9, 0.03), (4, 0.85, 0.5, 1.0)])
def test_quality_on_the_embedded_model(kernels: Kernels, bits: int, cosine: float, agreement: float, divergence: float) -> None:
    model = unmask.load("smollm2-135m-converted", dtype="float32")
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(TEXT)
    packed = NativeBackend(pack_model(model.transformer, bits), kernels)
    c = model.config
    kv_cache = torch.zeros(c.num_layers, 2, c.num_kv_heads, len(ids), c.head_dim)
    logits = packed.logits(packed.forward(batch_of((ids, 0, 32, range(len(ids)))), kv_cache))
    expected = model.logits(ids, block_size=32)
    assert F.cosine_similarity(logits, expected).mean() > cosine
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() > agreement
    assert F.kl_div(logits.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean") < divergence


@pytest.mark.parametrize("bits", [8, 4, FLOAT_BITS])
def test_calls_from_several_threads_do_not_disturb_each_other(kernels: Kernels, bits: int) -> None:
    """Of growing sizes, so that a shared workspace would be replaced while others compute in it."""
    packed = NativeBackend(pack_model(model_of("llama"), bits), kernels)
    batches = [batch_of((random_tokens(count, count), 0, 1, range(count))) for count in (1, 3, 8, 20, 60, 150) * 3]

    def run(batch: Batch) -> tuple[Tensor, Tensor]:
        hidden_TD = packed.forward(batch, new_kv_cache(packed.config))
        return hidden_TD, packed.greedy(hidden_TD, None)[0]

    expected = [run(batch) for batch in batches]
    with threads_set(2), ThreadPoolExecutor(6) as pool:
        for (hidden_TD, token_T), (alone_TD, alone_T) in zip(pool.map(run, batches), expected, strict=True):
            assert torch.equal(hidden_TD, alone_TD)
            assert torch.equal(token_T, alone_T)
