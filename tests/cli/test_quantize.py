"""`unmask quantize`: its folder is used by the commands that decode, and refused by those that need the weights as loaded."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from unmask.models.native.library import kernel_variant

pytestmark = pytest.mark.skipif(kernel_variant() is None, reason="the CPU kernels are not built")


@pytest.fixture
def quantized(run, diffusion_folder: Path, tmp_path: Path) -> Path:
    result = run("quantize", diffusion_folder, "--bits", 8, "--out", tmp_path / "int8")
    assert result.exit_code == 0, result.output
    assert str(tmp_path / "int8") in result.stdout
    return tmp_path / "int8"


def test_commands_that_decode_take_the_folder(run, diffusion_folder: Path, quantized: Path) -> None:
    found, expected = (
        json.loads(run("generate", "Hello", "-m", model, "--max-new-tokens", 8, "--json", *options).stdout)
        for model, options in ((quantized, ()), (diffusion_folder, ("--quantize", "int8")))
    )
    assert found["text"] == expected["text"]
    assert run("infill", "a ___ b", "-m", quantized).exit_code == 0


def test_info_tells_what_it_is_and_verifies_it(run, fails, diffusion_folder: Path, quantized: Path) -> None:
    facts = json.loads(run("info", quantized, "--json", "--verify").stdout.splitlines()[-1])
    assert facts["quantized"]["verified"]
    assert "every byte" in run("info", quantized, "--verify").stdout
    fails("info", diffusion_folder, "--verify", names=("--verify", diffusion_folder))
    assert facts["quantized"]["quantize"] == "int8"
    assert facts["quantized"]["made_from"] == str(diffusion_folder)
    assert 0 < facts["quantized"]["bytes_of_a_token"] < facts["quantized"]["num_bytes"]
    assert "a token reads" in run("info", quantized).stdout
    piece = quantized / "packed-00002-of-00003.safetensors"
    damaged = bytearray(piece.read_bytes())
    damaged[-100] ^= 4
    piece.write_bytes(damaged)
    assert run("info", quantized).exit_code == 0
    fails("info", quantized, "--verify", names=(piece, "sha256"))


def test_training_and_export_name_the_model_it_was_made_from(
    fails, diffusion_folder: Path, quantized: Path, answers: Path, tmp_path: Path
) -> None:
    names = (quantized, "int8", diffusion_folder)
    fails("sft", "--model", quantized, "--data", answers, "--out", tmp_path / "sft", names=names)
    fails("convert", "--model", quantized, "--data", answers, "--out", tmp_path / "convert", names=names)
    fails("export", quantized, "--out", tmp_path / "export", names=names)
    fails("merge", quantized, quantized, "--out", tmp_path / "merge", names=names)
    fails("quantize", quantized, "--out", tmp_path / "quantize", names=names)
    fails("generate", "Hello", "-m", quantized, "--quantize", "int4", names=("int4", "int8", diffusion_folder))


def test_int4_without_calibration_names_what_is_better(run, diffusion_folder: Path, tmp_path: Path) -> None:
    def notes(*arguments: object) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            assert run("generate", "Hello", "--max-new-tokens", 2, "-m", *arguments).exit_code == 0
        return [str(each.message) for each in found if "quantize" in str(each.message)]

    (note,) = notes(diffusion_folder, "--quantize", "int4")
    assert f"quantize {diffusion_folder}" in note
    folder = tmp_path / "int4"
    assert run("quantize", diffusion_folder, "--calibrate", "none", "--out", folder).exit_code == 0
    assert notes(folder, "--quantize", "int4") == notes(folder) == notes(diffusion_folder, "--quantize", "int8") == []
