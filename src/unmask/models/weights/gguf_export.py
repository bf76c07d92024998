"""Export of a dense autoregressive model as a GGUF file, which llama.cpp runs.

Owns which models can be written, and the type of each tensor. Weights go tensor by tensor from file to file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from unmask.errors import CheckpointError, ConfigError
from unmask.files import atomic_write
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.gated_lora import parent_config
from unmask.models.families.registry import stored_tensors, write_config
from unmask.models.weights.export import converted_tensor, open_source
from unmask.models.weights.gguf.layout import ROPE_FACTORS, gguf_name, heads_interleaved, interleave
from unmask.models.weights.gguf.metadata import ARCHITECTURES, gguf_metadata, llama3_factors
from unmask.models.weights.gguf.tokenizer import tokenizer_metadata

KINDS: Mapping[str, str] = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0",
    "q4_1": "MOSTLY_Q4_1",
}  # fmt: skip
"""Types of weights that can be written, and llama.cpp's name for a file of them."""
_OF_DTYPE = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# The first and the last matrix cost most quality for their size, as in llama.cpp's own mixtures.
_WIDER = {"q4_0": "q8_0", "q4_1": "q8_0"}
_BLOCK = 32  # columns of a quantised block


class GGUFTokenizer(NamedTuple):
    """A tokenizer for a file: of tokenizer.json, spellings of its named tokens by role, and the chat template's source."""

    backend: Tokenizer
    named: Mapping[str, str]
    template: str | None


class GGUFExported(NamedTuple):
    """The result of an export: the config and the type written, and notes for whoever uses the file."""

    config: ModelConfig
    kind: str
    notes: tuple[str, ...]


def export_gguf(
    folder: Path, out: Path, tokenizer: GGUFTokenizer, *, kind: str = "auto", parent: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GGUFExported:  # fmt: skip
    """Write a dense autoregressive model as one GGUF file.

    Vectors are float32. Of a 4-bit type, embedding and head are Q8_0; a matrix whose rows are no whole number of blocks is F16.

    Args:
        folder: of a model, or of an adapter, which is folded into its base.
        out: a new file.
        tokenizer: of the model.
        kind: one of `KINDS`; "auto": as the embedding is stored.
        parent: of a model with gated LoRA, its autoregressive parent.
        on_progress: (tensors done, tensors in all).

    Returns:
        The architecture and type written, and notes.

    Raises:
        ConfigError: an unknown `kind`, or `parent` of a model without gated LoRA.
        CheckpointError: a mixture or a diffusion model; llama.cpp has no name for how the tokenizer splits text; the model is
            incomplete; `out` exists; or the disk is full.
    """
    if kind != "auto" and kind not in KINDS:
        raise ConfigError(f"type is {kind!r}; it must be auto or one of {', '.join(KINDS)}")
    if out.exists():
        raise CheckpointError(f"{out} exists; choose another file")
    with ExitStack() as stack:
        source = open_source(folder, None, stack)
        config = parent_config(source.config) if parent else source.config
        _check_exportable(config)
        hf = write_config(config)
        stored = stored_tensors(config)
        kind = _OF_DTYPE.get(next(iter(source.dtypes.values())), "f32") if kind == "auto" else kind
        kinds = {name: _kind_of(name, tensor.shape, kind) for name, tensor in stored.items()}
        metadata = {
            **gguf_metadata(hf),
            "general.name": folder.resolve().name,
            **tokenizer_metadata(tokenizer.backend, tokenizer.named, config.eos_ids, tokenizer.template, config.vocab_size),
        }
        extra = {ROPE_FACTORS: llama3_factors(config.rope, config.head_dim)} if config.rope.kind == "llama3" else {}

        def tensors() -> Any:
            yield from extra.items()
            for done, name in enumerate(stored, start=1):
                yield gguf_name(name), _packed(name, source.read(name), kinds[name], config)
                on_progress(done, len(stored))

        infos = {name: (values.shape, "f32") for name, values in extra.items()}
        infos |= {gguf_name(name): (tensor.shape, kinds[name]) for name, tensor in stored.items()}
        atomic_write(out, lambda file: _write(Path(file.name), metadata, kind, infos, tensors()))
    narrow = [name for name in stored if kinds[name] == "f16" != kind and len(stored[name].shape) > 1]
    notes = [f"{len(narrow)} matrices are F16: their rows are no whole number of {_BLOCK} columns"] if narrow else []
    return GGUFExported(config, kind, tuple(notes))


def _check_exportable(config: ModelConfig) -> None:
    if config.family not in ARCHITECTURES or config.moe is not None:
        hint = "llama.cpp's own converter reads what `unmask export` writes of Ling; LLaDA2 has no settled form there"
        raise CheckpointError(f"GGUF files are written of {', '.join(ARCHITECTURES)}, not of family '{config.family}': {hint}")
    if config.mask_id is not None:
        remedy = "export its autoregressive parent" if config.gated_lora_rank is not None else "export it for transformers"
        raise CheckpointError(f"the model denoises blocks, and llama.cpp decodes token by token; {remedy}")
    if config.family != "llama" and config.out_bias:
        raise CheckpointError(f"attention_bias is true; llama.cpp's {config.family} has no such biases")


def _kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1:
        return "f32"
    if kind.startswith("q") and shape[-1] % _BLOCK:
        return "f16"
    is_outer = name.startswith(("model.embed_tokens", "lm_head"))
    return _WIDER.get(kind, kind) if is_outer else kind


def _packed(name: str, tensor: Tensor, kind: str, config: ModelConfig) -> NDArray[Any]:
    """The values of a tensor as they lie in the file."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    heads = heads_interleaved(name, config.family, config.num_heads, config.num_kv_heads)
    rows = tensor if heads is None else interleave(tensor, heads)
    if kind == "f16":
        rows = converted_tensor(name, rows, torch.float16)
    packed: NDArray[Any] = quantize(np.ascontiguousarray(rows.float().numpy()), GGMLQuantizationType[kind.upper()])
    return packed


def _write(
    path: Path, metadata: Mapping[str, Any], kind: str, infos: Mapping[str, tuple[tuple[int, ...], str]], tensors: Any
) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import quant_shape_to_byte_shape

    writer = GGUFWriter(path, metadata["general.architecture"])
    writer.add_quantization_version(2)
    writer.add_file_type(LlamaFileType[KINDS[kind]])
    for key, value in metadata.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, (shape, of) in infos.items():
        raw = GGMLQuantizationType[of.upper()]
        dtype: np.dtype[Any] = np.dtype({"f32": np.float32, "f16": np.float16}.get(of, np.uint8))
        in_file = quant_shape_to_byte_shape(shape, raw) if dtype == np.uint8 else shape
        writer.add_tensor_info(name, in_file, dtype, int(np.prod(in_file)) * dtype.itemsize, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, values in tensors:
        assert name in infos
        writer.write_tensor_data(values)
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a value of metadata under the type that llama.cpp reads it as."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
