"""Decoding options: each is declared here once, with type, default, range and help.

Owns the declarations, their validation, and how options left to the model are resolved. Command-line options, HTTP fields,
`/set` of chat, the page's controls and the tables of the documentation are generated from `SamplingParams.options()`. Imports
neither torch nor pydantic nor typer; knows no tensor and no text.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from unmask.engine.policies import POLICIES
from unmask.errors import RequestError

if TYPE_CHECKING:
    from unmask.models.arch.config import ModelConfig

Preset = Literal["speed", "quality"]
Mode = Literal["ar", "speculative", "diffusion"]
Panel = Literal["Sampling", "Diffusion", "Speculative", "Structured output", "Output"]
Surface = Literal["cli", "http", "diffusion", "set", "page"]
"""Where an option appears: a command-line option, a field of HTTP bodies (OpenAI's, or in their section `diffusion`), `/set` in
chat, a control of the page. The documentation lists all."""

PRESETS: Mapping[str, Mapping[str, float]] = {
    "speed": {"threshold": 0.5, "edit_threshold": 0.0, "max_post_steps": 16},
    "quality": {"threshold": 0.7, "edit_threshold": 0.5, "max_post_steps": 16},
}
"""LLaDA2.1's two modes. Source: LLaDA2.1 (2602.08676), decoding settings."""
MAX_NEW_TOKENS = 256
BLOCK_SIZE = 32
THRESHOLD = 0.95
SPECULATIVE_THRESHOLD = 0.0
"""Of draft tokens: which of them are verified is chosen by what they are worth."""
_CAUSAL: tuple[Mode, ...] = ("ar", "speculative")
_KINDS: Mapping[type, str] = {int: "a whole number", float: "a number", bool: "yes or no", str: "text"}
_UNIONS = (UnionType, Union)
_WORDS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


@dataclass(frozen=True)
class Option:
    """The declaration of a decoding option.

    Attributes:
        name: of the field of `SamplingParams`.
        kind: int, float, bool, str, tuple or Mapping.
        items: what a tuple holds, str or int.
        default: the field's; None leaves the option to the model or the caller.
        default_text: what None amounts to, in words.
        minimum: least value, itself excluded with `exclusive`.
        maximum: greatest value.
        http_maximum: greatest value that a server takes from its clients.
        choices: the values of a string option, if only some are valid.
        is_file: the command line takes the name of a file that holds the value.
    """

    help: str
    panel: Panel
    name: str = ""
    kind: type = str
    items: type = str
    default: Any = None
    default_text: str = ""
    minimum: float | None = None
    maximum: float | None = None
    exclusive: bool = False
    http_maximum: float | None = None
    choices: tuple[str, ...] = ()
    is_file: bool = False
    surfaces: frozenset[Surface] = frozenset()

    @property
    def shown_default(self) -> str:
        """The default as `[default: ...]` shows it."""
        return self.default_text or ("none" if self.default in (None, (), {}) else str(self.default))

    @property
    def range(self) -> str:
        """The valid numbers in words; empty for other kinds."""
        if self.kind not in (int, float):
            return ""
        if self.maximum is not None:
            return f"lie in {'(' if self.exclusive else '['}{self.minimum}, {self.maximum}]"
        finite = "finite and " if self.kind is float else ""
        return f"be {finite}at least {self.minimum:g}" if self.minimum is not None else f"be {_KINDS[self.kind]}"

    def check(self, value: Any) -> None:
        """Raises: RequestError: a value of another type or outside the range."""
        if self.choices and value not in self.choices:
            raise RequestError(f"{self.name} is {value!r}; use one of {', '.join(self.choices)}")
        if self.kind is tuple:
            wrong = [each for each in value if type(each) is not self.items or (isinstance(each, int) and each < 0)]
            if wrong:
                rule = "token ids: whole numbers of at least 0" if self.items is int else "texts"
                raise RequestError(f"{self.name} holds {wrong[0]!r}; it must hold {rule}")
        if self.kind not in (int, float):
            if self.kind in (bool, str) and not isinstance(value, self.kind):
                raise RequestError(f"{self.name} is {value!r}; it must be {_KINDS[self.kind]}")
            return
        if isinstance(value, bool) or not isinstance(value, Real if self.kind is float else Integral):
            raise RequestError(f"{self.name} is {value!r}; it must be {_KINDS[self.kind]}")
        low, high = self.minimum, self.maximum
        number: Any = value
        if self.kind is float and abs(number) > sys.float_info.max:
            number = math.inf  # also a whole number beyond all floats
        above = low is None or number > low or (number == low and not self.exclusive)
        if not (number < math.inf and above and (high is None or number <= high)):
            raise RequestError(f"{self.name} is {number}; it must {self.range}")

    def parse(self, text: str) -> Any:
        """The value that a text spells.

        Raises:
            RequestError: none of the option's type.
        """
        try:
            return _WORDS[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError) as error:
            raise RequestError(f"{self.name} is {text!r}; it must be {_KINDS[self.kind]}, or none") from error

    def to_json(self, default: Any) -> dict[str, Any]:
        """The declaration for clients of a server, with its default for the served model."""
        kinds = {int: "integer", float: "number", bool: "boolean"}
        return {
            "name": self.name,
            "type": kinds.get(self.kind, "string"),
            "default": default,
            "default_text": self.shown_default,
            "minimum": self.minimum,
            "maximum": self.maximum if self.http_maximum is None else self.http_maximum,
            "choices": list(self.choices),
            "help": self.help,
            "panel": self.panel,
            "section": "diffusion" if "diffusion" in self.surfaces else None,
        }


_EVERYWHERE: frozenset[Surface] = frozenset(("cli", "diffusion", "set", "page"))
_STANDARD: frozenset[Surface] = frozenset(("cli", "http", "set", "page"))


def _option(help: str, panel: Panel, default: Any = None, surfaces: frozenset[Surface] = _EVERYWHERE, **rest: Any) -> Any:
    """A field of `SamplingParams`; `rest` as of `Option`."""
    declared = Option(help, panel, default=default, surfaces=surfaces, **rest)
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"option": declared})
    return field(default=default, metadata={"option": declared})


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Decoding options. None leaves an option to the model, or to whoever resolves it; `resolve` fills everything in.

    Source: LLaDA2.0 section 5 defaults (block 32, threshold 0.95, 32 steps); editing: LLaDA2.1 (2602.08676); entropy bound:
    Ben-Hamu et al. (2505.24857).

    Raises:
        RequestError: a value outside its range, or options that exclude each other.
    """

    temperature: float | None = _option(
        "0 takes the most probable token; higher values sample, and are more varied.", "Sampling", surfaces=_STANDARD,
        default_text="0", minimum=0, http_maximum=2,
    )  # fmt: skip
    top_p: float | None = _option(
        "Sample from the most probable tokens that together have this probability.", "Sampling", surfaces=_STANDARD,
        default_text="all", minimum=0, exclusive=True, maximum=1,
    )  # fmt: skip
    top_k: int | None = _option(
        "Sample from this many of the most probable tokens.", "Sampling", surfaces=_EVERYWHERE | _STANDARD,
        default_text="all", minimum=1,
    )  # fmt: skip
    min_p: float = _option(
        "Sample only from tokens at least this probable relative to the most probable one.", "Sampling", 0.0, _STANDARD,
        minimum=0, maximum=1,
    )  # fmt: skip
    frequency_penalty: float = _option(
        "Subtracted from the logit of a token for each time that it stands in the completion.", "Sampling", 0.0, _STANDARD,
        minimum=-2, maximum=2,
    )  # fmt: skip
    presence_penalty: float = _option(
        "Subtracted from the logits of all tokens that stand in the completion.", "Sampling", 0.0, _STANDARD,
        minimum=-2, maximum=2,
    )  # fmt: skip
    repetition_penalty: float = _option(
        "Divides positive logits, and multiplies negative ones, of tokens in prompt or completion; 1 changes nothing.",
        "Sampling", 1.0, _STANDARD, minimum=0.01, maximum=100,
    )  # fmt: skip
    no_repeat_ngram_size: int = _option(
        "No sequence of this many tokens comes twice in the completion; 0 allows it.", "Sampling", 0, _STANDARD, minimum=0
    )
    seed: int | None = _option(
        "Random seed of sampling at a temperature above 0.", "Sampling", surfaces=_STANDARD,
        default_text="0; random on a server", minimum=-(2**63), maximum=2**63 - 1,
    )  # fmt: skip
    logit_bias: Mapping[int, float] = _option(
        "Added to the logits of these token ids, in nats; -inf bans a token.", "Sampling", {}, frozenset(("http",)),
        default_text="none",
    )  # fmt: skip
    block_size: int | None = _option(
        "Tokens denoised together.", "Diffusion", default_text="the model's", minimum=1, http_maximum=512
    )
    threshold: float | None = _option(
        "Accept every token whose probability is above this; lower is faster and less careful.", "Diffusion",
        default_text=f"{THRESHOLD}; none in mode speculative", minimum=0, maximum=1,
    )  # fmt: skip
    steps: int | None = _option("Most denoising steps per block.", "Diffusion", default_text="the block size", minimum=1)
    policy: str = _option(
        "How a step chooses the tokens to accept: by threshold, by entropy, or a fixed number.", "Diffusion", "threshold",
        choices=tuple(POLICIES),
    )  # fmt: skip
    entropy_bound: float = _option(
        "Sum of entropies that a step may accept, in nats; for policy entropy.", "Diffusion", 0.1, minimum=0
    )
    preset: Preset | None = _option(  # noqa: RUF009  (declares a field)
        "LLaDA2.1's settings with editing, for models trained to replace decided tokens.", "Diffusion", default_text="none"
    )
    edit_threshold: float | None = _option(
        "Replace a decided token when another one is more probable than this.", "Diffusion",
        default_text="no editing", minimum=0, maximum=1,
    )  # fmt: skip
    max_post_steps: int = _option("Most editing passes over a block without masks.", "Diffusion", 16, minimum=0)
    window: int = _option("Newest blocks that stay open to edits.", "Diffusion", 1, minimum=1, http_maximum=64)
    mode: Mode | None = _option(  # noqa: RUF009  (declares a field)
        "ar decodes token by token; speculative writes the same text from drafts that it verifies; diffusion accepts by "
        "confidence.", "Speculative",
        default_text="speculative, or diffusion for models that are not shifted and with a policy, editing or holes",
    )  # fmt: skip
    prompt_lookup: bool = _option(
        "Draft what followed the last tokens before, in this text or in the model's n-grams: the same text, sooner.",
        "Speculative", True,
    )  # fmt: skip
    json_schema: Mapping[str, Any] | str | bool | None = _option(
        "The answer is JSON that this schema accepts.", "Structured output", None, frozenset(("cli",)), is_file=True
    )
    regex: str | None = _option("The answer matches this regular expression.", "Structured output", None, frozenset(("cli",)))
    grammar: str | None = _option(
        "The answer is a sentence of this Lark grammar.", "Structured output", None, frozenset(("cli",)), is_file=True
    )
    max_new_tokens: int | None = _option(
        "Most tokens to generate.", "Output", surfaces=frozenset(("cli", "set", "page")),
        default_text=f"{MAX_NEW_TOKENS}; 512 in chat", minimum=0,
    )  # fmt: skip
    min_new_tokens: int = _option("No end of text and no stop string before this many tokens.", "Output", 0, minimum=0)
    ignore_eos: bool = _option(
        "Go on after the end of text; only stop, stop_token_ids and a grammar end the completion early.", "Output", False,
        frozenset(("cli", "http", "set")),
    )  # fmt: skip
    stop: tuple[str, ...] = _option(
        "End before this text, which may be that of a control token; may be given several times.", "Output", (),
        frozenset(("cli", "http")),
    )  # fmt: skip
    stop_token_ids: tuple[int, ...] = _option(
        "End at this token id, as at the end of text; may be given several times.", "Output", (), frozenset(("cli", "http"))
    )
    logprobs: int | None = _option(
        "Log-probabilities of the tokens, and of this many alternatives.", "Output", None, frozenset(("cli",)),
        minimum=0, maximum=20,
    )  # fmt: skip
    prompt_logprobs: int | None = _option(
        "Log-probabilities of the prompt's tokens, and of this many alternatives.", "Output", None, frozenset(),
        minimum=0, maximum=20,
    )  # fmt: skip

    @classmethod
    @cache
    def options(cls) -> dict[str, Option]:
        """The declarations by name, in the order of the fields."""
        hints, declared = get_type_hints(SamplingParams), {}
        for each in fields(SamplingParams):
            hint = hints[each.name]
            kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) in _UNIONS else [hint]
            option: Option = each.metadata["option"]
            choices = get_args(kinds[0]) if get_origin(kinds[0]) is Literal else option.choices
            kind = str if choices else get_origin(kinds[0]) or kinds[0]
            items = get_args(kinds[0])[0] if kind is tuple else str
            declared[each.name] = dataclasses.replace(option, name=each.name, kind=kind, items=items, choices=choices)
        return declared

    def __post_init__(self) -> None:
        stops: dict[str, Any] = {"stop": self.stop, "stop_token_ids": self.stop_token_ids}
        for name, values in stops.items():
            several = isinstance(values, Iterable) and not isinstance(values, str)
            object.__setattr__(self, name, tuple(values) if several else (values,))
        for name, option in SamplingParams.options().items():
            value = getattr(self, name)
            if value is not None or (option.default is not None and not option.default_text):
                option.check(value)
        _check_bias(self.logit_bias)
        if "" in self.stop:
            raise RequestError("stop holds an empty string; it would end every completion at once")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens is {self.min_new_tokens}; it must be at most max_new_tokens, {self.max_new_tokens}"
            )
        grammars = [name for name in ("json_schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(grammars) > 1:
            raise RequestError(f"{' and '.join(grammars)} are both given; a completion follows one of them")
        editing = self.edit_threshold is not None or self.preset is not None
        if self.window > 1 and not editing:
            raise RequestError(f"window is {self.window} without an edit_threshold; only edits reach back into older blocks")
        if self.mode in _CAUSAL and (editing or not POLICIES[self.policy].verifiable):
            raise RequestError(
                f"mode {self.mode} goes with neither a policy nor a preset nor an edit_threshold; leave them out"
            )
        if self.mode == "ar" and self.block_size not in (None, 1):
            raise RequestError(f"block_size is {self.block_size}; mode ar decodes token by token: leave one of them out")
        if grammars and editing:
            raise RequestError(f"{grammars[0]} does not go with an edit_threshold or a preset; leave one of them out")

    @property
    def editing(self) -> bool:
        """Whether decided tokens may still be replaced."""
        return self.edit_threshold is not None

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens of prompt and completion."""
        given = (self.frequency_penalty, self.presence_penalty, self.repetition_penalty, self.no_repeat_ngram_size)
        return given != (0, 0, 1, 0)

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by name."""
        values = {name: getattr(self, name) for name in SamplingParams.options()}
        return {name: value for name, value in values.items() if value != SamplingParams.options()[name].default}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values.

        Raises:
            RequestError: no such option, or a value out of range.
        """
        unknown = changes.keys() - SamplingParams.options().keys()
        if unknown:
            raise RequestError(f"unknown option {min(unknown)}; use one of {', '.join(sorted(SamplingParams.options()))}")
        return dataclasses.replace(self, **changes)

    def resolve(self, config: ModelConfig, *, has_holes: bool = False) -> ResolvedParams:
        """Options with nothing left open: the preset expanded, and the model's defaults filled in.

        Args:
            config: of the model.
            has_holes: the prompt has holes, which only mode diffusion fills.

        Raises:
            RequestError: options that do not go together.
        """
        given = {**({} if self.preset is None else PRESETS[self.preset]), **self.given(), "preset": None}
        if self.mode == "diffusion" and config.mask_id is None:
            raise RequestError(
                "mode diffusion takes a model with a mask token (converted); this one decodes in mode ar or speculative"
            )
        causal = config.shifted or config.mask_id is None
        verifiable = POLICIES[self.policy].verifiable and "edit_threshold" not in given and not has_holes
        mode = given.setdefault("mode", "speculative" if causal and verifiable else "diffusion")
        if mode == "ar":
            given |= {"block_size": 1, "prompt_lookup": False}
        block_size = given.setdefault("block_size", config.block_size or BLOCK_SIZE)
        given.setdefault("steps", block_size)
        if mode in _CAUSAL and config.shifted:
            given.setdefault("threshold", SPECULATIVE_THRESHOLD)
        return ResolvedParams(**given)


def _check_bias(bias: Any) -> None:
    for pair in bias.items() if isinstance(bias, Mapping) else [bias]:
        numbers = isinstance(pair, tuple) and isinstance(pair[0], Integral) and isinstance(pair[1], Real)
        if not numbers or not pair[1] <= sys.float_info.max:
            raise RequestError(f"logit_bias holds {pair!r}; it must map token ids to numbers, -inf among them")


@dataclass(frozen=True, kw_only=True)
class ResolvedParams(SamplingParams):
    """Decoding options as the engine needs them: none is left to the model."""

    temperature: float = 0.0
    seed: int = 0
    block_size: int = BLOCK_SIZE
    threshold: float = THRESHOLD
    steps: int = 32
    mode: Mode = "diffusion"
    max_new_tokens: int = MAX_NEW_TOKENS
