"""The choice of the weights that decode: what `quantize` means for a model on a device.

Owns the names, the rule of "auto", which weights the CPU kernels compute, and what happens without kernels. Imports nothing
slow: the command line declares its option from here.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from unmask.errors import BackendError, ConfigError, UnmaskWarning

if TYPE_CHECKING:
    import torch

Quantize = Literal["auto", "none", "int8", "int4"]
"""As a user says it; "none": the weights as they are."""
BITS = {"int8": 8, "int4": 4}
PACKED_BITS = {"none": 32, **BITS}
"""As `models.native.packing` counts them, where the kernels compute."""


def for_dtype(quantize: str | None, dtype: object) -> str | None:
    """`quantize` where weights are loaded in this dtype: "auto" is "none" unless the dtype is "auto", too.

    Quantised weights would decode in another number format than the one that is asked for.
    """
    return "none" if quantize == "auto" and dtype != "auto" else quantize


def decoding_weights(quantize: str | None, device: torch.device) -> str:
    """The weights that decode: "int8", "int4" or "none".

    "auto" is int8 on a CPU, else none. Without kernels everything is none, and a note says so.

    Args:
        quantize: one of `Quantize`; None is "none".
        device: of the model's weights.

    Raises:
        ConfigError: another value; but for auto, weights that are not on a CPU; or a variant of the kernels that this processor
            does not run.
    """
    if quantize is None or quantize == "none":
        return "none"
    weights = "int8" if quantize == "auto" else quantize
    if weights not in BITS:
        raise ConfigError(f"quantize is {quantize!r}; use auto, none, {' or '.join(BITS)}")
    from unmask.models.native import library
    from unmask.models.native.packing import check_packable

    try:
        check_packable(device, BITS[weights])
    except ConfigError:
        if quantize == "auto":
            return "none"
        raise
    try:
        library.load_kernels()
    except BackendError as error:
        warnings.warn(f"{error}; computing with PyTorch and the weights as they are", UnmaskWarning, stacklevel=3)
        return "none"
    return weights


def kernels_compute(weights: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CPU kernels compute with these weights, rather than PyTorch.

    Args:
        weights: as of `decoding_weights`; the kernels have been found to compute those that are quantised.
        device: of the model's weights.
        dtype: of its weights.

    Raises:
        ConfigError: a variant of the kernels that this processor does not run.
    """
    if weights != "none":
        return True
    from unmask.models.dtypes import dtype_name
    from unmask.models.native.library import kernel_variant

    is_packable = device.type == "cpu" and dtype_name(dtype) in ("float32", "bfloat16")
    # The portable variant has no fused multiply-add: its sums of floats are the others' to the bit, and slow.
    return is_packable and kernel_variant() not in (None, "portable")
