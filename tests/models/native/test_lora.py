"""The kernels' LoRA by row: adapted rows against torch, rows of the base and of other company to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import refused
from lora_folders import folded, write_adapter
from models.native.test_packed import model_of, new_kv_cache, plain_attend, threads_set
from tiny import row_errors
from unmask.engine.backends.native import NativeBackend
from unmask.engine.batch import Batch, SequenceSlice
from unmask.errors import ConfigError
from unmask.models.arch.transformer import Transformer
from unmask.models.native.interface import Kernels
from unmask.models.native.packing import FLOAT_BITS, pack_model
from unmask.models.weights.lora_adapter import LoraAdapter, read_lora_adapter

COUNTS = (5, 7, 1, 9, 3)
WHOSE = (None, "a", "a", None, "b")


@pytest.fixture(params=["llama", "qwen2", "mixture", "bare_mixture"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return model_of(request.param)


@pytest.fixture
def adapters(model: Transformer, tmp_path: Path) -> dict[str, LoraAdapter]:
    """Of ranks that are no multiples of anything, and with updates as large as what they are added to."""
    ranks = {"a": 5, "b": 19}
    folders = {name: write_adapter(model, tmp_path / name, seed=rank, rank=rank) for name, rank in ranks.items()}
    return {name: read_lora_adapter(folder, model.config, name=name) for name, folder in folders.items()}


def slices_of(whose: Sequence[LoraAdapter | None]) -> list[SequenceSlice]:
    """Prompts of these lengths, each of a sequence of its own."""
    slices, first = [], 0
    for number, (count, adapter) in enumerate(zip(COUNTS, whose, strict=True)):
        tokens = [(11 * number + 3 * i) % 50 for i in range(count)]
        slices.append(SequenceSlice(tokens, 0, range(first, first + count), 4, adapter=adapter))
        first += count
    return slices


def run(backend: NativeBackend, slices: Sequence[SequenceSlice]) -> Tensor:
    return backend.forward(Batch(slices, 1, "cpu"), new_kv_cache(backend.config))


@pytest.mark.parametrize("bits", [8, 4, FLOAT_BITS])
def test_rows_in_company_are_the_rows_alone(
    kernels: Kernels, model: Transformer, adapters: dict[str, LoraAdapter], bits: int
) -> None:
    backend = NativeBackend(pack_model(model, bits), kernels)
    slices = slices_of([None if name is None else adapters[name] for name in WHOSE])
    hidden = run(backend, slices)
    alone = torch.cat([run(backend, [each]) for each in slices])
    assert torch.equal(hidden, alone)
    plain = run(backend, [each._replace(adapter=None) for each in slices])
    is_plain = torch.tensor([name is None for name, count in zip(WHOSE, COUNTS, strict=True) for _ in range(count)])
    assert torch.equal(hidden[is_plain], plain[is_plain])
    assert (row_errors(hidden, plain)[~is_plain] > 0.1).all()
    with threads_set(3):
        assert torch.equal(run(backend, slices), hidden)


@pytest.mark.parametrize(("bits", "most"), [(FLOAT_BITS, 1e-4), (8, 0.2), (4, 0.6)])
def test_an_adapted_row_is_the_folded_models(
    kernels: Kernels, model: Transformer, adapters: dict[str, LoraAdapter], bits: int, most: float, tmp_path: Path
) -> None:
    """In floats to rounding; quantised, about as near as the base is to itself."""
    backend = NativeBackend(pack_model(model, bits), kernels)
    errors = []
    for name, adapter in ((None, None), *adapters.items()):
        reference = (model if name is None else folded(model, tmp_path / name)).double()
        batch = Batch(slices_of([adapter] * len(COUNTS)), 1, "cpu")
        attend = plain_attend(batch, new_kv_cache(model.config).double())
        expected = reference.head(reference(batch.tokens_T[None], batch.positions_T[None], attend)[0])
        logits = backend.logits(backend.forward(batch, new_kv_cache(model.config)))
        errors.append(row_errors(logits, expected).mean())
        model.float()
    assert max(errors) < most
    assert max(errors[1:]) < 2 * errors[0] + 1e-4


def test_what_does_not_fit_is_refused_before_any_kernel_runs(kernels: Kernels, tmp_path: Path) -> None:
    model, other = model_of("llama"), model_of("qwen2")
    adapter = read_lora_adapter(write_adapter(other, tmp_path / "other"), other.config, name="other")
    backend = NativeBackend(pack_model(model, 8), kernels)
    with refused(ConfigError, "adapter other"):
        backend.prepare_adapter(adapter)
    own = read_lora_adapter(write_adapter(model, tmp_path / "own"), model.config, name="own")
    del backend.weights.vectors["blocks.1.mlp_norm.folded"]
    with refused(ConfigError, "quantise"):
        backend.prepare_adapter(own)
