"""LoRA: starts as the identity, trains what it should, folds into what it computes; and its folder is a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import disk_full, make_tokenizer, refused
from models.weights.saved import loads_as, saved_base
from tiny import FAMILIES, MASK, causal_logits, perturb, tiny_model
from unmask.engine.loading import load
from unmask.errors import CheckpointError, ConfigError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.transformer import Transformer, resize_vocabulary
from unmask.models.families.registry import stored_tensors
from unmask.models.weights import adapter as adapter_module
from unmask.models.weights.adapter import LoraLinear, adapters_off, attach_lora, folded_state, load_adapter, save_adapter
from unmask.models.weights.checkpoint import read_model_config
from unmask.models.weights.export import export_model
from unmask.models.weights.loading import load_model


def trained(base: Path, *, rank: int = 3, train_embedding: bool = False) -> Transformer:
    model = load_model(base, dtype=torch.float32)
    return perturb(attach_lora(model, rank=rank, alpha=6.0, seed=0, train_embedding=train_embedding))


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_base_and_folds_into_what_it_computes(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    before = causal_logits(model)
    attach_lora(model, rank=3, alpha=6.0, seed=0, train_embedding=True)
    assert torch.equal(causal_logits(model), before)
    adapted = causal_logits(perturb(model))
    assert (adapted - before).abs().max() > 0.1
    folded = tiny_model(family, dtype=torch.float64)
    folded.load_state_dict(folded_state(model))
    assert torch.allclose(causal_logits(folded), adapted, atol=1e-4)


def test_a_model_with_gated_lora_takes_no_adapter() -> None:
    model = tiny_model("llama", mask_id=MASK, start_id=0, gated_lora_rank=2)
    with refused(ConfigError, "gated LoRA"):
        attach_lora(model, rank=2, alpha=4.0, seed=0, train_embedding=False)


def test_modules_fused_in_one_layer_have_one_pair_each() -> None:
    model = attach_lora(tiny_model("llama"), rank=2, alpha=4.0, seed=0, train_embedding=False)
    config = model.config
    qkv, gate_up = model.blocks[0].attention.qkv, model.blocks[0].mlp.gate_up
    assert isinstance(qkv, LoraLinear)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    assert [b.shape[0] for b in qkv.lora_b.values()] == [count * config.head_dim for count in heads]
    assert [b.shape[0] for b in gate_up.lora_b.values()] == [config.ffn_size] * 2
    before = gate_up.weight.clone()
    assert torch.equal(gate_up.folded(), before)
    perturb(model)
    assert torch.linalg.matrix_rank((gate_up.folded() - before)[: config.ffn_size], atol=1e-4) == 2
    fused = attach_lora(tiny_model("llada2"), rank=2, alpha=4.0, seed=0, train_embedding=False)
    assert [b.shape[0] for b in fused.blocks[0].attention.qkv.lora_b.values()] == [fused.config.qkv_size]


@pytest.mark.parametrize("train_embedding", [True, False])
def test_only_adapters_and_the_embedding_train(train_embedding: bool) -> None:
    model = attach_lora(tiny_model("llada2"), rank=2, alpha=4.0, seed=0, train_embedding=train_embedding)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {"embed.weight", "lm_head.weight"} if train_embedding else set()
    assert {name for name in trainable if ".lora_" not in name} == expected
    assert not any("experts" in name or ".router" in name for name in trainable)


def test_base_weights_keep_their_names() -> None:
    plain = set(tiny_model("qwen2").state_dict())
    model = attach_lora(tiny_model("qwen2"), rank=2, alpha=4.0, seed=0, train_embedding=True)
    assert {name for name in model.state_dict() if ".lora_" not in name} == plain
    assert set(folded_state(model)) == plain


def test_impossible_attachments() -> None:
    with refused(ConfigError, "rank", 0):
        attach_lora(tiny_model("llama"), rank=0, alpha=1.0, seed=0, train_embedding=True)
    model = attach_lora(tiny_model("llama"), rank=1, alpha=1.0, seed=0, train_embedding=True)
    with refused(ConfigError, "adapter"):
        attach_lora(model, rank=1, alpha=1.0, seed=0, train_embedding=True)


def test_off_is_the_base_until_it_is_left(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path)
    model = trained(base)
    frozen, adapted = causal_logits(load_model(base, dtype=torch.float32)), causal_logits(model)
    assert (adapted - frozen).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(causal_logits(model), frozen)
        with adapters_off(model):
            assert torch.equal(causal_logits(model), frozen)
        assert torch.equal(causal_logits(model), frozen)
    assert torch.equal(causal_logits(model), adapted)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        _ = 1 / 0
    assert torch.equal(causal_logits(model), adapted)
    with refused(ConfigError, "adapter"), adapters_off(tiny_model("llama")):
        pass


@pytest.mark.parametrize("train_embedding", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loads_exactly_and_again_to_the_same_files(family: str, train_embedding: bool, tmp_path: Path) -> None:
    base = saved_base(family, tmp_path / "base")
    model = trained(base, train_embedding=train_embedding)
    save_adapter(model, tmp_path / "one", base=str(base))
    again = load_adapter(load_model(base, dtype=torch.float32), tmp_path / "one")
    assert torch.equal(causal_logits(again), causal_logits(model))
    same = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert same == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_adapter(again, tmp_path / "two", base=str(base))
    for name in ("adapter_model.safetensors", "adapter_config.json", "unmask_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "unmask_config.json",
    ]  # fmt: skip


def test_targets_of_a_mixture_leave_its_experts_out(tmp_path: Path) -> None:
    base = saved_base("llada2", tmp_path / "base")
    save_adapter(trained(base), tmp_path / "adapter", base=str(base))
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert {"query_key_value", "dense", "model.layers.0.mlp.gate_proj"} < set(targets)
    modules = {name.removesuffix(".weight") for name in stored_tensors(read_model_config(base))}
    reached = {module for module in modules for target in targets if module == target or module.endswith(f".{target}")}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {f"base_model.model.{module}.lora_A.weight" for module in reached} == {name for name in stored if "lora_A" in name}
    assert not any(".experts." in module for module in reached)


def test_misfits_are_all_named_and_leave_the_model_alone(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "base")
    save_adapter(trained(base), tmp_path / "adapter", base=str(base))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{prefix}.1.mlp.up_proj.lora_B.weight"] = torch.zeros(48, 5)
    tensors[f"{prefix}.7.mlp.up_proj.lora_B.weight"] = torch.zeros(48, 3)
    save_file(tensors, path)
    model = load_model(base, dtype=torch.float32)
    before = causal_logits(model)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, tmp_path / "adapter")
    message = str(caught.value)
    assert f"missing: {prefix}.0.self_attn.q_proj.lora_A.weight" in message
    assert f"unexpected: {prefix}.7.mlp.up_proj.lora_B.weight" in message
    assert f"wrong shape: {prefix}.1.mlp.up_proj.lora_B.weight is [48, 5], must be [48, 3]" in message
    assert torch.equal(causal_logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    path.write_bytes(path.read_bytes()[:-7])
    with refused(CheckpointError, "safetensors"):
        load_adapter(model, tmp_path / "adapter")
    path.unlink()
    with refused(CheckpointError, "adapter_model.safetensors"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("saved", "ensured", "tied"),
    [
        (["lm_head"], False, False),
        (["model.embed_tokens"], False, False),
        (["embed_tokens"], True, True),
        (["embed_tokens", "lm_head"], False, False),
    ],
)
def test_an_adapter_may_part_a_tied_head_from_its_embedding(
    saved: list[str], ensured: bool, tied: bool, tmp_path: Path
) -> None:
    """As PEFT has it: a new embedding alone leaves the head as it was, unless their tie is ensured."""
    base = saved_base("qwen2", tmp_path / "base")
    save_adapter(trained(base, train_embedding=True), tmp_path / "adapter", base=str(base))
    path, settings_path = tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_config.json"
    tensors, old = load_file(path), load_model(base, dtype=torch.float32).embed.weight
    embedding, head = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
    tensors[head] = tensors[head] + 1
    kept = {name for name in (embedding, head) if name.split(".")[-2] in {last.split(".")[-1] for last in saved}}
    save_file({name: tensor for name, tensor in tensors.items() if "lora_" in name or name in kept}, path)
    settings = json.loads(settings_path.read_text()) | {"modules_to_save": saved, "ensure_weight_tying": ensured}
    settings_path.write_text(json.dumps(settings))
    loaded = load_model(tmp_path / "adapter", dtype=torch.float32)
    assert loaded.config.tied_head == tied
    assert torch.equal(loaded.embed.weight, tensors[embedding] if embedding in kept else old)
    new_head = tensors[head] if head in kept else tensors[embedding] if tied else old
    assert torch.equal(loaded.head_weight, new_head)
    export_model(tmp_path / "adapter", tmp_path / "out")
    assert loads_as(tmp_path / "out", loaded) == [True]


def test_only_embedding_and_head_are_saved_whole(tmp_path: Path) -> None:
    base = saved_base("qwen2", tmp_path / "base")
    save_adapter(trained(base), tmp_path / "adapter", base=str(base))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["embed_tokens", "norm"]}))
    with refused(CheckpointError, "modules_to_save", "norm", "model.embed_tokens.weight"):
        load_model(tmp_path / "adapter", dtype=torch.float32)


def test_a_full_disk_leaves_the_older_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_base("llama", tmp_path / "base")
    model = trained(base)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "write_safetensors", disk_full)
        for folder in ("adapter", "new"):
            with refused(CheckpointError, "space"):
                save_adapter(perturb(model), tmp_path / folder, base=str(base))
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    save_adapter(perturb(model), tmp_path / "adapter", base=str(base))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
    with refused(ConfigError, "adapter"):
        save_adapter(tiny_model("llama"), tmp_path / "none", base="base")


@pytest.mark.parametrize("train_embedding", [True, False])
@pytest.mark.parametrize("tied_head", [True, False])
def test_its_folder_is_the_model(
    tied_head: bool, train_embedding: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A diffusion model with one more token than its autoregressive base, as a conversion makes it."""
    base = saved_base("llama", tmp_path / "base", tied_head=tied_head)
    model = load_model(base, dtype=torch.float32)
    mask_id = model.config.vocab_size
    resize_vocabulary(model, mask_id + 1)
    model.config = model.config.with_diffusion(mask_id=mask_id, block_size=4)
    perturb(attach_lora(model, rank=2, alpha=1.0, seed=0, train_embedding=train_embedding))
    monkeypatch.chdir(tmp_path)
    save_adapter(model, tmp_path / "adapter", base="base")
    monkeypatch.chdir(tmp_path.parent)
    loaded = load_model(tmp_path / "adapter", dtype=torch.float32)
    assert loaded.config == model.config == read_model_config(tmp_path / "adapter")
    assert not any(isinstance(layer, LoraLinear) for layer in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.state_dict().keys() == folded_state(model).keys()
    assert all(torch.equal(tensor, folded_state(model)[name]) for name, tensor in loaded.state_dict().items())
    user = load(tmp_path / "adapter", dtype="float32")
    assert user.is_diffusion
    assert user.tokenizer is None
    assert len(user.generate_ids([1, 2, 3], max_new_tokens=8)) <= 8


def test_tokenizer_is_its_own_or_the_base_s(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "base")
    base = saved_base("llama", tmp_path / "base", vocab_size=500)
    save_adapter(trained(base), tmp_path / "adapter", base=str(base))
    tokenizer = load(tmp_path / "adapter", dtype="float32").tokenizer
    assert tokenizer is not None
    assert tokenizer.mask_id is None
    make_tokenizer(tmp_path / "adapter", mask_token="<file_sep>")
    tokenizer = load(tmp_path / "adapter", dtype="float32").tokenizer
    assert tokenizer is not None
    assert tokenizer.mask_token == "<file_sep>"


def test_an_adapter_of_an_adapter(tmp_path: Path) -> None:
    base = saved_base("qwen3", tmp_path / "base")
    save_adapter(trained(base), tmp_path / "first", base=str(base))
    second = trained(tmp_path / "first", rank=2)
    save_adapter(second, tmp_path / "second", base=str(tmp_path / "first"))
    torch.testing.assert_close(
        causal_logits(load_model(tmp_path / "second", dtype=torch.float32)), causal_logits(second), atol=1e-4, rtol=0
    )


def test_bases_that_do_not_serve(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path / "base")
    folder = tmp_path / "adapter"
    save_adapter(trained(base), folder, base=str(base))
    settings = json.loads((folder / "adapter_config.json").read_text())

    for name, part in (
        (None, "base_model_name_or_path"),
        (str(tmp_path / "gone"), "base model"),
        (str(folder), "itself"),
        (str(saved_base("llama", tmp_path / "other", norm_eps=1e-3)), "architecture"),
        (str(saved_base("llama", tmp_path / "larger", ffn_size=56)), "architecture"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": name}))
        with refused(CheckpointError, part):
            load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("last", ["one", "two"])
def test_adapters_of_each_other_are_told(tmp_path: Path, last: str) -> None:
    base = saved_base("llama", tmp_path / "base")
    for name, of in (("one", "two"), ("two", "three"), ("three", last)):
        save_adapter(trained(base), tmp_path / name, base=str(base))
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / of)}))
    with refused(CheckpointError, "itself"):
        load_model(tmp_path / "one", dtype=torch.float32)


def test_frozen_weights_get_no_gradient_and_adapters_do(tmp_path: Path) -> None:
    model = trained(saved_base("llama", tmp_path))
    causal = torch.ones(1, 12, 12, dtype=torch.bool).tril()
    hidden = model(torch.arange(12)[None], torch.arange(12)[None], DenseAttend(causal))
    model.head(hidden).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    assert isinstance(model.blocks[0].attention.out, nn.Linear)
