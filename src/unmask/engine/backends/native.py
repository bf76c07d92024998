"""Quantised weights on the CPU: the compiled kernels when they are there, plain PyTorch until then.

Owns the choice between the two. The kernels are `models.native`'s.
"""

from __future__ import annotations

import warnings

import torch

from unmask.engine.runner import Backend, TorchBackend
from unmask.errors import BackendError, ConfigError, UnmaskWarning
from unmask.models.arch.transformer import Transformer
from unmask.models.native.build import Build, start_build
from unmask.models.native.packed import Kernels, PackedTransformer, check_packable

BITS = {"int8": 8, "int4": 4}


class NativeBackend(PackedTransformer):
    """The kernels as a `Backend`: float32 keys and values, on the CPU."""

    device = torch.device("cpu")
    dtype = torch.float32


class QuantizedModel:
    """A model whose weights are quantised as soon as the kernels are compiled.

    Compiling takes seconds, once a machine, in a process of its own. Until it is done, requests are served by the weights as
    they are, so that the first answer never waits for a compiler. A request is computed in one way from beginning to end:
    `current` is asked when an engine is made.

    Args:
        model: a dense model on the CPU.
        weights: "int8" or "int4".

    Raises:
        ConfigError: another kind of weights, or a model that the kernels do not run.
    """

    def __init__(self, model: Transformer, weights: str) -> None:
        if weights not in BITS:
            raise ConfigError(f"weights cannot be quantised to {weights!r}; use one of {', '.join(BITS)}, or auto")
        check_packable(model, BITS[weights])
        self._plain, self._bits, self._weights = TorchBackend(model), BITS[weights], weights
        self._packed: NativeBackend | None = None
        self._told = False
        self._build: Build | None = None
        try:
            self._build = start_build()
        except BackendError as error:
            self._tell(f"{error}; computing with the weights as they are")

    @classmethod
    def choose(cls, model: Transformer, weights: str | None) -> QuantizedModel | None:
        """What a user asked for: int8, int4, "auto" (int8 where the kernels run the model) or None, the weights as they are.

        Raises:
            ConfigError: another kind of weights, or, but for auto, a model that the kernels do not run.
        """
        if weights == "auto":
            try:
                return cls(model, "int8")
            except ConfigError:
                return None
        return None if weights is None else cls(model, weights)

    def current(self, *, wait: bool = False) -> Backend:
        """The fastest way to compute that is ready; `wait` lets the compiler finish first."""
        if self._packed is not None:
            return self._packed
        if self._build is None:
            return self._plain
        if self._build.running and not wait:
            self._tell(
                f"the CPU kernels for {self._weights} weights are being compiled (once, some seconds); until then the weights "
                "are used as they are"
            )
            return self._plain
        try:
            kernels = Kernels(self._build.load())
        except BackendError as error:
            self._build = None
            self._tell(f"{error}; computing with the weights as they are")
            return self._plain
        with torch.no_grad():
            self._packed = NativeBackend(self._plain.model, self._bits, kernels)
        return self._packed

    def _tell(self, message: str) -> None:
        if not self._told:
            warnings.warn(message, UnmaskWarning, stacklevel=3)
        self._told = True
