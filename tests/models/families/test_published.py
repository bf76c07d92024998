"""Published checkpoints of LLaDA2 and Ling: the keys of their config.json, and their tensors at a shrunk size.

The files in `published/` are the configs as their authors and the programs that run them give them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask
from helpers import make_tokenizer, refused
from ling_reference import Reference
from unmask.data.end_ids import end_ids
from unmask.errors import ConfigError, UnmaskNote
from unmask.files import read_json
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.moe import TokenBlocks
from unmask.models.arch.transformer import Transformer
from unmask.models.families.registry import read_config, stored_tensors, write_config
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.export import export_model
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import iter_tensors

FOLDER = Path(__file__).parent / "published"
LLADA20, LLADA22, LING = (
    [f"{name}-{size}{suffix}" for size in ("mini", "flash")]
    for name, suffix in (("llada2.0", ""), ("llada2.2", ""), ("ling", "-2.0"))
)
LLADA21 = ["llada2.1-mini", "llada2.1-flash"]
OPENED = [*LLADA20, *LLADA21, *LLADA22, *LING]
# Tensors in the files of LLaDA2 mini and flash, by the records of third parties.
NUM_TENSORS = {"mini": 14_813, "flash": 24_161}
SHRUNK = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "moe_intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 16, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
OPTIONAL_SHRUNK = {
    "moe_shared_expert_intermediate_size": 12, "rotary_dim": 4, "eos_token_id": 1, "expert_capacity": 8, "delete_token_id": 40,
    "split_token_id": 41,
}  # fmt: skip
TOKENS = [3, 17, 50, 50, 8, 50, 2, 44, 50, 50, 50, 9]
# What the published template writes.
TEMPLATE = (
    "<role>SYSTEM</role>detailed thinking off<|role_end|>"
    "{% for message in messages %}<role>{{ 'HUMAN' if message.role == 'user' else 'ASSISTANT' }}</role>"
    "{{ message.content }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)


def config_of(name: str) -> dict[str, Any]:
    return read_json(FOLDER / f"{name}.json")["config"]


def shrunk(name: str) -> dict[str, Any]:
    """The published keys at a size that runs here; a diffusion model names its mask token, as its vocabulary is another."""
    hf = config_of(name)
    changes = SHRUNK | {key: value for key, value in OPTIONAL_SHRUNK.items() if key in hf}
    return hf | changes | ({"mask_token_id": 50, "block_size": 4} if "llada2" in name else {})


def checkpoint(name: str, folder: Path) -> dict[str, Any]:
    """A folder with random weights under the published names, in float64, and the shrunk published config.json."""
    hf = shrunk(name)
    generator = torch.Generator().manual_seed(7)
    model = Transformer(read_config(hf)).double()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.normal_(std=0.3, generator=generator).add_(1.0 if key.endswith("norm.weight") else 0.0)
    save_model(model, folder)
    (folder / "config.json").write_text(json.dumps(hf))
    return hf


@pytest.mark.parametrize("name", OPENED)
def test_config_as_published(name: str) -> None:
    hf = config_of(name)
    config = read_config(hf)
    flash, diffusion, edits = "flash" in name, "llada2" in name, "2.2" in name
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (
        (32, 4096, 32, 4) if flash else (20, 2048, 16, 4)
    )
    assert (config.mask_id, config.block_size) == ((156_895, 32) if diffusion else (None, None))
    assert (config.eos_ids, config.pad_id) == ((156_892,), 156_892)
    assert (config.rotary_dim, config.rope.theta, config.rope.kind) == (64, 3e6 if edits else 6e5, "default")
    assert config.max_positions == (131_072 if edits else 32_768)
    assert (config.qk_norm, config.qkv_bias, config.out_bias, config.tied_head) == (True, False, False, False)
    moe = config.moe
    assert moe is not None
    assert (moe.num_experts, moe.num_active, moe.num_groups, moe.num_active_groups, moe.routed_scale) == (256, 8, 8, 4, 2.5)
    assert (moe.expert_size, moe.num_shared, moe.num_dense_layers) == (1024 if flash else 512, 1, 1)
    assert (moe.expert_capacity, config.delete_id, config.insert_id) == ((48, 156_930, 156_931) if edits else (None,) * 3)


@pytest.mark.parametrize("name", ["llada2.1-mini", "llada2.2-flash"])
def test_as_many_tensors_as_published(name: str) -> None:
    assert len(stored_tensors(read_config(config_of(name)))) == NUM_TENSORS[name.split("-")[1]]


@pytest.mark.parametrize("name", OPENED)
def test_every_published_key_is_written_again(name: str) -> None:
    hf = config_of(name)
    written = write_config(read_config(hf), dtype="bfloat16")
    assert {key: written.get(key) for key in hf} == hf
    assert read_config(written) == read_config(hf)


@pytest.mark.parametrize("name", OPENED)
def test_checkpoint_computes_what_the_reference_does(name: str, tmp_path: Path) -> None:
    hf = checkpoint(name, tmp_path)
    visible = np.arange(12)[:, None] // 4 >= np.arange(12)[None, :] // 4
    reference = Reference(hf, load_file(tmp_path / "model.safetensors"), visible)
    model, blocks = load_model(tmp_path, dtype=torch.float32), TokenBlocks(torch.arange(12) // 4, 3)
    attend = DenseAttend(torch.from_numpy(visible)[None])
    with torch.no_grad():
        hidden = model(torch.tensor([TOKENS]), torch.arange(12)[None], attend, token_blocks=blocks if name in LLADA22 else None)
        found = model.head(hidden)[0].numpy()
    expected = reference.logits(TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.3


def test_next_token_prediction_layers_are_skipped(tmp_path: Path) -> None:
    hf = checkpoint("ling-mini-2.0", tmp_path) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    tensors = load_file(tmp_path / "model.safetensors")
    of_layer = {key: value for key, value in tensors.items() if ".layers.2." in key}
    extra = {key.replace(".layers.2.", ".layers.3."): value.clone() for key, value in of_layer.items()}
    extra |= {f"model.layers.3.{name}.weight": torch.ones(24) for name in ("enorm", "hnorm", "final_layernorm")}
    extra["model.layers.3.eh_proj.weight"] = torch.ones(24, 48)
    save_file(tensors | extra, tmp_path / "model.safetensors")
    model = load_model(tmp_path, dtype=torch.float64)
    assert len(model.blocks) == 3
    save_model(model, tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == tensors.keys()
    assert read_json(tmp_path / "saved" / "config.json")["num_nextn_predict_layers"] == 0


def test_generation_config_and_template_end_an_answer(tmp_path: Path) -> None:
    checkpoint("llada2.1-mini", tmp_path)
    specials = ("<|endoftext|>", "<|mask|>", "<role>", "</role>", "<|role_end|>")
    tokenizer = make_tokenizer(tmp_path, special_tokens=specials, chat_template=TEMPLATE, mask_token="<|mask|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    config = read_model_config(tmp_path)
    assert config.eos_ids == (1, 7)
    assert set(end_ids(config, tokenizer)) == {0, 1, 4, 7}


@pytest.mark.parametrize("name", LLADA22)
def test_llada22_keeps_its_keys_when_exported(name: str, tmp_path: Path) -> None:
    checkpoint(name, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out")
    written = read_json(tmp_path / "out" / "config.json")
    assert [written[key] for key in ("expert_capacity", "delete_token_id", "split_token_id")] == [8, 40, 41]
    source, copy = (dict(iter_tensors(tmp_path / folder)) for folder in ("model", "out"))
    assert source.keys() == copy.keys()
    assert all(torch.equal(source[key], copy[key]) for key in source)


def test_what_llada22_does_besides_is_refused(tmp_path: Path) -> None:
    checkpoint("llada2.2-mini", tmp_path)
    with pytest.warns(UnmaskNote, match="tokens 40 and 41"):
        model = unmask.load(tmp_path, dtype="float32")
    ids = model.generate_ids([3, 17, 8], max_new_tokens=21, threshold=0.0)
    assert ids
    biased = model.generate_ids([3, 17, 8], max_new_tokens=21, logit_bias={40: 50.0, 41: 50.0, 42: 10.0})
    assert 42 in biased
    assert not {40, 41, 50} & {*ids, *biased}
    with refused(ConfigError, "expert_capacity", 8, "LLaDA2.2"):
        model.transformer(torch.tensor([TOKENS]), torch.arange(12)[None], DenseAttend(torch.ones(1, 12, 12, dtype=torch.bool)))


@pytest.mark.parametrize(
    ("name", "changes", "names"),
    [
        ("ling-lite-1.5", {}, ("'bailing_moe'", "Ling 1", "BailingMoeV2ForCausalLM")),
        ("ling-2.5", {}, ("'bailing_hybrid'", "Ling 2.5", "latent attention")),
        # Hybrids under the architecture's old name.
        ("ling-2.5", {"model_type": "bailing_moe_v2", "rope_interleave": False}, ("layer_group_size", 8)),
        ("ling-2.5", {"model_type": "bailing_moe_v2", "rope_interleave": False, "layer_group_size": 1}, ("kv_lora_rank", 512)),
        ("llada2.0-mini", {"model_type": "llada2_moe_veomni"}, ("llada2_moe_veomni", "moe_convertor.py")),
        ("llada2.0-mini", {"rotary_dim": 128}, ("rotary_dim", 128, "partial_rotary_factor", 64)),
        ("ling-mini-2.0", {"moe_shared_expert_intermediate_size": 768}, ("moe_shared_expert_intermediate_size", 768, 512)),
        ("ling-mini-2.0", {"score_function": "softmax"}, ("score_function", "'softmax'")),
        ("ling-mini-2.0", {"expert_swiglu_limit_list": [7.0]}, ("expert_swiglu_limit_list",)),
        ("llada2.2-mini", {"expert_capacity": 4}, ("expert_capacity", 4, 8, 256)),
        ("llada2.2-mini", {"split_token_id": None}, ("delete_token_id", 156_930, "split_token_id", None)),
        ("llada2.2-mini", {"split_token_id": 156_895}, ("split_token_id", 156_895, "mask")),
        ("llada2.2-mini", {"delete_token_id": 157_184}, ("delete token id", 157_184)),
    ],
)
def test_what_is_not_supported_is_named(name: str, changes: dict[str, Any], names: tuple[object, ...]) -> None:
    with refused(ConfigError, *names):
        read_config(config_of(name) | changes)


def test_ling_1t_says_how_much_of_the_head_rotates_in_dimensions() -> None:
    hf = config_of("ling-flash-2.0") | {"rotary_dim": 64}
    del hf["partial_rotary_factor"]
    assert read_config(hf).rotary_dim == 64
