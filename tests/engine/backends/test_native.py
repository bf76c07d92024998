"""Quantised weights: when the kernels are used, what happens without them, and that batching changes no bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask
from helpers import refused
from tiny import MASK, tiny_model
from unmask.engine.backends.native import packed_backend
from unmask.engine.backends.torch import TorchBackend
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.errors import BackendError, ConfigError, UnmaskWarning
from unmask.models.native.interface import Kernels
from unmask.models.native.library import kernel_variant
from unmask.models.weights.checkpoint import save_model

needs_kernels = pytest.mark.skipif(kernel_variant() is None, reason="the CPU kernels are not built")


def model(family: str = "llama") -> Any:
    return tiny_model(family, 1, mask_id=MASK, block_size=4)


def fail_to_load() -> Kernels:
    raise BackendError("the CPU kernels are not built; install them")


def test_without_kernels_the_weights_are_used_as_they_are_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.models.native.library.load_kernels", fail_to_load)
    with pytest.warns(UnmaskWarning, match=r"PyTorch") as caught:
        quantized = LanguageModel(model(), None, name="tiny", quantize="int8")
    assert (len(caught), quantized.quantize) == (1, "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quantized.generate_ids((5, 17, 3), max_new_tokens=9)
    assert found == LanguageModel(model(), None, name="tiny").generate_ids((5, 17, 3), max_new_tokens=9)


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_variant_that_does_not_exist_is_an_error(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_KERNELS", "mmx")
    with refused(ConfigError, "mmx"):
        LanguageModel(model(), None, name="tiny", quantize=weights)


def test_what_cannot_be_quantised_is_refused_at_once() -> None:
    with refused(ConfigError, "int3"):
        LanguageModel(model(), None, name="tiny", quantize="int3")


@needs_kernels
@pytest.mark.parametrize("weights", ["int8", "int4", "none"])
@pytest.mark.parametrize(
    ("family", "capacity"), [("llama", None), ("qwen2", None), ("qwen3", None), ("llada2", None), ("llada2", 3)]
)
def test_batched_equals_alone_bit_for_bit(family: str, capacity: int | None, weights: str) -> None:
    language_model = LanguageModel(packed_backend(model(family), weights), None, name="tiny", expert_capacity=capacity)
    assert language_model.quantize == weights
    backend = language_model.backend()
    assert not isinstance(backend, TorchBackend)
    generator = torch.Generator().manual_seed(0)
    requests = [
        language_model.request(
            torch.randint(0, MASK, (length,), generator=generator).tolist(), max_new_tokens=14, trace=True, **options
        )
        for length, options in (
            (3, {}), (9, {"threshold": 0.3}), (17, {"block_size": 8}), (4, {"temperature": 0.8, "seed": 1}),
            (12, {"edit_threshold": 0.3}), (1, {"threshold": 0.0, "steps": 1}),
        )
    ]  # fmt: skip
    alone = [Engine(backend, prefix_cache=False).run([request])[0] for request in requests]
    for options in ({}, {"num_tokens": 48, "cache_block_size": 4}, {"max_num_batched_tokens": 8}):
        engine = Engine(backend, **options)
        engine.scheduler.prefill_chunk = 3
        together = engine.run(requests)
        for found, expected in zip(together, alone, strict=True):
            assert found.ids == expected.ids
            confidences = [[step.confidence for step in completion.trace] for completion in (found, expected)]
            assert confidences[0] == confidences[1], "a row's result depends on its neighbours"


@needs_kernels
def test_block_routing_gives_the_same_by_torch_and_by_the_kernels() -> None:
    prompt, texts = (5, 17, 3, 40, 8), []
    for capacity in (None, 2, 3, 8):
        by_torch = LanguageModel(model("llada2"), None, name="tiny", expert_capacity=capacity)
        by_kernels = LanguageModel(packed_backend(model("llada2"), "none"), None, name="tiny", expert_capacity=capacity)
        texts.append(by_torch.generate_ids(prompt, max_new_tokens=24, eos_id=()))
        assert by_kernels.generate_ids(prompt, max_new_tokens=24, eos_id=()) == texts[-1]
        assert ("experts" in by_torch.backend().kernels) == (capacity is not None)
        assert ("experts" in by_kernels.backend().kernels) == (capacity is not None)
    assert len(set(map(tuple, texts))) > 2


@pytest.mark.parametrize(("family", "capacity", "names"), [("llama", 4, "mixtures"), ("llada2", 1, "expert_capacity is 1")])
def test_block_routing_is_refused_where_it_cannot_be(family: str, capacity: int, names: str) -> None:
    with refused(ConfigError, names):
        LanguageModel(model(family), None, name="tiny", expert_capacity=capacity)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(model("qwen3"), tmp_path / "model")
    return tmp_path / "model"


@needs_kernels
def test_the_program_answers_with_quantised_weights(folder: Path) -> None:
    quantized = unmask.load(folder, dtype="float32", quantize="int8")
    plain = unmask.load(folder, dtype="float32")
    assert len(quantized.generate_ids((5, 17, 3), max_new_tokens=8, eos_id=())) == 8
    assert torch.equal(quantized.logits((5, 17, 3)), plain.logits((5, 17, 3))), "logits() reads the others"
    assert quantized.transformer is quantized.transformer


@needs_kernels
def test_packed_weights_of_the_cache_decode_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time the weights of the folder are not read."""
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("unmask.models.native.packed_cache._LEAST_BYTES", 0)
    parts: list[int] = []
    first = unmask.load(folder, quantize="int8", on_packing=lambda done, total: parts.append(done))
    assert parts == [1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr("unmask.engine.loading.load_parts", lambda *_, **__: pytest.fail("the weights were read"))
        second = unmask.load(folder, quantize="int8")
    assert second.config == first.config
    assert second.generate_ids((5, 17, 3), max_new_tokens=8) == first.generate_ids((5, 17, 3), max_new_tokens=8)


@needs_kernels
def test_weights_that_cannot_be_read_again_are_kept() -> None:
    given = model()
    quantized = LanguageModel(given, None, name="tiny", quantize="int8")
    assert quantized.transformer is given
