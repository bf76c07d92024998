"""Exported folders: bit for bit the model, and what transformers and the readers of LLaDA2 need around it."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers import CHATML, make_tokenizer, refused
from tiny import FAMILIES, causal_logits, tiny_model
from unmask.data.tokenizer import load_tokenizer
from unmask.errors import CheckpointError
from unmask.models.families.llada2_moe import CODE_REPOSITORY, MASK_ID
from unmask.models.families.registry import published_config, read_config, stored_tensors
from unmask.models.weights import export as export_module
from unmask.models.weights.adapter import attach_lora, save_adapter
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.export import export_model
from unmask.models.weights.loading import load_model

DIFFUSION: dict[str, Any] = {"mask_id": 57, "block_size": 8, "eos_ids": (3,), "pad_id": 4}
CASES = [(family, kind) for family in ("llama", "qwen2", "qwen3", "bailing_moe_v2") for kind in (True, False)]
CASES.append(("llada2_moe", True))


def saved(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model of any of the five families, its routers in float32."""
    model = tiny_model("llada2" if family not in FAMILIES else family, std=0.2, **changes)
    model.config = replace(model.config, family=family)
    save_model(model, folder)
    if dtype != torch.float32:
        save_model(load_model(folder, dtype=dtype), folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize(("family", "diffusion"), CASES)
def test_round_trip(family: str, diffusion: bool, shard_bytes: int, dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source", dtype=dtype, **(DIFFUSION if diffusion else {}))
    first = export_model(source, tmp_path / "first", max_shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "first").glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    loaded = load_model(tmp_path / "first", dtype=dtype)
    assert loaded.config == read_model_config(tmp_path / "first")
    assert torch.equal(causal_logits(loaded), causal_logits(load_model(source, dtype=dtype)))
    save_model(loaded, tmp_path / "again")
    assert export_model(tmp_path / "again", tmp_path / "second", max_shard_bytes=shard_bytes).config == loaded.config
    export_model(tmp_path / "first", tmp_path / "third", max_shard_bytes=shard_bytes)
    assert contents(tmp_path / "first") == contents(tmp_path / "second") == contents(tmp_path / "third")
    before, after = tensors(source), tensors(tmp_path / "first")
    assert before.keys() == after.keys() == stored_tensors(first.config).keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("diffusion", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_dense_models(family: str, diffusion: bool, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source", **(DIFFUSION if diffusion else {}))
    export_model(source, tmp_path / "out", max_shard_bytes=20_000)
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        got = theirs.eval()(torch.arange(24)[None] % 60).logits
    torch.testing.assert_close(got, causal_logits(load_model(source, dtype=torch.float32)), atol=1e-4, rtol=0)
    assert GenerationConfig.from_pretrained(tmp_path / "out").to_dict().get("mask_token_id") == (57 if diffusion else None)


@pytest.mark.parametrize("family", ["bailing_moe_v2", "llada2_moe"])
def test_diffusion_mixtures_become_llada2(family: str, tmp_path: Path) -> None:
    source = saved(family, tmp_path / "source", **DIFFUSION, hf_extras={"auto_map": {"AutoConfig": "bailing.X"}, "zeta": 1})
    exported = export_model(source, tmp_path / "out")
    assert exported.config.family == "llada2_moe"
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["architectures"] == ["LLaDA2MoeModelLM"]
    assert hf["auto_map"] == {
        "AutoConfig": f"{CODE_REPOSITORY}--configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": f"{CODE_REPOSITORY}--modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": f"{CODE_REPOSITORY}--modeling_llada2_moe.LLaDA2MoeModelLM",
    }
    expected = {
        "model_type": "llada2_moe", "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "router_dtype": "fp32",
        "norm_head": False, "embedding_dropout": 0.0, "use_qkv_bias": False, "use_bias": False, "use_qk_norm": True,
        "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
        "partial_rotary_factor": 0.5, "rotary_dim": 4, "rope_theta": 600_000.0, "rope_scaling": None, "head_dim": 8,
        "tie_word_embeddings": False, "mask_token_id": 57, "block_size": 8, "eos_token_id": 3, "pad_token_id": 4,
        "torch_dtype": "float32", "zeta": 1,
    }  # fmt: skip
    assert {key: hf.get(key, "absent") for key in expected} == expected
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": None, "block_length": 8, "do_sample": False, "eos_token_id": 3, "mask_token_id": 57, "pad_token_id": 4,
        "steps": 8, "threshold": 0.95,
    }  # fmt: skip
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 3
    # dInfer looks tensors up in the index and nowhere else.
    weight_map = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {"model-00001-of-00001.safetensors"}
    assert weight_map.keys() == tensors(source).keys()
    assert [note.split()[0] for note in exported.notes] == ["SGLang", "SGLang"]


def test_nothing_to_note_where_sglang_s_assumptions_hold(tmp_path: Path) -> None:
    changes = {"vocab_size": 157_184, "hidden_size": 4, "mask_id": MASK_ID, "block_size": 32}
    source = saved("bailing_moe_v2", tmp_path / "source", **changes)
    assert export_model(source, tmp_path / "out").notes == ()
    assert read_model_config(tmp_path / "out").mask_id == MASK_ID


@pytest.mark.parametrize(("changes", "key"), [({"qk_norm": False}, "use_qk_norm"), ({"out_bias": True}, "use_bias")])
def test_what_llada2_cannot_compute_is_refused(changes: dict[str, Any], key: str, tmp_path: Path) -> None:
    source = saved("bailing_moe_v2", tmp_path / "source", **DIFFUSION, **changes)
    with refused(CheckpointError, key, "llada2_moe"):
        export_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_unmask_runs_shifted_mixtures(tmp_path: Path) -> None:
    for family in ("bailing_moe_v2", "llada2_moe"):
        source = saved(family, tmp_path / family, **DIFFUSION, start_id=1)
        with refused(CheckpointError, "llada2_moe", "shifted"):
            export_model(source, tmp_path / "out")
    dense = saved("qwen3", tmp_path / "dense", **DIFFUSION, start_id=1)
    assert "position 0 reads token 1" in export_model(dense, tmp_path / "exported").notes[0]
    assert read_model_config(tmp_path / "exported").start_id == 1


def test_an_autoregressive_model_stays_one(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM"}
    source = saved("bailing_moe_v2", tmp_path / "source", eos_ids=(3,), hf_extras={"auto_map": auto_map})
    (source / "generation_config.json").write_text('{"temperature": 0.7, "eos_token_id": [3, 5]}')
    (source / "modeling_bailing_moe_v2.py").write_text("# theirs\n")
    (source / "metrics.jsonl").write_text("{}\n")
    (source / "checkpoint").mkdir()
    assert export_model(source, tmp_path / "out").config == read_model_config(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == auto_map
    assert sorted(contents(tmp_path / "out")) == [
        "config.json", "generation_config.json", "model.safetensors", "modeling_bailing_moe_v2.py",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "temperature": 0.7, "bos_token_id": None, "eos_token_id": [3, 5], "pad_token_id": None,
    }  # fmt: skip
    assert "mask_token_id" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_tokenizer_and_chat_template_come_along_for_older_transformers_too(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "source", mask_token="<file_sep>")
    changes = {"vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id, "block_size": 8}
    export_model(saved("llama", tmp_path / "source", **changes), tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out")
    assert ours.mask_id == tokenizer.mask_id
    assert ours.chat_template == CHATML
    assert ours.encode("Hello, how are you?") == tokenizer.encode("Hello, how are you?")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "backend"} & written.keys()
    messages = [{"role": "user", "content": "Hi"}]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer.chat(messages, add_generation_prompt=True)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_conversion_rounds_all_but_the_router(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    source = saved("llada2_moe", tmp_path / "source", **DIFFUSION)
    exported = export_model(source, tmp_path / "out", dtype=dtype)
    assert exported.dtype == dtype
    before, after = tensors(source), tensors(tmp_path / "out")
    routers = {key for key in before if key.endswith((".gate.weight", ".expert_bias"))}
    assert len(routers) == 4
    for key in before:
        assert torch.equal(after[key], before[key] if key in routers else before[key].to(dtype)), key
        assert after[key].dtype == (torch.float32 if key in routers else dtype), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == name
    wide = export_model(tmp_path / "out", tmp_path / "wide", dtype=torch.float32)
    assert {tensor.dtype for tensor in tensors(tmp_path / "wide").values()} == {torch.float32} == {wide.dtype}


def test_a_value_that_does_not_fit_is_named(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(weights, source / "model.safetensors")
    with refused(CheckpointError, "model.layers.1.mlp.up_proj.weight", "float16"):
        export_model(source, tmp_path / "out", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    adapted = attach_lora(load_model(source, dtype=torch.float32), rank=1, alpha=1.0, seed=0, train_embedding=False)
    save_adapter(adapted, tmp_path / "adapter", base=str(source))
    with refused(CheckpointError, "up_proj.weight", "float16"):
        export_model(tmp_path / "adapter", tmp_path / "out", dtype=torch.float16)
    export_model(source, tmp_path / "out", dtype=torch.bfloat16)
    assert tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"][3, 4] > 9e4


@pytest.mark.parametrize("dtype", [None, torch.float32])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_adapters_are_folded(stored: torch.dtype, dtype: torch.dtype | None, tmp_path: Path) -> None:
    base = saved("bailing_moe_v2", tmp_path / "base", dtype=stored)
    make_tokenizer(base)
    model = load_model(base, dtype=torch.float32)
    model.config = model.config.with_diffusion(mask_id=57, block_size=8)
    attach_lora(model, rank=2, alpha=2.0, seed=0, train_embedding=False)
    for name, parameter in model.named_parameters():
        if ".lora_b" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter", base=str(base))
    exported = export_model(tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    assert exported.config.family == "llada2_moe"
    assert exported.dtype == (dtype or stored)
    exact = exported.dtype == torch.float32
    torch.testing.assert_close(
        causal_logits(load_model(tmp_path / "out", dtype=torch.float32)),
        causal_logits(model),
        atol=1e-4 if exact else 0.2,
        rtol=0,
    )
    assert load_tokenizer(tmp_path / "out").has_chat_template


def test_one_tensor_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved("llada2_moe", tmp_path / "source", **DIFFUSION)
    read: list[weakref.ref[Tensor]] = []
    convert, progress = export_module.converted_tensor, []

    def watched(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        assert sum(ref() is not None for ref in read) <= 1
        converted = convert(name, tensor, dtype)
        read.append(weakref.ref(tensor))
        return converted

    monkeypatch.setattr(export_module, "converted_tensor", watched)
    export_model(source, tmp_path / "out", dtype=torch.bfloat16, on_progress=lambda done, total: progress.append((done, total)))
    count = len(stored_tensors(read_model_config(source)))
    assert len(read) == count
    assert progress == [(done, count) for done in range(1, count + 1)]


def test_tied_copies_and_prediction_layers_are_left_out(tmp_path: Path) -> None:
    source = saved("bailing_moe_v2", tmp_path / "source", tied_head=True, **DIFFUSION)
    weights = load_file(source / "model.safetensors")
    copy = next(tensor for name, tensor in weights.items() if name.endswith("embeddings.weight"))
    extra = {"lm_head.weight": copy.clone(), "model.layers.3.eh_proj.weight": torch.zeros(2, 2)}
    save_file(weights | extra, source / "model.safetensors")
    export_model(source, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == weights.keys()


def test_places_that_do_not_serve(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    before = contents(source)
    (tmp_path / "file").write_text("")
    for out in (source, tmp_path / "file"):
        with refused(CheckpointError, "empty"):
            export_model(source, out)
    assert contents(source) == before
    (tmp_path / "empty").mkdir()
    export_model(source, tmp_path / "empty")
    assert AutoConfig.from_pretrained(tmp_path / "empty").model_type == "llama"
    weights = load_file(source / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}, source / "model.safetensors")
    with refused(CheckpointError, "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        export_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_published_layout() -> None:
    """A published LLaDA2 mini: 14813 tensors of 32,511,296,512 bytes, bfloat16 but for the selection bias in float32."""
    places = stored_tensors(read_config(published_config("llada2-mini")))
    sizes = {
        name: torch.Size(tensor.shape).numel() * (4 if name.endswith("expert_bias") else 2) for name, tensor in places.items()
    }
    assert (len(sizes), sum(sizes.values())) == (14_813, 32_511_296_512)
