"""`unmask serve`: the OpenAI-compatible server and its page.

Owns the options and what is said at the start. Serving itself is `unmask.serve`'s.
"""

from __future__ import annotations

import socket
from typing import Annotated, Literal

import typer

from unmask.cli import decoding as options
from unmask.cli.console import INTERRUPTED, pick_device
from unmask.errors import ConfigError


def serve(
    model: options.Model = options.DIFFUSION_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every one of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="UNMASK_API_KEY", help="Clients must send it; may be given several times. Left out: open."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; left out: MODEL.")] = None,
    max_concurrent: Annotated[int, typer.Option(help="Completions decoded together.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Completions that may wait; more are told to come back (429).")] = 64,
    timeout: Annotated[float, typer.Option(help="Most seconds of a request, waiting included.")] = 600.0,
    shutdown_grace: Annotated[float, typer.Option(help="Seconds that running requests get at Ctrl-C or SIGTERM.")] = 30.0,
    max_body: Annotated[int, typer.Option(help="Most bytes of a request's body.")] = 4 * 2**20,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens where a client does not say.")] = 1024,
    cache_tokens: Annotated[int | None, typer.Option(help="Tokens that the cache holds; left out: what fits 1 GiB.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="Web origin that may use the server (CORS).")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Name that the Host header may hold, behind a proxy.")] = None,
    quantize: options.QuantizeAuto = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    log_format: Annotated[Literal["json", "text"], typer.Option(help="One JSON object a line, or words.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers into the log.")] = False,
) -> None:
    """Serve a model: the OpenAI API, and a page to chat with it.

    \b
    unmask serve
    unmask serve --model out/mine --port 8080 --api-key "$KEY"
    unmask serve --host 0.0.0.0 --api-key "$KEY" --log-format json

    \b
    In Python:  openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    In a shell: unmask chat --url http://127.0.0.1:8000

    Ctrl-C or SIGTERM lets what runs finish and takes nothing new (exit code 0); Ctrl-C again ends at once (130).
    """
    from unmask.serve.config import ServerConfig

    config = ServerConfig(
        name=name,
        api_keys=tuple(api_key or ()),
        max_concurrent=max_concurrent,
        max_queue=max_queue,
        timeout=timeout,
        shutdown_grace=shutdown_grace,
        max_body=max_body,
        default_max_tokens=max_tokens,
        cache_tokens=cache_tokens,
        allow_origins=tuple(allow_origin or ()),
        allow_hosts=tuple(allow_host or ()),
        log_prompts=log_prompts,
    )

    import unmask
    from unmask.serve.logs import configure_logging
    from unmask.serve.server import listen, run, url_of

    listener = listen(host, port)
    weights = None if quantize == "none" else quantize
    language_model = unmask.load(model, dtype=dtype, device=pick_device(device), quantize=weights)
    configure_logging(log_format)
    place = url_of(listener)
    typer.echo(f"{config.name or model} is served at {place}", err=True)
    typer.echo(f"chat in a browser: {place}/    API: {place}/v1    metrics: {place}/metrics    Ctrl-C stops", err=True)
    if not config.api_keys and not is_loopback(host):
        typer.echo(f"note: anybody who reaches {host} may use this server; give --api-key", err=True)
    if not run(language_model, config, listener, loopback=is_loopback(host)):
        raise typer.Exit(INTERRUPTED)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Raises:
        ConfigError: the address is unknown.
    """
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"host {host!r} is unknown ({error.strerror}); use an address of this machine") from error
    return all(str(address).startswith("127.") or address == "::1" for address in found)
