"""Folders of quantised models: they decode as weights quantised at loading; damaged and unfinished ones are refused by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from helpers import disk_full, refused
from runs import tiny_folder
from tiny import tiny_model
from unmask.errors import CheckpointError, ConfigError, UnmaskWarning
from unmask.files import Writer, atomic_write
from unmask.lock import locked
from unmask.models.arch.gated_lora import add_gated_lora
from unmask.models.native.calibration import Calibration
from unmask.models.native.library import kernel_variant
from unmask.models.native.packed_folder import bytes_of_a_token, map_folder
from unmask.models.native.packing import pack_model
from unmask.models.native.quantization_job import QuantizationJob
from unmask.models.native.recipe import CALIBRATED, QuantizationRecipe
from unmask.models.weights.adapter import attach_lora, save_adapter
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.loading import load_model
from unmask.models.weights.manifest import MANIFEST, PROGRESS, Manifest, is_quantized, read_manifest, verify

needs_kernels = pytest.mark.skipif(kernel_variant() is None, reason="the CPU kernels are not built")
INT8 = QuantizationRecipe(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", mask_id=3, block_size=4)


@pytest.fixture(scope="module")
def made(folder: Path) -> Path:
    """The folder quantised; read only."""
    quantize(folder, folder.parent / "made")
    return folder.parent / "made"


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "own"))


def quantize(folder: Path, out: Path, recipe: QuantizationRecipe = INT8, num_layers: int | None = None) -> Manifest:
    return QuantizationJob("the model", folder, recipe, num_layers).run(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_a_folder_decodes_like_weights_quantised_at_loading(folder: Path, tmp_path: Path, bits: int) -> None:
    quantize(folder, tmp_path / "out", QuantizationRecipe(bits))
    found, expected = unmask.load(tmp_path / "out"), unmask.load(folder, quantize=f"int{bits}")
    assert (found.quantize, found.config) == (f"int{bits}", expected.config)
    assert found.generate("say 1", max_new_tokens=24).ids == expected.generate("say 1", max_new_tokens=24).ids
    assert unmask.load(tmp_path / "out", quantize=f"int{bits}").digest == found.digest != unmask.load(folder).digest


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llada2", "gated", "adapter", "bfloat16"])
def test_models_of_every_kind_are_packed_as_in_memory(tmp_path: Path, kind: str) -> None:
    model = tiny_model(kind if kind in ("qwen2", "qwen3", "llada2") else "llama", mask_id=57, block_size=4, start_id=0)
    folder = tmp_path / "model"
    if kind == "gated":
        model = add_gated_lora(model, 3, seed=0)
    if kind == "bfloat16":
        model = model.bfloat16()
    save_model(model, folder)
    if kind == "adapter":
        adapted = attach_lora(model, rank=2, alpha=4.0, seed=0, train_embedding=False)
        for name, parameter in adapted.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        save_adapter(adapted, tmp_path / "adapter", base=str(folder))
        folder = tmp_path / "adapter"
    manifest = quantize(folder, tmp_path / "out")
    config = read_model_config(tmp_path / "out")
    expected, found = (
        pack_model(load_model(folder, dtype=model.embed.weight.dtype), 8),
        map_folder(tmp_path / "out", manifest, config),
    )
    assert (found.config, found.bits, found.is_rotated) == (expected.config, 8, True)
    assert found.matrices.keys() == expected.matrices.keys()
    assert all(torch.equal(found.matrices[name].weight, matrix.weight) for name, matrix in expected.matrices.items())
    assert all(torch.equal(found.vectors[name], vector) for name, vector in expected.vectors.items())
    share = bytes_of_a_token(found) / manifest.num_bytes
    assert 0 < share < 1


def test_an_interrupted_job_goes_on_to_the_same_files(folder: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for stop in range(3):

        def interrupt(done: int, total: int, reports: Iterator[int] = iter(range(3)), stop: int = stop) -> None:
            if next(reports) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            QuantizationJob("the model", folder, INT8).run(out, interrupt)
        assert is_quantized(out)
        for read in (read_manifest, read_model_config):
            with refused(CheckpointError, out, "finished"):
                read(out)
    second = out / "packed-00002-of-00003.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    (out / "packed-00003-of-00003.safetensors").write_bytes(b"half")
    quantize(folder, out)
    assert content(out) == content(made)


def test_a_model_that_has_changed_is_not_gone_on_with(folder: Path, tmp_path: Path) -> None:
    source = shutil.copytree(folder, tmp_path / "model")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        QuantizationJob("it", source, INT8).run(tmp_path / "out", interrupt)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with refused(ConfigError, tmp_path / "out", "changed"):
        QuantizationJob("it", source, INT8).run(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "llada2"])
def test_a_calibrated_job_goes_on_to_the_same_files(tmp_path: Path, family: str) -> None:
    save_model(tiny_model(family), tmp_path / "model")
    rows = torch.randint(0, 57, (4, 16), generator=torch.Generator().manual_seed(0))
    job = QuantizationJob("it", tmp_path / "model", CALIBRATED, tokens_RT=rows)
    made = job.run(tmp_path / "made")
    assert made.recipe["method"] == "gptq"
    reports = iter(range(9))

    def interrupt(done: int, total: int) -> None:
        if next(reports) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(tmp_path / "out", interrupt)
    job.run(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "made")
    weights = map_folder(tmp_path / "made", made, read_model_config(tmp_path / "made"))
    bits = {name: matrix.bits for name, matrix in weights.matrices.items()}
    assert (bits["blocks.0.qkv.base"], bits["blocks.0.down.base"], bits["head"]) == (4, 8, 8)
    if family == "llada2":
        assert bits["blocks.1.experts.down.base"] == 4


@pytest.mark.parametrize("last", [".calibration.pt", ".quantization.json"])
def test_a_calibration_killed_between_two_files_does_one_layer_again(
    tmp_path: Path, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`last` is the file that is not written any more, behind the second layer."""
    save_model(tiny_model("llama", num_layers=3), tmp_path / "model")
    rows = torch.randint(0, 57, (4, 16), generator=torch.Generator().manual_seed(0))
    job = QuantizationJob("it", tmp_path / "model", CALIBRATED, tokens_RT=rows)
    job.run(tmp_path / "made")

    def write_less(path: Path, write: Writer) -> None:
        if path.name == last and (path.parent / "packed-00003-of-00004.safetensors").is_file():
            raise KeyboardInterrupt
        atomic_write(path, write)

    with monkeypatch.context() as patch:
        patch.setattr("unmask.models.native.quantization_job.atomic_write", write_less)
        patch.setattr("unmask.files.atomic_write", write_less)
        with pytest.raises(KeyboardInterrupt):
            job.run(tmp_path / "out")
    done, next_layer = list[int](), Calibration.next_layer

    def counted(self: Calibration, number: int) -> None:
        done.append(number)
        next_layer(self, number)

    monkeypatch.setattr(Calibration, "next_layer", counted)
    job.run(tmp_path / "out")
    assert done == [1, 2]
    assert content(tmp_path / "out") == content(tmp_path / "made")


