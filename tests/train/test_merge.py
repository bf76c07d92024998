"""Top-k merge: the exact mean, the right checkpoints, and refusal of what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import refused
from runs import tiny_folder
from unmask.errors import CheckpointError, ConfigError, UnmaskWarning
from unmask.models.arch.config import RopeConfig
from unmask.train.merge import add_difference, merge_checkpoints, top_k


def variant(base: Path, folder: Path, shift: float) -> Path:
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + shift for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_folder(tmp_path / "base")


def test_mean_of_three(base: Path, tmp_path: Path) -> None:
    models = [variant(base, tmp_path / f"m{i}", shift) for i, shift in enumerate((0.0, 0.5, 2.5))]
    seen: list[tuple[int, int]] = []
    merged = merge_checkpoints(models, tmp_path / "out", on_progress=lambda done, total: seen.append((done, total)))
    expected = load_file(base / "model.safetensors")
    result = load_file(merged / "model.safetensors")
    assert result.keys() == expected.keys()
    assert all(torch.allclose(result[name], expected[name] + 1.0, atol=1e-6) for name in expected)
    assert seen[-1] == (len(expected), len(expected))
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_bfloat16_is_averaged_in_float32(tmp_path: Path, base: Path) -> None:
    models = []
    for i, value in enumerate((1.0, 1.0078125, 1.0078125)):
        folder = variant(base, tmp_path / f"m{i}", 0.0)
        base_tensors = load_file(base / "model.safetensors")
        tensors = {name: torch.full_like(tensor, value, dtype=torch.bfloat16) for name, tensor in base_tensors.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        models.append(folder)
    merged = load_file(merge_checkpoints(models, tmp_path / "out") / "model.safetensors")
    assert all((tensor.float() == 1.0078125).all() for tensor in merged.values())


def test_mismatches_are_refused(base: Path, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", rope=RopeConfig(theta=7.0))
    with refused(CheckpointError, "rope.theta", 7.0, 10_000.0):
        merge_checkpoints([base, other], tmp_path / "out")
    wider = tiny_folder(tmp_path / "wider", ffn_size=56)
    with refused(CheckpointError, "model.layers.0.mlp.down_proj.weight", 56):
        merge_checkpoints([base, wider], tmp_path / "out")
    smaller = variant(base, tmp_path / "smaller", 0.0)
    tensors = load_file(smaller / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, smaller / "model.safetensors", {"format": "pt"})
    with refused(CheckpointError, "model.norm.weight"):
        merge_checkpoints([base, smaller], tmp_path / "out")
    with refused(ConfigError, "merge"):
        merge_checkpoints([], tmp_path / "out")
    with refused(CheckpointError, "empty"):
        merge_checkpoints([base, base], base)
    assert not (tmp_path / "out").exists()


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_changes_no_result_does_not_part_models(base: Path, tmp_path: Path) -> None:
    """Another library's version, dtype and keys, other token ids, and a copy of a head that is tied."""
    other = variant(base, tmp_path / "other", 1.0)
    bookkeeping = {"transformers_version": "9.9", "_name_or_path": "x", "use_cache": False, "torch_dtype": "bfloat16"}
    rewrite(other / "config.json", **bookkeeping, eos_token_id=[1, 2], pad_token_id=3)
    halved = {name: tensor.bfloat16() for name, tensor in load_file(other / "model.safetensors").items()}
    save_file({**halved, "model.rotary_emb.inv_freq": torch.ones(4)}, other / "model.safetensors", {"format": "pt"})
    merged = load_file(merge_checkpoints([base, other], tmp_path / "out") / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert merged.keys() == before.keys()
    assert all(tensor.dtype == torch.float32 for tensor in merged.values())
    assert all(torch.allclose(merged[name], before[name] + 0.5, atol=2e-2) for name in before)


def test_tokenizers_are_compared(base: Path, tmp_path: Path) -> None:
    other = variant(base, tmp_path / "other", 0.0)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"][0]
    (other / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFC"}}))
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.warns(UnmaskWarning) as noted:
        merge_checkpoints([base, other], tmp_path / "out")
    assert ["tokenizer.json" in str(note.message) for note in noted] == [True, False]
    assert "chat template" in str(noted[1].message)
    renamed = json.dumps(tokenizer).replace(json.dumps(added["content"]), '"<renamed>"')
    (other / "tokenizer.json").write_text(renamed)
    with refused(CheckpointError, added["id"], "'<renamed>'", repr(added["content"])):
        merge_checkpoints([base, other], tmp_path / "renamed")
    with refused(CheckpointError, added["id"]):
        add_difference(base, other, base, tmp_path / "renamed")


def test_a_difference_needs_the_same_heads(base: Path, tmp_path: Path) -> None:
    other = variant(base, tmp_path / "other", 0.0)
    heads = json.loads((base / "config.json").read_text())
    rewrite(other / "config.json", num_attention_heads=heads["num_attention_heads"] * 2, head_dim=heads["head_dim"] // 2,
            num_key_value_heads=heads["num_key_value_heads"] * 2)  # fmt: skip
    with refused(CheckpointError, "num_heads"):
        add_difference(base, other, base, tmp_path / "out")


def test_a_difference_is_added(base: Path, tmp_path: Path) -> None:
    model, tuned = variant(base, tmp_path / "model", 1.0), variant(base, tmp_path / "tuned", 0.25)
    before, half = load_file(base / "model.safetensors"), tmp_path / "half"
    whole = load_file(add_difference(model, tuned, base, tmp_path / "out") / "model.safetensors")
    add_difference(model, tuned, base, half, scale=-0.5)
    assert whole.keys() == before.keys()
    assert all(torch.allclose(whole[name], before[name] + 1.25, atol=1e-6) for name in before)
    assert all(
        torch.allclose(after, before[name] + 0.875, atol=1e-6) for name, after in load_file(half / "model.safetensors").items()
    )


def test_rows_that_only_the_model_has_stay(base: Path, tmp_path: Path) -> None:
    model, tuned = variant(base, tmp_path / "model", 1.0), variant(base, tmp_path / "tuned", 0.25)
    grown = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    grown[name] = torch.cat((grown[name], torch.full((3, grown[name].shape[1]), 7.0)))
    save_file(grown, model / "model.safetensors", {"format": "pt"})
    result = load_file(add_difference(model, tuned, base, tmp_path / "out") / "model.safetensors")[name]
    assert torch.allclose(result[:-3], grown[name][:-3] + 0.25, atol=1e-6)
    assert (result[-3:] == 7.0).all()
    add_difference(model, model, base, tmp_path / "twice")
    result = load_file(tmp_path / "twice" / "model.safetensors")[name]
    assert torch.allclose(result[:-3], grown[name][:-3] + 1.0, atol=1e-6)
    assert (result[-3:] == 7.0).all()
    with refused(CheckpointError, "model.embed_tokens.weight"):
        add_difference(base, model, base, tmp_path / "more")


def test_differences_of_other_models_are_refused(base: Path, tmp_path: Path) -> None:
    smaller = variant(base, tmp_path / "smaller", 0.0)
    tensors = load_file(smaller / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, smaller / "model.safetensors", {"format": "pt"})
    with refused(CheckpointError, "model.norm.weight"):
        add_difference(base, smaller, base, tmp_path / "out")
    with refused(CheckpointError, "empty"):
        add_difference(base, base, base, base)
    assert not (tmp_path / "out").exists()


def checkpoint(run: Path, step: int, nelbo: float, block_size: int | None, scored_at: int | None = None) -> None:
    folder = run / "checkpoints" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    validation = {"nelbo": nelbo, "step": step if scored_at is None else scored_at, "block_size": block_size}
    (folder / "state.json").write_text(json.dumps({"step": step, "validation": validation}))


def test_top_k_takes_the_best_at_the_last_block_size(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1, 0.5, 4)  # better, but at another block size
    checkpoint(tmp_path, 2, 3.0, 32)
    checkpoint(tmp_path, 3, 2.0, 32)
    checkpoint(tmp_path, 4, 1.0, 32, scored_at=3)  # not scored where it was saved
    checkpoint(tmp_path, 5, 2.5, 32)
    assert [path.parent.name for path in top_k(tmp_path, 2)] == ["step-0000003", "step-0000005"]
    with refused(CheckpointError, 3, "checkpoints"):
        top_k(tmp_path, 4)
    with pytest.raises(ConfigError):
        top_k(tmp_path, 0)
