"""`unmask info`: what a model is, from its config.json alone, and what decodes it by default on this machine.

Owns the figures shown of an architecture, and what quantised weights were measured to cost the embedded models. Weights are
looked at only where they lie in the folder, and never read.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.console import make_console, pick_device
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.models.arch.config import ModelConfig

COST_OF_INT8 = {
    "smollm2-135m": (0.957, 0.010),
    "smollm2-135m-diffusion": (0.957, 0.010),
    "smollm2-135m-converted": (0.961, 0.017),
}
"""Of the embedded models: share of positions whose likeliest token stays, and relative change of perplexity, against float32
(`benchmarks/quantization.py`, own answers)."""


def info(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, Hugging Face id, embedded model, or published model (llada2-mini).")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a quantised model, compare every byte with its manifest.")
    ] = False,
) -> None:
    """Describe a model.

    Architecture, parameters, memory in each precision, mask token, block size, and the weights that decode by default here.

    \b
    unmask info smollm2-135m
    unmask info llada2-mini --json

    Only config.json is needed: nothing else is fetched, and no weight is read.
    """
    from unmask.cli.progress import counting
    from unmask.models.weights import manifest
    from unmask.models.weights.hub import base_name

    config, folder = find_config(model)
    base = None if folder is None else base_name(folder)
    console = make_console()
    quantized = None
    if folder is not None and manifest.is_quantized(folder):
        if verify:
            with counting(console, "verifying") as on_progress:
                manifest.verify(folder, manifest.read_manifest(folder), on_progress)
        quantized = quantized_facts(folder, config) | {"verified": verify}
    elif verify:
        raise ConfigError(f"--verify compares a quantised model with its manifest; {model} has none: leave it out")
    weights = None if folder is None or base is not None or quantized is not None else _weights(folder, config)
    facts = {**describe(config), "auto": _auto(model, config) if quantized is None else None, "quantized": quantized}
    if as_json:
        typer.echo(json.dumps({"model": model, **facts, "adapter_of": base, "weights_on_disk": weights}))
        return
    rows = _rows(config, facts, weights) if base is None else [*_rows(config, facts, None), ("adapter", f"of {base}")]
    for name, value in rows:
        console.print(f"{name:<16} {value}", soft_wrap=True)


def describe(config: ModelConfig) -> dict[str, Any]:
    """Facts of an architecture, as `unmask info --json` prints them. Memory is that of the weights, in bytes."""
    import torch

    from unmask.engine.capabilities import capabilities
    from unmask.engine.quantization import BITS
    from unmask.models.arch.transformer import Transformer
    from unmask.models.dtypes import dtype_name
    from unmask.models.native.sizes import packed_bytes
    from unmask.models.weights.room import kv_cache_bytes, weight_bytes

    with torch.device("meta"):
        model = Transformer(config)
    total = model.num_parameters()
    moe = config.moe
    experts = None if moe is None else {"routed": moe.num_experts, "active": moe.num_active, "shared": moe.num_shared}
    return {
        "architecture": config.family,
        "kind": "autoregressive" if config.mask_id is None else "diffusion",
        "capabilities": asdict(capabilities(config)),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_size": config.ffn_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "tied_head": config.tied_head,
        "experts": experts,
        "parameters": total,
        "active_parameters": model.num_active_parameters(),
        "memory_bytes": {
            **{dtype_name(dtype): weight_bytes(config, dtype) for dtype in (torch.float32, torch.bfloat16)},
            **{name: packed_bytes(config, torch.bfloat16, bits) for name, bits in BITS.items()},
        },
        "kv_cache_bytes_per_token": kv_cache_bytes(config, torch.bfloat16, 1),
        "mask_id": config.mask_id,
        "block_size": config.block_size,
        "shift_start_id": config.start_id,
        "gated_lora_rank": config.gated_lora_rank,
        "eos_ids": list(config.eos_ids),
        "context": config.max_positions,
        "ignored_config_keys": sorted(config.hf_extras),
    }


def _auto(model: str, config: ModelConfig) -> dict[str, Any]:
    """What `--quantize auto` and `--dtype auto` pick on this machine, and what int8 was measured to cost."""
    import torch

    from unmask.engine.quantization import decoding_weights
    from unmask.engine.room import DecodingRoom
    from unmask.models.dtypes import dtype_name, parse_dtype
    from unmask.models.native.library import kernel_variant
    from unmask.models.weights import room

    device = pick_device("auto")
    dtype, memory = parse_dtype("auto", device), room.available_memory(device)
    options = DecodingRoom(config, dtype, torch.device(device)).options()
    agreement, change = COST_OF_INT8.get(model, (None, None))
    return {
        "device": device,
        "quantize": decoding_weights("auto", torch.device(device)),
        "dtype": dtype_name(dtype),
        "kernels": kernel_variant(),
        "available_bytes": None if memory is None else memory.num_bytes,
        "needed_bytes": options,
        "fits": [name for name, size in options.items() if room.fits(size, memory)],
        "int8_same_likeliest_token": agreement,
        "int8_change_of_perplexity": change,
    }


def find_config(model: str) -> tuple[ModelConfig, Path | None]:
    """The architecture, and the folder it was found in, unless that is of no interest."""
    from unmask.models.families.registry import PUBLISHED, published_config, read_config
    from unmask.models.weights.checkpoint import read_model_config
    from unmask.models.weights.hub import EMBEDDED_MODELS, fetch_config, gguf_config, is_hub_id, resolve, unknown_model

    if model and Path(model).suffix == ".gguf" and Path(model).expanduser().is_file():
        return gguf_config(Path(model).expanduser()), None
    if model in EMBEDDED_MODELS or (model and Path(model).expanduser().exists()):
        folder = resolve(model)
        return read_model_config(folder), folder
    if model in PUBLISHED:
        return read_config(published_config(model)), None
    if is_hub_id(model):
        return read_model_config(fetch_config(model)), None
    raise unknown_model(model, (*EMBEDDED_MODELS, *PUBLISHED))


def _room(auto: dict[str, Any]) -> str:
    """What can be loaded here, for people."""
    from rich.filesize import decimal

    if auto["available_bytes"] is None:
        return "not known"
    fitting = [f"--{name}" for name in auto["fits"]]
    least = min(auto["needed_bytes"], key=auto["needed_bytes"].__getitem__)
    can = ", ".join(fitting) if fitting else f"nothing fits: --{least} needs {decimal(auto['needed_bytes'][least])}"
    return f"{decimal(max(auto['available_bytes'], 0))} on {auto['device']}: {can}"


def quantized_facts(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """What a quantised model was made from, and what a token reads of it."""
    import torch

    from unmask.models.native.packed_folder import bytes_of_a_token, map_folder
    from unmask.models.weights import room
    from unmask.models.weights.manifest import read_manifest

    manifest = read_manifest(folder)
    memory = room.available_memory(torch.device("cpu"))
    return {
        "quantize": manifest.quantize,
        "recipe": manifest.recipe,
        "made_from": manifest.source.model,
        "layers_of_source": manifest.source.num_layers,
        "num_files": len(manifest.pieces),
        "num_bytes": manifest.num_bytes,
        "bytes_of_a_token": bytes_of_a_token(map_folder(folder, manifest, config)),
        "fits": room.fits(manifest.num_bytes, memory),
        "available_bytes": None if memory is None else memory.num_bytes,
    }


def _decoding_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What decodes, and whether there is room, for people."""
    from rich.filesize import decimal

    quantized = facts["quantized"]
    if quantized is None:
        return [("decodes with", _words_of(facts["auto"])), ("room", _room(facts["auto"]))]
    layers = "" if quantized["layers_of_source"] == facts["layers"] else f", the first {facts['layers']} layers"
    verified = "; every byte is as it was written" if quantized["verified"] else ""
    where = "from memory" if quantized["fits"] else f"from disk: {decimal(quantized['available_bytes'])} of memory are free"
    return [
        ("quantised", f"{quantized['quantize']}, from {quantized['made_from']}{layers}"),
        (
            "on disk",
            f"{decimal(quantized['num_bytes'])} in {quantized['num_files']} files, mapped by the CPU kernels{verified}",
        ),
        ("a token reads", f"{decimal(quantized['bytes_of_a_token'])} {where}"),
    ]


