"""Quantised weights: when the kernels are used, what happens without them, and that batching changes no bit."""

from __future__ import annotations

import shutil
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import refused
from tiny import MASK, tiny_model
from unmask.engine.backends.native import QuantizedModel
from unmask.engine.backends.torch import TorchBackend
from unmask.engine.engine import Engine
from unmask.engine.llm import LanguageModel
from unmask.errors import BackendError, ConfigError, UnmaskWarning

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")


def model(family: str = "llama") -> Any:
    return tiny_model(family, 1, mask_id=MASK, block_size=4)


def fail_to_start() -> None:
    raise BackendError("there is no c++; install one")


def test_without_a_compiler_the_weights_are_used_as_they_are_and_it_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unmask.engine.backends.native.start_build", fail_to_start)
    with pytest.warns(UnmaskWarning, match=r"c\+\+"):
        quantized = LanguageModel(model(), None, name="tiny", quantize="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quantized.generate_ids((5, 17, 3), max_new_tokens=9)
    assert found == LanguageModel(model(), None, name="tiny").generate_ids((5, 17, 3), max_new_tokens=9)


class SlowBuild:
    """A compiler at work while `running`."""

    def __init__(self) -> None:
        self.running = True

    def load(self) -> None:
        raise BackendError("the CPU kernels did not compile (error: no); set CXX")


def test_until_the_compiler_is_done_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    build = SlowBuild()
    monkeypatch.setattr("unmask.engine.backends.native.start_build", lambda: build)
    quantized = QuantizedModel(model(), "int8")
    with pytest.warns(UnmaskWarning, match="compiled"):
        assert isinstance(quantized.current(), TorchBackend)
    build.running = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one note is enough
        assert isinstance(quantized.current(), TorchBackend), "a compiler that failed leaves the plain way"
        assert isinstance(quantized.current(wait=True), TorchBackend)


@needs_compiler
def test_threads_that_ask_at_once_get_the_same_backend() -> None:
    """The weights are packed once."""
    quantized = QuantizedModel(model(), "int8")
    with ThreadPoolExecutor(8) as pool:
        backends = list(pool.map(lambda _: quantized.current(wait=True), range(16)))
    assert not isinstance(backends[0], TorchBackend)
    assert all(backend is backends[0] for backend in backends)


@pytest.mark.parametrize(("family", "weights", "name"), [("llama", "int3", "int3"), ("llada2", "int8", "dense")])
def test_what_cannot_be_quantised_is_refused_at_once(family: str, weights: str, name: str) -> None:
    with refused(ConfigError, name):
        QuantizedModel(model(family), weights)


@needs_compiler
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_batched_equals_alone_bit_for_bit(family: str, weights: str) -> None:
    language_model = LanguageModel(model(family), None, name="tiny", quantize=weights)
    backend = language_model.backend(wait=True)
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


@needs_compiler
def test_the_program_answers_with_quantised_weights(tmp_path: Path) -> None:
    from unmask.models.weights.checkpoint import save_model

    save_model(model("qwen3"), tmp_path / "model")
    import unmask

    quantized = unmask.load(tmp_path / "model", dtype="float32", quantize="int8")
    loaded = weakref.ref(quantized.transformer)
    quantized.backend(wait=True)
    assert loaded() is None, "the memory of the loaded weights is free"
    plain = unmask.load(tmp_path / "model", dtype="float32")
    assert len(quantized.generate_ids((5, 17, 3), max_new_tokens=8, eos_id=())) == 8
    assert torch.equal(quantized.logits((5, 17, 3)), plain.logits((5, 17, 3))), "logits() reads them again"


@needs_compiler
def test_weights_that_cannot_be_read_again_are_kept() -> None:
    given = model()
    quantized = LanguageModel(given, None, name="tiny", quantize="int8")
    quantized.backend(wait=True)
    assert quantized.transformer is given
