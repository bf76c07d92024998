"""PEFT's `adapter_config.json`, read and written: which modules an adapter changes, and with what rank and scale.

Owns what a key means and which are refused. Knows no tensor, no file and no layer; modules go by their names on disk.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from unmask.errors import ConfigError

_OFF: tuple[Any, ...] = (None, False, "none", {}, [])
# Keys without effect on what the adapter computes, and keys that `read_settings` and its caller take into account.
_IGNORED = {
    "base_model_name_or_path", "task_type", "inference_mode", "auto_mapping", "peft_version", "lora_dropout", "megatron_core",
    "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
_READ = {"r", "lora_alpha", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora"}
# Of any other key, every value but "off" changes the computation; these have more values that do not.
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "revision": (None, "main"),
    # The other initialisations change the base too, so that the adapter does not fit the base on disk.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


class ModuleLora(NamedTuple):
    """Rank and alpha of one module's update, `alpha / rank * B A`."""

    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def read_settings(settings: Mapping[str, Any], modules: Iterable[str]) -> dict[str, ModuleLora]:
    """The modules that an adapter changes.

    Args:
        settings: parsed `adapter_config.json`.
        modules: names on disk of all that can be adapted.

    Returns:
        Rank and alpha of each of `modules` that the adapter targets.

    Raises:
        ConfigError: a key that changes the computation in a way that is not supported, a value of the wrong type, or targets
            that no module matches.
    """
    _reject_unsupported(settings)
    _check_types(settings)
    rank, alpha = settings.get("r", 8), settings.get("lora_alpha", 8)
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    loras = {}
    for module in modules:
        if not _is_target(module, settings.get("target_modules")):
            continue
        own_rank, own_alpha = _by_pattern(ranks, module, rank), _by_pattern(alphas, module, alpha)
        if isinstance(own_rank, bool) or not isinstance(own_rank, int) or own_rank < 1:
            raise ConfigError(f"the rank of {module} is {own_rank!r}; it must be a positive integer")
        if isinstance(own_alpha, bool) or not isinstance(own_alpha, int | float):
            raise ConfigError(f"lora_alpha of {module} is {own_alpha!r}; it must be a number")
        # Rank-stabilised LoRA scales by alpha / sqrt(rank).
        loras[module] = ModuleLora(own_rank, own_alpha * math.sqrt(own_rank) if settings.get("use_rslora") else own_alpha)
    if not loras:
        raise ConfigError(f"target_modules {settings.get('target_modules')!r} match no layer of this model that can be adapted")
    return loras


def write_settings(
    loras: Mapping[str, ModuleLora], modules: Iterable[str], *, base: str, modules_to_save: list[str] | None
) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter; `read_settings` gives `loras` back.

    Args:
        loras: what the adapter changes, at least one module.
        modules: names on disk of all modules of the model, those that cannot be adapted too.
        base: goes to `base_model_name_or_path`.
        modules_to_save: last names of modules that are stored whole.
    """
    everywhere, adapted = Counter(map(_last_name, modules)), Counter(map(_last_name, loras))
    common, _ = Counter(loras.values()).most_common(1)[0]
    # "gate_proj" alone would reach the routed experts too: a short name must mean the adapted modules and no others.
    targets = {_last_name(name) if everywhere[_last_name(name)] == adapted[_last_name(name)] else name for name in loras}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": common.rank,
        "lora_alpha": common.alpha,
        "rank_pattern": {name: lora.rank for name, lora in loras.items() if lora.rank != common.rank},
        "alpha_pattern": {name: lora.alpha for name, lora in loras.items() if lora.alpha != common.alpha},
        "target_modules": sorted(targets),
        "modules_to_save": modules_to_save,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _reject_unsupported(settings: Mapping[str, Any]) -> None:
    for key, value in {"peft_type": None, **settings}.items():
        if key not in _READ | _IGNORED and value not in _ALLOWED.get(key, _OFF):
            raise ConfigError(
                f"{key} is {value!r}, which is not supported; fold the adapter with peft (merge_and_unload) and use the result"
            )


def _check_types(settings: Mapping[str, Any]) -> None:
    patterns = {key: settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, value in patterns.items():
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}; it must be an object of names or regular expressions")
    targets, saved = settings.get("target_modules"), settings.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ConfigError(f"modules_to_save is {saved!r}; it must be a list of names")
    expressions = [*(targets,) * isinstance(targets, str), *(pattern for value in patterns.values() for pattern in value)]
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise ConfigError(f"{expression!r} is no regular expression ({error}); correct it") from error


def _is_target(module: str, targets: Any) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if not isinstance(targets, list):
        raise ConfigError(f"target_modules is {targets!r}; it must be a list of names or a regular expression")
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of the module's name, as PEFT has it."""
    fitting = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(fitting, default)


def _last_name(module: str) -> str:
    return module.rpartition(".")[2]