def _words_of(auto: dict[str, Any]) -> str:
    """What decodes by default, for people."""
    kernels = f"CPU kernels: {auto['kernels'] or 'not built'}"
    if auto["quantize"] == "none":
        return f"the weights as they are, {auto['dtype']} on {auto['device']} ({kernels})"
    cost = "cost not measured: benchmarks/quantization.py"
    if auto["int8_same_likeliest_token"] is not None:
        same, change = auto["int8_same_likeliest_token"], auto["int8_change_of_perplexity"]
        cost = f"likeliest token as in float32 at {same:.1%} of positions, perplexity {change:+.1%}"
    return f"{auto['quantize']} weights ({kernels}; {cost}); --quantize none: {auto['dtype']}"


def _weights(folder: Path, config: ModelConfig) -> dict[str, int] | None:
    """What safetensors the folder holds, and how many tensors of the architecture are missing; None for a config.json alone."""
    from unmask.models.families.registry import stored_tensors
    from unmask.models.weights.safetensors_io import tensor_index

    if not any(folder.glob("*.safetensors*")):
        return None
    index = tensor_index(folder)
    files = set(index.values())
    missing = len(stored_tensors(config).keys() - index.keys())
    num_bytes = sum(file.stat().st_size for file in files)
    return {"num_tensors": len(index), "num_files": len(files), "num_bytes": num_bytes, "missing": missing}


