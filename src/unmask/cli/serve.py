"""`unmask serve`: the OpenAI-compatible server and its chat page.

Owns the command line options and the start messages. The server itself is the package `unmask.serve`.
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
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="UNMASK_API_KEY", show_default="no key needed", help="Key for clients; repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(show_default="MODEL", help="Model name that clients use.")] = None,
    max_concurrent: Annotated[int, typer.Option(help="Completions decoded together.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Completions that may wait; more get status 429.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, waiting included.")] = 600.0,
    shutdown_grace: Annotated[float, typer.Option(help="Seconds to finish running requests at Ctrl-C or SIGTERM.")] = 30.0,
    max_body: Annotated[int, typer.Option(help="Bytes of a request body.")] = 4 * 2**20,
    max_tokens: Annotated[int, typer.Option(help="New tokens of a chat completion that sets no limit.")] = 1024,
    cache_tokens: Annotated[
        int | None, typer.Option(show_default="what fits 1 GiB", help="Tokens that the KV cache holds.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web origin that may use the server (CORS); repeatable.")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="Accepted value of the Host header; repeatable.")] = None,
    quantize: options.QuantizeAuto = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    log_format: Annotated[Literal["json", "text"], typer.Option(help="One JSON object per line, or text.")] = "text",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts and answers.")] = False,
) -> None:
    """Serve a model with the OpenAI API and a chat page.

    \b
    unmask serve
    unmask serve --model out/mine --port 8080 --api-key "$KEY"
    unmask serve --host 0.0.0.0 --api-key "$KEY" --log-format json

    \b
    In Python:  openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    In a shell: unmask chat --url http://127.0.0.1:8000

    Ctrl-C or SIGTERM finishes running requests and accepts no new ones (exit code 0); a second Ctrl-C ends at once (130).
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
    url = url_of(listener)
    typer.echo(f"{config.name or model} is served at {url}", err=True)
    typer.echo(f"chat in a browser: {url}/    API: {url}/v1    metrics: {url}/metrics    Ctrl-C stops", err=True)
    if not config.api_keys and not is_loopback(host):
        typer.echo(f"note: anyone who can reach {host} may use this server; set --api-key", err=True)
    if not run(language_model, config, listener, loopback=is_loopback(host)):
        raise typer.Exit(INTERRUPTED)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only.

    Raises:
        ConfigError: the address is unknown.
    """
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise ConfigError(f"host {host!r} is unknown ({error.strerror}); use an address of this machine") from error
    return all(str(address).startswith("127.") or address == "::1" for address in addresses)
