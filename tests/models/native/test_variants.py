"""The kernels' variants: the same bits whatever the instruction set, emulated where it is missing, and which run here."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from models.native.test_packed import batch_of, model_of, new_kv_cache, random_tokens
from unmask.engine.backends.native import NativeBackend
from unmask.models.native.build import compile_library, find_target
from unmask.models.native.interface import Kernels
from unmask.models.native.linear import PackedLinear
from unmask.models.native.packing import FLOAT_BITS, pack_bias, pack_matrix, pack_model
from unmask.models.native.quantize import pack_floats
from unmask.models.native.variants import SOURCES, VARIANTS, usable_macro

X86 = VARIANTS["x86_64"]
# The names by which vector.h knows the instruction sets that tests/models/native/emulate.h stands in for.
EMULATED = {
    "avxvnni": ("AVX2", "AVXVNNI"),
    "avx512vnni": ("AVX512",),
    "amx": ("AVX512", "AMX"),
}
WITHOUT_INTRINSICS = "no intrinsics"
NEEDS = {
    "portable": set(),
    "avx2": {"avx2", "fma", "bmi1", "bmi2"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "amx": {"avx512_vnni", "amx_tile", "amx_int8"},
}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture(scope="module", params=[WITHOUT_INTRINSICS, "portable", *EMULATED])
def other_kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """A variant compiled quickly, so that it runs on any machine with AVX2."""
    flags: tuple[str, ...] = ("-O1",)
    if request.param == WITHOUT_INTRINSICS:
        flags += ("-DUNMASK_PORTABLE",)
    if request.param in EMULATED:
        flags += (*X86["avx2"], "-DUNMASK_EMULATE", *(f"-DUNMASK_{name}" for name in EMULATED[request.param]))
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    compile_library(library, "portable", (*flags, f"-I{Path(__file__).parent}"), find_target())
    return Kernels(ctypes.CDLL(str(library)), request.param)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("bits", "by_group"), [(8, False), (8, True), (4, True), (16, False), (FLOAT_BITS, False)])
def test_products_are_the_same_bits_in_every_variant(
    kernels: Kernels, other_kernels: Kernels, bits: int, by_group: bool
) -> None:
    """At every number of rows up to some tiles, and with panels and depths that fill no tile."""
    generator = torch.Generator().manual_seed(bits)
    for inputs, outputs in ((16, 16), (30, 33), (64, 64), (100, 20), (200, 115), (576, 80)):
        weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
        packed = pack_floats(weight.bfloat16()) if bits == 16 else pack_matrix(weight, bits)
        ours, other = (PackedLinear(packed, k, bias=pack_bias(bias), by_group=by_group) for k in (kernels, other_kernels))
        for rows in itertools.chain(range(1, 41), (64, 65, 300)):
            x = torch.randn(rows, inputs, generator=generator)
            assert torch.equal(other(x), ours(x)), (inputs, outputs, rows)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("bits", [8, 4, FLOAT_BITS])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_a_forward_is_the_same_bits_in_every_variant(kernels: Kernels, other_kernels: Kernels, name: str, bits: int) -> None:
    """Norms, rotary embedding, attention and exponentials included: every variant rounds a * b + c once."""
    model = model_of(name)
    weights = pack_model(model, bits)
    ours, other = (NativeBackend(weights, k) for k in (kernels, other_kernels))
    batch = batch_of((random_tokens(150), 0, 8, range(150)), (random_tokens(5, seed=1), 0, 1, range(150, 155)))
    kv_cache, other_kv_cache = new_kv_cache(model.config), new_kv_cache(model.config)
    hidden = ours.forward(batch, kv_cache)
    assert torch.equal(other.forward(batch, other_kv_cache), hidden)
    assert torch.equal(other_kv_cache, kv_cache)
    assert torch.equal(other.logits(hidden), ours.logits(hidden))
    assert all(map(torch.equal, other.greedy(hidden, 3), ours.greedy(hidden, 3)))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("variant", X86)
def test_every_variant_compiles(tmp_path: Path, variant: str) -> None:
    """Its own intrinsics, not those that stand in for them."""
    compile_library(tmp_path / "kernels.so", variant, ("-O0", "-Wall", "-Werror", *X86[variant]), find_target())


@needs_compiler
@pytest.mark.parametrize("variant", X86)
def test_a_variant_is_usable_where_the_processor_has_its_instructions(tmp_path: Path, variant: str) -> None:
    library = tmp_path / "usable.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", usable_macro(variant), str(SOURCES / "usable.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in cpuinfo if line.startswith("flags")).split())
    assert ctypes.CDLL(str(library)).unmask_usable() == (flags >= NEEDS[variant])