@pytest.mark.parametrize("recipe", [INT8, CALIBRATED])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, recipe: QuantizationRecipe) -> None:
    model = tiny_model("llada2")
    save_model(model, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    tensors = load_file(file)
    for name, value in (("model.layers.1.mlp.experts.1.up_proj.weight", torch.nan), ("lm_head.weight", torch.inf)):
        before = tensors[name].clone()
        tensors[name][1, 2] = value
        save_file(tensors, file)
        job = QuantizationJob("it", tmp_path / "model", recipe, tokens_RT=None if recipe == INT8 else torch.zeros(1, 8).long())
        with refused(CheckpointError, tmp_path / "model", f"finite: {name};"):
            job.run(tmp_path / "out" / name)
        tensors[name] = before


@pytest.mark.parametrize(
    "damage", ["cut", "header", "gone", "piece of another", "config of another", "no JSON", "format", "keys"]
)
def test_what_does_not_belong_together_is_refused(own: Path, tmp_path: Path, damage: str) -> None:
    piece, manifest = own / "packed-00002-of-00003.safetensors", json.loads((own / MANIFEST).read_text())
    named: Path = piece
    if damage == "cut":
        piece.write_bytes(piece.read_bytes()[:-1])
    elif damage == "header":
        piece.write_bytes(piece.read_bytes().replace(b'"bits', b'"bitz', 1))
    elif damage == "gone":
        piece.unlink()
    elif damage == "piece of another":
        quantize(tiny_folder(tmp_path / "other", num_layers=2, ffn_size=64), tmp_path / "of another")
        shutil.copy(tmp_path / "of another" / piece.name, piece)
    elif damage == "config of another":
        config = json.loads((own / "config.json").read_text())
        (own / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        named = own / MANIFEST
    else:
        named = own / MANIFEST
        text = {"no JSON": "{", "format": json.dumps(manifest | {"format": 0}), "keys": json.dumps(manifest | {"pieces": [{}]})}
        named.write_text(text[damage])
    with refused(CheckpointError, named):
        unmask.load(own)


@pytest.mark.parametrize("key", ["intermediate_size", "num_attention_heads", "head_dim", "partial_rotary_factor"])
def test_a_config_of_other_sizes_is_refused(own: Path, key: str) -> None:
    config = json.loads((own / "config.json").read_text())
    changed = {"partial_rotary_factor": 0.5}.get(key) or 2 * config[key]
    (own / "config.json").write_text(json.dumps(config | {key: changed}))
    with refused(CheckpointError, "config.json"):
        unmask.load(own)


def test_a_flipped_bit_is_found_by_hash(own: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify(own, read_manifest(own), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    piece = own / "packed-00003-of-00003.safetensors"
    damaged = bytearray(piece.read_bytes())
    damaged[-200] ^= 1
    piece.write_bytes(damaged)
    with refused(CheckpointError, piece, "sha256"):
        verify(own, read_manifest(own))


def test_a_full_disk_is_found_before_or_keeps_what_is_done(
    folder: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, refused(CheckpointError, tmp_path / "out", "free"):
        patch.setattr("unmask.models.native.quantization_job.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
        quantize(folder, tmp_path / "out")
    with monkeypatch.context() as patch, refused(CheckpointError, "space"):
        patch.setattr("unmask.models.native.packed_file.PackedFile.finish", disk_full)
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()
    quantize(folder, tmp_path / "out")
    assert content(tmp_path / "out") == content(made)


def test_folders_of_others_are_refused(folder: Path, made: Path, tmp_path: Path) -> None:
    with refused(ConfigError, made):
        quantize(folder, made)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with refused(ConfigError, tmp_path / "full", "empty"):
        quantize(folder, tmp_path / "full")
    with locked(tmp_path / "busy"), refused(ConfigError, tmp_path / "busy", "another job"):
        quantize(folder, tmp_path / "busy")
    shutil.copytree(made, tmp_path / "begun")
    (tmp_path / "begun" / MANIFEST).rename(tmp_path / "begun" / PROGRESS)
    with refused(ConfigError, tmp_path / "begun", "recipe"):
        quantize(folder, tmp_path / "begun", QuantizationRecipe(4))
    with refused(ConfigError, "layers", 5):
        quantize(folder, tmp_path / "out", num_layers=5)
    with refused(ConfigError, "bits", 3):
        QuantizationRecipe(3)


@needs_kernels
def test_some_layers_decode_and_say_so(folder: Path, tmp_path: Path) -> None:
    manifest = quantize(folder, tmp_path / "out", num_layers=1)
    assert (len(manifest.pieces), manifest.source.num_layers) == (2, 2)
    with pytest.warns(UnmaskWarning, match="1 of 2 layers"):
        model = unmask.load(tmp_path / "out")
    assert len(model.generate("say 1", max_new_tokens=4).ids) > 0


@needs_kernels
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"quantize": "none"}, ("quantize", "none", "the model")),
        ({"quantize": None}, ("quantize", "none")),
        ({"quantize": "int4"}, ("quantize", "int4", "int8")),
        ({"dtype": "float32"}, ("dtype", "float32")),
        ({"device": "cuda"}, ("cuda",)),
    ],
)
def test_options_that_ask_for_other_weights_are_refused(made: Path, options: dict[str, str], names: tuple[str, ...]) -> None:
    with refused(ConfigError, *names):
        unmask.load(made, **options)


@pytest.mark.parametrize(
    "use", [lambda model: load_model(model, dtype=torch.float32), lambda model: unmask.load(model).transformer]
)
def test_float_weights_are_refused_with_the_remedy(made: Path, use: Callable[[Path], object]) -> None:
    with refused(CheckpointError, made, "int8", "the model"):
        use(made)
