"""`unmask serve`: the OpenAI-compatible server and its chat page.

Owns the start messages, and how `ServerConfig` becomes command-line options. The server itself is the package `unmask.serve`.
"""

from __future__ import annotations

import functools
import inspect
import socket
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_type_hints

import typer

from unmask.cli import decoding as options
from unmask.cli.startup import INTERRUPTED
from unmask.errors import ConfigError
from unmask.serve.config import ServerConfig


def _server_options() -> list[inspect.Parameter]:
    """One command-line option per field of `ServerConfig`; of a tuple's, one that may be repeated."""
    parameters = []
    for name, kind in get_type_hints(ServerConfig).items():
        setting = ServerConfig.__dataclass_fields__[name]
        is_tuple = setting.default == ()
        flag = f"--{name.removesuffix('s') if is_tuple else name}".replace("_", "-")
        default_text = setting.metadata["default_text"]
        option = typer.Option(
            flag,
            help=setting.metadata["help"] + (f" [default: {default_text}]" if default_text else ""),
            envvar="UNMASK_API_KEY" if name == "api_keys" else None,
            rich_help_panel="Server",
        )
        annotation = Annotated[list[str] | None if is_tuple else kind, option]  # type: ignore[valid-type]
        default = None if is_tuple else setting.default
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return parameters


def _build_config(arguments: Mapping[str, Any]) -> ServerConfig:
    given = {name: value for name, value in arguments.items() if value is not None}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return ServerConfig(**values)


@functools.partial(options.expand_parameter, name="config", parameters=_server_options(), build=_build_config)
def serve(
    model: options.Model = options.DIFFUSION_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: all interfaces.", rich_help_panel="Server")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.", rich_help_panel="Server")] = 8000,
    *,
    config: ServerConfig,
    quantize: options.Quantize = "auto",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    expert_capacity: options.ExpertCapacity = None,
    log_format: Annotated[
        Literal["json", "text"], typer.Option(help="One JSON object per line, or text.", rich_help_panel="Server")
    ] = "text",
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
    from unmask.serve.kv_events import check_installed
    from unmask.serve.logs import configure_logging
    from unmask.serve.server import listen, run, url_of

    if config.kv_events is not None:
        # Before the model is loaded.
        check_installed()
    listener = listen(host, port)
    language_model = options.load(model, dtype, device, quantize, expert_capacity)
    configure_logging(log_format)
    url = url_of(listener)
    typer.echo(f"{config.names[0] if config.names else model} is served at {url}", err=True)
    typer.echo(f"chat in a browser: {url}/    API: {url}/v1    metrics: {url}/metrics    Ctrl-C stops", err=True)
    if not config.keys and not is_loopback(host):
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
