"""Folders with remote code: transformers computes our logits and decodes as the reference decoder does."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import unmask.models.remote_code
from helpers import refused
from tiny import MASK, prompt_of, tiny_model
from unmask.diffusion.masks import block_causal_mask
from unmask.engine.reference import generate_reference
from unmask.engine.sampling_params import ResolvedParams
from unmask.errors import CheckpointError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.config import MoEConfig, RopeConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.weights.checkpoint import read_model_config, save_model
from unmask.models.weights.export import export_model
from unmask.models.weights.loading import load_model

DIFFUSION: dict[str, Any] = {"mask_id": MASK, "block_size": 4, "eos_ids": (3,), "pad_id": 4}
YARN = RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_max_positions=32)
LLAMA3 = RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_max_positions=16)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "rope": LLAMA3}),
    "qwen2": ("qwen2", {"rope": YARN}),
    "qwen3": ("qwen3", {"num_kv_heads": 2}),
    "shifted": ("qwen3", {"start_id": 1, "rope": RopeConfig(kind="linear", factor=2.0)}),
    "gated": ("llama", {"start_id": 1, "gated_lora_rank": 2, "tied_head": True}),
    "mixture": ("llada2", {}),
    "mixture without groups": ("llada2", {"moe": MoEConfig(num_experts=4, num_active=1, expert_size=8, num_shared=0)}),
}


@pytest.fixture(autouse=True, scope="module")
def modules_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies code to: not the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def exported(name: str, folder: Path, **options: Any) -> Transformer:
    """Our model of a case, in float64; its folder with code is `folder`/out."""
    family, changes = CASES[name]
    save_model(tiny_model(family, std=0.2, **(DIFFUSION | changes)), folder / "source")
    export_model(folder / "source", folder / "out", remote_code=True, **options)
    return load_model(folder / "source", dtype=torch.float64)


def theirs(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def our_logits(model: Transformer, tokens: Tensor, context: int) -> Tensor:
    config, length = model.config, tokens.shape[1]
    positions = torch.arange(length)[None]
    assert config.block_size is not None
    mask = DenseAttend(block_causal_mask(length, length, config.block_size, context=context)[None])
    read = torch.tensor([config.inputs(row, 0, length) for row in tokens.tolist()])
    with torch.no_grad():
        return model.head(model(read, positions, mask, noisy_BT=positions >= context))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_answers_are_ours(name: str, tmp_path: Path) -> None:
    ours = exported(name, tmp_path)
    remote = theirs(tmp_path / "out")
    tokens = torch.arange(11)[None] * 5 % MASK
    tokens = torch.cat((tokens, tokens.flip(1)))
    tokens[0, 9] = MASK
    with torch.no_grad():
        found = remote(tokens, clean_length=8).logits
    torch.testing.assert_close(found, our_logits(ours, tokens, 8 if ours.config.shifted else 0), atol=1e-10, rtol=0)
    for length, threshold, steps, size in ((6, 0.3, 4, 4), (8, 1.0, 3, 8), (1, 0.95, 4, 4)):
        rules = ResolvedParams(block_size=size, steps=steps, threshold=threshold)
        request = prompt_of(length, 9, 3, rules=rules)
        expected = generate_reference(ours, request, MASK)
        options = {"max_new_tokens": 9, "threshold": threshold, "steps": steps, "block_length": size}
        answer = remote.generate(torch.tensor([request.ids]), **options)
        assert answer[0, length:].tolist() == list(expected.ids)


def test_float32_and_what_is_saved_again(tmp_path: Path) -> None:
    ours = exported("mixture", tmp_path)
    remote = theirs(tmp_path / "out", torch.float32)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(remote(tokens).logits.double(), our_logits(ours, tokens, 0), atol=1e-4, rtol=1e-4)
    remote.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tmp_path / "saved", torch.float32)(tokens).logits, remote(tokens).logits)
    low = theirs(tmp_path / "out", torch.bfloat16)
    assert low.model.layers[1].mlp.gate.weight.dtype == torch.float32
    assert low.model.layers[1].mlp.experts[0].gate_proj.weight.dtype == torch.bfloat16


def test_prompts_of_different_lengths(tmp_path: Path) -> None:
    ours = exported("qwen3", tmp_path)
    remote = theirs(tmp_path / "out")
    rules = ResolvedParams(block_size=4, steps=4, threshold=0.95)
    requests = [prompt_of(length, 9, 3, rules=rules) for length in (3, 7)]
    rows = [[4] * (7 - len(request.ids)) + list(request.ids) for request in requests]
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7])
    answers = remote.generate(torch.tensor(rows), attention_mask=mask, max_new_tokens=9)
    for answer, request in zip(answers[:, 7:].tolist(), requests, strict=True):
        expected = list(generate_reference(ours, request, MASK).ids)
        assert answer == expected + [4] * (len(answer) - len(expected))
    with pytest.raises(ValueError, match="attention_mask"):
        remote(torch.tensor(rows), attention_mask=mask)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
    drawn = [remote.generate(torch.tensor([[5, 6]]), generator=generator, **options) for generator in generators]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_the_folder_is_a_model_of_ours(tmp_path: Path) -> None:
    exported("gated", tmp_path)
    assert read_model_config(tmp_path / "out") == read_model_config(tmp_path / "source")
    source, out = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "out"))
    assert source.keys() == out.keys()
    assert all(torch.equal(source[name], out[name]) for name in source)
    export_model(tmp_path / "out", tmp_path / "plain")
    assert not {"auto_map", "remote_code"} & json.loads((tmp_path / "plain" / "config.json").read_text()).keys()
    assert not list((tmp_path / "plain").glob("*.py"))


def test_code_that_does_not_run_a_model_is_not_written(tmp_path: Path) -> None:
    save_model(tiny_model("llama"), tmp_path / "ar")
    with refused(CheckpointError, "autoregressive"):
        export_model(tmp_path / "ar", tmp_path / "out", remote_code=True)
    moe = MoEConfig(num_experts=4, num_active=1, expert_size=8, expert_capacity=2)
    save_model(tiny_model("llada2", moe=moe, **DIFFUSION), tmp_path / "blocks")
    with refused(CheckpointError, "expert_capacity", "2"):
        export_model(tmp_path / "blocks", tmp_path / "out", remote_code=True)
    assert not (tmp_path / "out").exists()


def test_the_files_stand_alone() -> None:
    folder = Path(unmask.models.remote_code.__file__).parent
    for name in ("configuration_unmask.py", "modeling_unmask.py"):
        source = (folder / name).read_text()
        assert "Apache License, Version 2.0" in source
        assert len(source.splitlines()) < 400
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
        named = {node.module or "" for node in imports if isinstance(node, ast.ImportFrom) and not node.level}
        named |= {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        assert {module.split(".")[0] for module in named} <= {"__future__", "math", "typing", "torch", "transformers"}
