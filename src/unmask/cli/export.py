"""`unmask export`: write a model as other programs read it.

Owns the options. What is written is `models.export`'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli.console import make_console
from unmask.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B", re.IGNORECASE)


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a model or adapter, Hugging Face id, or embedded model.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="New or empty folder for the files; with --format gguf, a new file.")
    ],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="hf: a Hugging Face folder. sdar: one for SGLang and LMDeploy, of a diffusion Qwen3. gguf: for llama.cpp.",
        ),
    ] = "hf",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as each tensor is stored.")] = "auto",
    type_: Annotated[
        str, typer.Option("--type", help="Of GGUF weights: f32, f16, bf16, q8_0, q4_0, q4_1, or auto: as they are stored.")
    ] = "auto",
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Add code with which transformers runs and decodes a diffusion model.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Split larger weights into files of at most this size.")] = "5GB",
    parent: Annotated[
        bool, typer.Option("--parent", help="Of a model with gated LoRA, the autoregressive model it was made from.")
    ] = False,
) -> None:
    """Write a model as a Hugging Face folder, for transformers, SGLang, LMDeploy or dInfer, or as a GGUF file for llama.cpp.

    \b
    unmask export out/mine --out out/for-transformers
    unmask export out/chat/adapter --out out/chat-bf16 --dtype bfloat16
    unmask export out/mine --remote-code --out out/with-code
    unmask export out/qwen3-diffusion --format sdar --out out/sdar
    unmask export smollm2-135m-diffusion --parent --format gguf --type q8_0 --out out/parent.gguf

    An adapter is folded into its base. A Ling model converted to diffusion becomes a LLaDA2 model. Router weights stay in
    float32 whatever dtype is narrower. GGUF files are written of dense autoregressive models.
    """
    if format_ == "gguf":
        if dtype != "auto":
            raise ConfigError("--dtype is of --format hf and sdar; GGUF weights have a --type")
        if remote_code:
            raise ConfigError("--remote-code is of --format hf; a GGUF file holds none")
        _export_gguf(model, out, type_, parent)
        return
    if format_ not in ("hf", "sdar") or type_ != "auto":
        raise ConfigError(f"--format is {format_!r} and --type {type_!r}; --format is hf, sdar or gguf, --type of gguf only")
    _export_folder(model, out, dtype, shard_bytes(max_shard_size), parent=parent, sdar=format_ == "sdar", code=remote_code)


def _export_folder(model: str, out: Path, dtype: str, shard: int, *, parent: bool, sdar: bool, code: bool) -> None:
    from unmask.cli.progress import counting
    from unmask.models.dtypes import dtype_name, parse_dtype
    from unmask.models.weights.export import export_model
    from unmask.models.weights.hub import ngrams_path, resolve

    wanted = None if dtype == "auto" else parse_dtype(dtype)
    folder, console = resolve(model), make_console()
    with counting(console, "exporting") as on_progress:
        exported = export_model(
            folder, out, dtype=wanted, max_shard_bytes=shard, parent=parent, sdar=sdar, remote_code=code,
            ngrams=ngrams_path(model, folder), on_progress=on_progress,
        )  # fmt: skip
    kind = "autoregressive" if exported.config.mask_id is None else "diffusion"
    _report(console, out, f"{exported.config.family}, {kind}, {dtype_name(exported.dtype)}", exported.notes)


def _export_gguf(model: str, out: Path, kind: str, parent: bool) -> None:
    from unmask.cli.progress import counting
    from unmask.data.chat_template import DEFAULT
    from unmask.data.tokenizer_files import read_tokenizer
    from unmask.models.weights.gguf_export import GGUFTokenizer, export_gguf
    from unmask.models.weights.hub import resolve, tokenizer_folder

    folder, console = resolve(model), make_console()
    source = tokenizer_folder(folder)
    if source is None:
        raise CheckpointError(
            f"{model} has no tokenizer, without which llama.cpp reads no file; copy the model's own beside it"
        )
    files = read_tokenizer(source)
    tokenizer = GGUFTokenizer(files.backend, files.named, files.templates.get(DEFAULT))
    with counting(console, "exporting") as on_progress:
        exported = export_gguf(folder, out, tokenizer, kind=kind, parent=parent, on_progress=on_progress)
    _report(console, out, f"GGUF, {exported.config.family}, {exported.kind}", exported.notes)


def _report(console: Console, out: Path, form: str, notes: Sequence[str]) -> None:
    """Print what was written."""
    for label, text in (("model", out), ("format", form), *(("note", note) for note in notes)):
        console.print(f"{label:8} {text}", soft_wrap=True)


def shard_bytes(text: str) -> int:
    """Bytes of a size such as "5GB", "500 MB" or "2GiB".

    Raises:
        ConfigError: not a size, or less than a byte.
    """
    found = _SIZE.fullmatch(text.strip())
    number = 0
    if found is not None:
        thousand = 1024 if found[3] else 1000
        number = int(float(found[1]) * thousand ** " kmgt".index(found[2].lower() or " "))
    if number < 1:
        raise ConfigError(f"--max-shard-size is {text!r}; write a number and a unit, such as 5GB or 500MiB")
    return number
