"""`unmask batch`: answer a file of requests in OpenAI's batch format.

Owns the options and what is reported. Answering is `serve.batch`'s.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unmask.cli import decoding as options
from unmask.cli.console import make_console
from unmask.cli.startup import INTERRUPTED
from unmask.errors import ConfigError

if TYPE_CHECKING:
    from unmask.serve.batch_file import BatchCounts

STOP_NOTICE = b"\nfinishing what runs; Ctrl-C again drops it\n"
FAILED = 1
"""Exit code where some of the requests were refused or failed."""

Name = Annotated[
    str | None, typer.Option(help="Model name that the requests use.", show_default="MODEL; one in all requests does, too")
]
CacheTokens = Annotated[int | None, typer.Option(min=1, help="Tokens that the KV cache holds.", show_default="what fits 1 GiB")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="NAME=FOLDER",
        help="LoRA adapter of the model, for requests of MODEL:NAME; repeatable. [default: none]",
        rich_help_panel="Model",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with --out: what it answers is not asked again, failures of the server (5xx) are."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Ray cluster that answers; auto: the one of this machine, local: one of its own. [default: none]",
        rich_help_panel="Ray",
    ),
]
Replicas = Annotated[
    int | None,
    typer.Option(min=1, help="Replicas of the model on the cluster.", show_default="one a node", rich_help_panel="Ray"),
]
ReplicaCpus = Annotated[int, typer.Option(min=1, help="CPUs of a replica.", rich_help_panel="Ray")]


def batch(
    requests: Annotated[Path, typer.Argument(metavar="REQUESTS", help="A file of requests, one JSON object a line.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the answers.")],
    model: options.Model = options.DIFFUSION_MODEL,
    name: Name = None,
    max_concurrent: Annotated[int, typer.Option(min=1, help="Completions decoded together.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a chat completion that sets no limit.")] = 1024,
    cache_tokens: CacheTokens = None,
    resume: Resume = False,
    lora: Loras = None,
    ray: RayAddress = None,
    replicas: Replicas = None,
    replica_cpus: ReplicaCpus = 1,
    quantize: options.Quantize = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Answer a file of requests in OpenAI's batch format, many at a time.

    \b
    unmask batch requests.jsonl --out answers.jsonl
    unmask batch requests.jsonl --out answers.jsonl --resume
    unmask batch requests.jsonl --out answers.jsonl --lora support=out/lora/adapter

    A line is {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}; url may be
    /v1/completions, /v1/responses, /v1/messages or /infill, too. Every custom_id is answered once, in any order, as the server
    would answer it; a request that it would refuse has its error in the file, and the exit code is 1. Killed or stopped by
    Ctrl-C, the job goes on with --resume.

    With --ray, replicas on a cluster answer, each with --max-concurrent completions at a time and, for --device cuda, one GPU;
    MODEL and adapters must be found on every node.
    """
    from unmask.cli.interrupt import stop_on_interrupt
    from unmask.cli.progress import counting
    from unmask.serve.batch import run_batch
    from unmask.serve.batch_file import BatchFile
    from unmask.serve.batch_ray import RayOptions, run_ray_batch
    from unmask.serve.config import ServerConfig

    if out.exists() and not resume:
        raise ConfigError(f"{out} is there already; --resume goes on with it, or choose another file")
    batch_file = BatchFile.read(requests)
    loras, gpus = tuple(lora or ()), int(device == "cuda")
    config = ServerConfig(
        names=asked_names(batch_file.models, loras) if name is None else (name,),
        loras=loras, max_loras=max(1, len(loras)),
        max_concurrent=max_concurrent, max_tokens=max_tokens, cache_tokens=cache_tokens,
    )  # fmt: skip
    load = functools.partial(options.load, model, dtype, device, quantize)
    cluster = None if ray is None else RayOptions(address=ray, replicas=replicas, cpus=replica_cpus, gpus=gpus)
    with stop_on_interrupt(notice=STOP_NOTICE) as should_stop, counting(make_console(stderr=True), "answering") as show:

        def on_progress(counts: BatchCounts) -> None:
            show(counts.done, counts.total)

        if cluster is None:
            counts = run_batch(load(), batch_file, out, config, on_progress=on_progress, should_stop=should_stop)
        else:
            counts = run_ray_batch(load, batch_file, out, config, cluster, on_progress=on_progress, should_stop=should_stop)
    _report(counts, out)


def asked_names(models: Iterable[str], loras: Sequence[str]) -> tuple[str, ...]:
    """The name that all requests give the model, with an adapter or without; none where there are several, or none."""
    adapters = {each.partition("=")[0] for each in loras}
    parts = [(model, *model.rpartition(":")) for model in models if model not in adapters]
    names = {base if adapter in adapters else model for model, base, _, adapter in parts}
    return tuple(names) if len(names) == 1 else ()


def _report(counts: BatchCounts, out: Path) -> None:
    """Say how far the job is, by the exit code too."""
    failed = f", {counts.failed:,} of them with an error" if counts.failed else ""
    typer.echo(f"answered {counts.done:,} of {counts.total:,} requests{failed}: {out}", err=True)
    if counts.done < counts.total:
        typer.echo("go on    the same command with --resume", err=True)
        raise typer.Exit(INTERRUPTED)
    if counts.failed:
        raise typer.Exit(FAILED)
