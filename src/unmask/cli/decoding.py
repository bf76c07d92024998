"""Options that the decoding commands share: those of the model, and decoding options generated from `SamplingParams`.

Owns how a declared option looks on the command line. Knows no command.
"""

from __future__ import annotations

import functools
import inspect
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.console import pick_device, program
from unmask.engine import quantization
from unmask.engine.sampling_params import Option, Panel, SamplingParams, Surface
from unmask.errors import RequestError, UnmaskNote

if TYPE_CHECKING:
    from unmask.engine.llm import LanguageModel

DIFFUSION_MODEL = "smollm2-135m-diffusion"
CONVERTED_MODEL = "smollm2-135m-converted"
"""Converted in full: denoises in any order, and fills holes."""

_FILE: Mapping[str, str] = {"json_schema": "FILE|JSON"}

Model = Annotated[
    str, typer.Option("--model", "-m", help="Folder, Hugging Face id or embedded model.", rich_help_panel="Model")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.", rich_help_panel="Model")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel="Model")]
Quantize = Annotated[
    quantization.Quantize,
    typer.Option(
        help="Weights that decode; auto: int8 by the CPU kernels where they run the model and no --dtype is given, else none "
        "(as they are).",
        rich_help_panel="Model",
    ),
]
ExpertCapacity = Annotated[
    int | None,
    typer.Option(
        help="Experts that the tokens of a block may use in a layer (block routing): fewer are read, at some cost in quality. "
        "[default: as the model was trained]",
        rich_help_panel="Model",
    ),
]
Lora = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="LoRA adapter of the model. [default: none]", rich_help_panel="Model"),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object: the text and what it cost.", rich_help_panel="Output")
]


def load(
    model: str, dtype: str, device: str, quantize: str, expert_capacity: int | None = None, lora: Path | None = None
) -> LanguageModel:
    """The model that `--model`, `--dtype`, `--device`, `--quantize`, `--expert-capacity` and `--lora` name."""
    import unmask
    from unmask.cli.packing_line import PackingLine
    from unmask.engine.adapted import adapted_model
    from unmask.models.weights.hub import EMBEDDED
    from unmask.models.weights.manifest import is_quantized

    packed = is_quantized(Path(model).expanduser())
    if device == "auto" and packed:
        device = "cpu"  # where alone such weights are read
    language_model = unmask.load(
        model, dtype=dtype, device=pick_device(device), quantize=quantize, on_packing=PackingLine(),
        expert_capacity=expert_capacity,
    )  # fmt: skip
    if quantize == "int4" and not packed and model != EMBEDDED and not model.endswith(".gguf"):
        remedy = shlex.join([program(), "quantize", model, "--out", "DIR"])
        warnings.warn(
            f"int4 is rounded to nearest here; {remedy} rounds by calibration, and loses less", UnmaskNote, stacklevel=1
        )
    return language_model if lora is None else adapted_model(language_model, lora, name=lora.resolve().name)


def with_sampling_options(
    *panels: Panel, surface: Surface = "cli", defaults: Mapping[str, Any] | None = None, texts: Mapping[str, str] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: its parameter `params` becomes one command-line option for each declared decoding option.

    Args:
        panels: groups of options that the command takes; none: all.
        surface: take only the options that are declared for it.
        defaults: values of options that are not given, where they differ from the declared ones.
        texts: what `[default: ...]` shows, where it differs.
    """
    values = defaults or {}
    shown = {**(texts or {}), **{name: str(value) for name, value in values.items()}}
    chosen = [o for o in SamplingParams.options().values() if surface in o.surfaces and (not panels or o.panel in panels)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def build(arguments: Mapping[str, Any]) -> SamplingParams:
            given = {option.name: _value(option, arguments[option.name]) for option in chosen}
            return SamplingParams(**{**values, **{name: value for name, value in given.items() if value is not None}})

        return expand_parameter(command, "params", [_parameter(option, shown.get(option.name)) for option in chosen], build)

    return decorate


def expand_parameter(
    command: Callable[..., None],
    name: str,
    parameters: Sequence[inspect.Parameter],
    build: Callable[[Mapping[str, Any]], Any],
) -> Callable[..., None]:
    """A command with its parameter `name` replaced by command-line options.

    Args:
        command: the command.
        name: of the parameter.
        parameters: keyword parameters that declare the options.
        build: makes the parameter's value from theirs.
    """
    own = [each.replace(kind=each.KEYWORD_ONLY) for each in inspect.signature(command, eval_str=True).parameters.values()]
    index = [each.name for each in own].index(name)
    expanded = [*own[:index], *parameters, *own[index + 1 :]]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        command(**{name: build({each.name: arguments.pop(each.name) for each in parameters})}, **arguments)

    del run.__wrapped__  # typer would read its signature
    run.__signature__ = inspect.Signature(expanded)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in expanded}
    return run


def _parameter(option: Option, default_text: str | None) -> inspect.Parameter:
    kinds: Mapping[type, Any] = {int: int, float: float, bool: bool, tuple: list[int] if option.items is int else list[str]}
    kind = kinds.get(option.kind, str)
    flag = f"--{option.name.replace('_', '-')}"
    shown = default_text or option.shown_default
    declared = typer.Option(
        f"{flag}/--no-{flag[2:]}" if option.kind is bool else flag,
        help=option.help + (f" [default: {shown}]" if shown != "none" else ""),
        metavar=_FILE.get(option.name, "FILE") if option.is_file else "|".join(option.choices) or None,
        rich_help_panel=option.panel,
    )
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def _value(option: Option, argument: Any) -> Any:
    """The value of an option: the text of a file where it names one, or a JSON object itself.

    Raises:
        RequestError: the file cannot be read.
    """
    if option.kind is tuple:
        return tuple(argument) if argument else None
    if argument is None or not option.is_file or (option.name == "json_schema" and argument.lstrip().startswith("{")):
        return argument
    try:
        return Path(argument).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise RequestError(f"{option.name} {argument} cannot be read ({error}); name a text file") from error