def _rows(config: ModelConfig, facts: dict[str, Any], weights: dict[str, int] | None) -> list[tuple[str, str]]:
    """Facts in words, for people."""
    from rich.filesize import decimal

    total, active = facts["parameters"], facts["active_parameters"]
    rows = [
        ("architecture", f"{config.family}, {facts['kind']}"),
        ("layers", f"{config.num_layers} of hidden size {config.hidden_size}, feed-forward {config.ffn_size}"),
        ("attention", f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} for keys and values"),
    ]
    if config.moe is not None:
        moe = config.moe
        rows.append(("experts", f"{moe.num_active} of {moe.num_experts} of size {moe.expert_size}, {moe.num_shared} shared"))
    rows += [
        ("vocabulary", f"{config.vocab_size:,} tokens, head {'tied' if config.tied_head else 'of its own'}"),
        ("parameters", f"{total:,}" + ("" if active == total else f" ({active:,} active for a token)")),
        ("memory", ", ".join(f"{name} {decimal(size)}" for name, size in facts["memory_bytes"].items())),
        ("cache", f"{decimal(facts['kv_cache_bytes_per_token'])} for each token in bfloat16"),
        ("mask token", "none: an autoregressive model" if config.mask_id is None else f"id {config.mask_id}"),
        ("decoding", ", ".join(name for name, able in facts["capabilities"].items() if able) or "autoregressive"),
        ("block size", "none" if config.block_size is None else f"{config.block_size} tokens"),
        *([] if config.start_id is None else [("shifted", f"yes: reads the token before, id {config.start_id} at the start")]),
        *([] if config.gated_lora_rank is None else [("gated LoRA", f"rank {config.gated_lora_rank}, for noisy rows")]),
        ("context", f"{config.max_positions:,} tokens"),
        *_decoding_rows(facts),
        ("other keys (kept)", ", ".join(facts["ignored_config_keys"]) or "none"),
    ]
    if weights is not None:
        lack = f", {weights['missing']} missing" if weights["missing"] else ""
        what = f"{weights['num_tensors']} tensors in {weights['num_files']} {'file' if weights['num_files'] == 1 else 'files'}"
        rows.append(("on disk", f"{what}, {decimal(weights['num_bytes'])}{lack}"))
    return rows
