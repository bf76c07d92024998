"""The implementations of this repository in the JSON format of the conformance suite.

An implementation is a function of a model folder and a request; `README.md` has the format.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.sequential import SequentialBackend
from unmask.engine.backends.base import Backend
from unmask.engine.backends.native import NativeBackend, packed_backend
from unmask.engine.backends.torch import TorchBackend
from unmask.engine.engine import Engine
from unmask.engine.reference import generate_reference
from unmask.engine.request import Completion, DecodingStep, Request
from unmask.engine.sampling_params import ResolvedParams
from unmask.models.arch.transformer import Transformer
from unmask.models.native.library import kernel_variant
from unmask.models.weights.loading import load_model

Implementation = Callable[[Path, Mapping[str, Any]], Mapping[str, Any]]

_OPTIONS = (
    "block_size", "threshold", "steps", "temperature", "top_k", "top_p", "seed", "policy", "entropy_bound",
    "edit_threshold", "max_post_steps", "window",
)  # fmt: skip
_LIMITS = ("max_new_tokens", "min_new_tokens")


def as_json(request: Request, mask_id: int) -> dict[str, Any]:
    """A request in the suite's format; every option is spelled out."""
    return {
        "ids": list(request.ids),
        "mask_id": mask_id,
        "eos_ids": sorted(request.eos_ids),
        "logit_bias": {str(t): None if bias == float("-inf") else bias for t, bias in request.params.logit_bias.items()},
        **{name: getattr(request.params, name) for name in _LIMITS},
        "sample": request.sample,
        **{name: getattr(request.params, name) for name in _OPTIONS},
    }


def from_json(values: Mapping[str, Any]) -> Request:
    """The other way round, without the mask token."""
    bias = {int(token): float("-inf") if by is None else by for token, by in values["logit_bias"].items()}
    params = ResolvedParams(**{name: values[name] for name in (*_LIMITS, *_OPTIONS)}, logit_bias=bias)
    return Request(tuple(values["ids"]), params, frozenset(values["eos_ids"]), sample=values["sample"])


def trajectory(completion: Completion, steps: list[DecodingStep]) -> dict[str, Any]:
    """A result in the suite's format."""
    return {
        "ids": list(completion.ids),
        "finish_reason": completion.finish_reason,
        "steps": [
            {
                "start": step.start,
                "tokens": list(step.tokens),
                "accepted": [step.start + i for i, yes in enumerate(step.accepted) if yes],
                "edited": [step.start + i for i, yes in enumerate(step.edited) if yes],
                "confidence": [
                    None if guess is None else round(confidence, 6)
                    for guess, confidence in zip(step.guess, step.confidence, strict=True)
                ],
            }
            for step in steps
        ],
    }


def check_clean(engine: Engine) -> None:
    """No cache block is used, and the books are in order."""
    engine.pool.check()
    assert engine.pool.num_used == 0, "a cache block leaked"
    assert not engine.has_work


_load = cache(load_model)


def reference(dtype: torch.dtype = torch.float64) -> Implementation:
    """The oracle."""

    def generate(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
        steps: list[DecodingStep] = []
        model = _load(folder, dtype=dtype)
        return trajectory(generate_reference(model, from_json(values), values["mask_id"], steps.append), steps)

    return generate


def engine(
    dtype: torch.dtype = torch.float64,
    *,
    tight: bool = False,
    backend: Callable[[Transformer], Backend] = TorchBackend,
    **options: Any,
) -> Implementation:
    """This repository's engine; `tight`: with the least tokens a forward and cache blocks that serve the request."""

    def generate(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
        request, limits = from_json(values), dict(options)
        if tight:
            limits |= {
                "max_num_batched_tokens": request.params.window * request.params.block_size,
                "num_tokens": request.canvas_length,
            }
        made = Engine(backend(_load(folder, dtype=dtype)), mask_id=values["mask_id"], **limits)
        updates = list(made.stream(request, watch=True))
        check_clean(made)
        completion = updates[-1].completion
        assert completion is not None
        return trajectory(completion, [update.step for update in updates if update.step is not None])

    return generate


def native(folder: Path, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The engine over float32 weights in the CPU kernels."""
    if kernel_variant() is None:
        pytest.skip("the CPU kernels are not built")
    return engine(torch.float32, backend=_packed)(folder, values)


def _packed(model: Transformer) -> NativeBackend:
    return packed_backend(model, "none")


def implementations() -> dict[str, Implementation]:
    """By name; `UNMASK_CONFORMANCE=package.module:function` adds one from elsewhere."""
    known = {
        "reference": reference(),
        "engine": engine(),
        "engine-sequential": engine(backend=SequentialBackend),
        "engine-tight": engine(tight=True, cache_block_size=3),
        "engine-float32": engine(torch.float32, cache_block_size=16),
        "engine-native-float32": native,
    }
    outside = os.environ.get("UNMASK_CONFORMANCE")
    if outside:
        module, _, name = outside.partition(":")
        known[outside] = getattr(importlib.import_module(module), name)
    return known
