"""`quantize`: what auto picks, and which calls never see quantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import unmask
from helpers import refused
from runs import tiny_folder
from tiny import tiny_model
from unmask.engine.backends.native import NativeBackend
from unmask.engine.backends.torch import TorchBackend
from unmask.engine.llm import LanguageModel
from unmask.engine.quantization import decoding_weights, kernels_compute
from unmask.errors import ConfigError
from unmask.models.native.library import kernel_variant

needs_kernels = pytest.mark.skipif(kernel_variant() is None, reason="the CPU kernels are not built")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", mask_id=3, block_size=4)


@needs_kernels
def test_auto_is_int8_where_the_kernels_are() -> None:
    assert decoding_weights("auto", torch.device("cpu")) == "int8"
    assert decoding_weights("auto", torch.device("cuda")) == "none"


@needs_kernels
def test_auto_is_the_default_and_gives_way_to_a_dtype(folder: Path) -> None:
    assert unmask.load(folder).quantize == "int8"
    assert unmask.load(folder, dtype="float32").quantize == "none"
    assert unmask.load(folder, dtype=torch.float32).quantize == "none"
    assert unmask.load(folder, dtype="float32", quantize="int8").quantize == "int8"
    assert unmask.load(folder, quantize="none").quantize == unmask.load(folder, quantize=None).quantize == "none"


@needs_kernels
def test_plain_weights_decode_by_the_kernels_too(folder: Path) -> None:
    by_kernels = kernel_variant() != "portable"
    for dtype, expected in ((torch.float32, by_kernels), (torch.bfloat16, by_kernels), (torch.float16, False)):
        assert kernels_compute("none", torch.device("cpu"), dtype) == expected
        assert isinstance(unmask.load(folder, dtype=dtype).backend(), NativeBackend) == expected
    assert not kernels_compute("none", torch.device("cuda"), torch.float32)


@needs_kernels
def test_plain_weights_give_the_same_text_by_the_kernels_and_by_torch(folder: Path) -> None:
    by_kernels = unmask.load(folder, dtype="float32")
    by_torch = unmask.LanguageModel(by_kernels.transformer, by_kernels.tokenizer, name="plain")
    assert isinstance(by_torch.backend(), TorchBackend)
    for model in (by_kernels, by_torch):
        assert model.quantize == "none"
    assert by_kernels.generate("say 1", max_new_tokens=24).ids == by_torch.generate("say 1", max_new_tokens=24).ids


@pytest.mark.parametrize("quantize", ["int3", "None", ""])
def test_an_unknown_kind_of_weights_is_refused(folder: Path, quantize: str) -> None:
    with refused(ConfigError, f"quantize is {quantize!r}"):
        unmask.load(folder, quantize=quantize)


def test_weights_given_as_a_transformer_are_used_as_they_are() -> None:
    assert LanguageModel(tiny_model("llama", 1), None, name="tiny").quantize == "none"
    assert LanguageModel(tiny_model("llama", 1), None, name="tiny", quantize=None).quantize == "none"


def test_logits_and_scores_are_those_of_the_loaded_weights(folder: Path) -> None:
    quantised, plain = (unmask.load(folder, quantize=quantize) for quantize in ("int8", "none"))
    quantised.generate("say 1", max_new_tokens=4)
    ids = plain.encode_prompt("say 1")
    assert torch.equal(quantised.logits(ids), plain.logits(ids))
    assert quantised.score("and 2", after="1 ") == plain.score("and 2", after="1 ")
