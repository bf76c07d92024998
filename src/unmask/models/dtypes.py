"""Dtypes by name, and the choice of "auto".

Knows devices, nothing of models.
"""

from __future__ import annotations

import torch

from unmask.errors import ConfigError

_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def parse_dtype(dtype: str | torch.dtype, device: str = "cpu") -> torch.dtype:
    """A torch dtype from its name.

    "auto" is bfloat16 where matrix products run in it natively (CUDA; a CPU with AMX or AVX512-BF16) and float32 elsewhere,
    where bfloat16 is emulated and several times slower.

    Raises:
        ConfigError: not a floating-point dtype this package computes in.
    """
    if dtype == "auto":
        capabilities = torch.cpu.get_capabilities()
        native = device.startswith("cuda") or capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        return torch.bfloat16 if native else torch.float32
    if isinstance(dtype, str):
        if dtype not in _NAMES:
            raise ConfigError(f"dtype '{dtype}' is unknown; use auto, {', '.join(_NAMES)}")
        return _NAMES[dtype]
    if dtype not in _NAMES.values():
        raise ConfigError(f"dtype {dtype} cannot hold a model's weights; use one of {', '.join(_NAMES)}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as Hugging Face spells it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
