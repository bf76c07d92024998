"""A model as other programs read it: a plain Hugging Face folder, and for Ling diffusion models one of the family LLaDA2.

Owns what such a folder holds beside the weights, and the conversion of number formats. Weights go tensor by tensor from file
to file. What was checked against which program is in docs/export.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmask.errors import CheckpointError
from unmask.files import read_json
from unmask.models.arch.config import ModelConfig
from unmask.models.arch.gated_lora import parent_config
from unmask.models.families.registry import LLADA2_BLOCK_SIZE, LLADA2_MASK_ID, slots, write_config
from unmask.models.weights.checkpoint import check_tensors, parameter_dtype, read_model_config
from unmask.models.weights.hub import base_folder, tokenizer_folder
from unmask.models.weights.loading import load_model
from unmask.models.weights.safetensors_io import DEFAULT_SHARD_BYTES, TensorFiles, TensorSpec, write_checkpoint

LLADA2_CODE = "inclusionAI/LLaDA2.0-mini"
"""The repository with the modelling code that Hugging Face runs for `llada2_moe`."""
_THRESHOLD = 0.95  # the default of that code's `generate`
# What the published config.json says beside the sizes. SGLang leaves the selection bias out without the first of these.
_LLADA2_KEYS: dict[str, Any] = {
    "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "router_dtype": "fp32", "norm_head": False,
    "norm_softmax": False, "attention_dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0,
    "output_router_logits": False, "use_cache": False, "use_sliding_window": False,
    "auto_map": {
        "AutoConfig": f"{LLADA2_CODE}--configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": f"{LLADA2_CODE}--modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": f"{LLADA2_CODE}--modeling_llada2_moe.LLaDA2MoeModelLM",
    },
}  # fmt: skip
_COMPANION = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|vocab\.txt|merges\.txt|.*\.model|chat_template\.jinja"
)
_CODE = re.compile(r"(configuration|modeling)_\w+\.py")
_GENERATION = "generation_config.json"


class Exported(NamedTuple):
    """What was written, and what a user of it should know."""

    config: ModelConfig
    dtype: torch.dtype
    notes: tuple[str, ...]


class _Source(NamedTuple):
    config: ModelConfig
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]


def export_model(
    folder: Path, out: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    parent: bool = False, on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:  # fmt: skip
    """Write a model as a plain Hugging Face folder.

    Tensors have the names and shapes of the family. A `bailing_moe_v2` model that was converted to diffusion becomes
    `llada2_moe`, with the config keys that Hugging Face (by remote code), SGLang and dInfer read. An autoregressive model
    stays one.

    Args:
        folder: of a model, or of an adapter, which is folded into its base (and the model then held in memory, once).
        out: new or empty.
        dtype: of the weights; None keeps each tensor's own. Router weights and selection biases are stored in float32 when a
            narrower one is asked for.
        max_shard_bytes: a larger model is split into shards of at most so many bytes.
        parent: leave the gated updates out, and what makes the model a diffusion model with them.
        on_progress: (tensors done, tensors in all).

    Returns:
        The architecture written, the dtype of the embedding, and notes.

    Raises:
        ConfigError: `parent` of a model without gated updates.
        CheckpointError: the model is incomplete, or has a setting that `llada2_moe` has not; a weight is too large for
            `dtype`; `out` is not empty; or the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is not empty; choose another --out")
    with ExitStack() as stack:
        source = _open_files(folder, stack) if base_folder(folder) is None else _open_adapted(folder, dtype, stack)
        config = parent_config(source.config) if parent else source.config
        if config.family == "bailing_moe_v2" and config.mask_id is not None:
            config = _as_llada2(config)
        if config.family == "llada2_moe" and config.shifted:
            raise CheckpointError("the code of llada2_moe does not run shifted models (shift_start_token_id); use unmask")
        specs = {
            name: TensorSpec(slot.shape, source.dtypes[name] if dtype is None else parameter_dtype(slot.parameter, dtype))
            for name, slot in slots(config).items()
        }
        stored = next(iter(specs.values())).dtype
        done = 0

        def read(name: str) -> Tensor:
            nonlocal done
            done += 1
            on_progress(done, len(specs))
            return _convert(name, source.read(name), specs[name].dtype)

        files, jsons = _companions(folder, config)
        write_checkpoint(
            out, _hf_config(config, stored), specs, read, max_shard_bytes=max_shard_bytes, extra_files=files, extra_jsons=jsons,
            always_index=config.family == "llada2_moe",  # dInfer finds tensors by the index only
        )  # fmt: skip
    return Exported(config, stored, _notes(config))


def _open_files(folder: Path, stack: ExitStack) -> _Source:
    config = read_model_config(folder)
    check_tensors(folder, config)
    files = TensorFiles(folder, stack)
    return _Source(config, {name: files.spec(name).dtype for name in slots(config)}, files.read)


def _open_adapted(folder: Path, dtype: torch.dtype | None, stack: ExitStack) -> _Source:
    """The folded model; where no dtype is asked for, in that of the base's embedding."""
    whole = folder
    while (base := base_folder(whole)) is not None:
        whole = base
    if dtype == torch.float16:
        dtype = torch.float32  # loaded in float16, a value too large would be infinite before anybody looks at it
    model = load_model(folder, dtype=dtype or next(iter(_open_files(whole, stack).dtypes.values())))
    state, places = model.state_dict(), slots(model.config)
    dtypes = {name: state[slot.parameter].dtype for name, slot in places.items()}
    return _Source(model.config, dtypes, lambda name: state[places[name].parameter][places[name].index])


def _as_llada2(config: ModelConfig) -> ModelConfig:
    """The same tensors under the other family's name; refused where that family's code computes something else."""
    normalizes = config.moe is None or config.moe.normalize or config.moe.num_active == 1
    fixed = {"use_qk_norm": config.qk_norm, "use_bias": not config.out_bias, "norm_topk_prob": normalizes}
    differing = [key for key, fits in fixed.items() if not fits]
    if differing:
        raise CheckpointError(f"{differing[0]} is not what the code of llada2_moe takes for granted; use the model with unmask")
    return replace(config, family="llada2_moe")


def _convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.to(dtype)
    if converted.dtype != tensor.dtype and not torch.isfinite(converted).all():
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} holds values beyond {kind}'s range ({torch.finfo(dtype).max:g}); export as bfloat16")
    return converted


def _hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    if config.family == "llada2_moe":
        keys = _LLADA2_KEYS | {"rotary_dim": config.rotary_dim}
        config = replace(config, hf_extras=config.hf_extras | keys)
    return write_config(config, dtype=str(dtype).removeprefix("torch."))


def _companions(folder: Path, config: ModelConfig) -> tuple[list[Path], dict[str, Any]]:
    """Files to copy and JSON files to write: tokenizer, defaults of generation, an autoregressive model's own code."""
    source = tokenizer_folder(folder)
    files = [] if source is None else [path for path in sorted(source.iterdir()) if _COMPANION.fullmatch(path.name)]
    jsons: dict[str, Any] = {}
    if any(path.name == "tokenizer_config.json" for path in files):
        jsons["tokenizer_config.json"] = _tokenizer_config(read_json(files[0].parent / "tokenizer_config.json"))
    if config.mask_id is not None:
        jsons[_GENERATION] = _generation_config(config)
    else:
        files += [path for path in sorted(folder.iterdir()) if path.name == _GENERATION or _CODE.fullmatch(path.name)]
    return files, jsons


def _tokenizer_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Without what transformers 5 alone reads: the published code of LLaDA2 needs transformers 4."""
    changed = {key: value for key, value in hf.items() if key not in ("is_local", "local_files_only", "backend")}
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    return changed


def _generation_config(config: ModelConfig) -> dict[str, Any]:
    """Token ids under their Hugging Face names; the rest under the names of the arguments of LLaDA2's `generate`."""
    block_size = config.block_size or LLADA2_BLOCK_SIZE
    return {
        "block_length": block_size,
        "do_sample": False,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "mask_token_id": config.mask_id,
        "pad_token_id": config.pad_id,
        "steps": block_size,
        "threshold": _THRESHOLD,
    }


def _notes(config: ModelConfig) -> tuple[str, ...]:
    """Where other readers assume what is not so here."""
    if config.gated_lora_rank is not None:
        return ("other programs read its autoregressive parent only: the gated updates are unmask's",)
    if config.start_id is not None:
        return (f"the model is shifted: position p reads token p - 1, position 0 reads token {config.start_id}",)
    if config.family != "llada2_moe":
        return ()
    mask_id, size = LLADA2_MASK_ID, LLADA2_BLOCK_SIZE
    notes = []
    if config.mask_id != mask_id:
        notes.append(f"SGLang knows no mask token but {mask_id} for llada2_moe; this model's is {config.mask_id}")
    if config.block_size != size:
        notes.append(f"SGLang decodes blocks of {size} unless --dllm-algorithm-config sets block_size: {config.block_size}")
    return tuple(notes)
