"""ctypes interface of the kernels, and their workspace memory.

Owns the mirror of the structures in the C++ files. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import Structure, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch


def _fields(kind: type, *names: str) -> tuple[tuple[str, Any], ...]:
    """Fields of one type, as C declares them."""
    return tuple((name, kind) for name in names)


class Linear(Structure):
    """A packed matrix; `Linear` of linear.h."""

    _fields_ = (*_fields(c_void_p, "weight", "scale", "bias"), *_fields(c_int64, "depth", "outputs", "bits", "by_group"))


class GatedLinear(Structure):
    """`GatedLinear` of model.h: a matrix and its gated LoRA, if it has one."""

    _fields_ = _fields(Linear, "base", "input", "output")


class Experts(Structure):
    """`Experts` of model.h."""

    _fields_ = (("router", Linear), ("bias", c_void_p), *_fields(Linear, "gate_up", "down"))


class Layer(Structure):
    """`Layer` of model.h."""

    _fields_ = (
        *_fields(GatedLinear, "qkv", "out", "gate_up", "down"),
        *_fields(c_int64, "ffn", "mixed"),
        *_fields(c_void_p, "attention_norm", "mlp_norm", "query_norm", "key_norm", "experts"),
    )


class Routing(Structure):
    """`Routing` of model.h."""

    _fields_ = (
        *_fields(c_int64, "experts", "active", "groups", "active_groups", "normalize", "capacity", "size", "mixed"),
        ("scale", c_float),
    )


class Model(Structure):
    """`Model` of model.h."""

    _fields_ = (
        *_fields(c_void_p, "layers", "final_norm"),
        *_fields(c_int64, "num_layers", "hidden", "heads", "kv_heads", "head_dim", "rotary_dim", "rank"),
        ("eps", c_float),
        ("routing", Routing),
        ("lora_rank", c_int64),
    )


class LoraUpdate(Structure):
    """`LoraUpdate` of model.h."""

    _fields_ = _fields(Linear, "input", "output")


class LoraLayer(Structure):
    """`LoraLayer` of model.h: an update of each of its matrices."""

    _fields_ = _fields(LoraUpdate, "qkv", "out", "gate_up", "down")


class LoraRun(Structure):
    """`LoraRun` of model.h."""

    _fields_ = (*_fields(c_int64, "start", "stop"), ("layers", c_void_p))


class ForwardBatch(Structure):
    """`ForwardBatch` of model.h, its KV cache included."""

    _fields_ = (
        *_fields(c_int64, "rows", "num_segments"),
        *_fields(c_void_p, "segments", "cos", "sin", "hidden", "kv_cache"),
        ("num_slots", c_int64),
        ("touched", c_void_p),
        ("num_lora_runs", c_int64),
        ("lora_runs", c_void_p),
    )


class Kernels:
    """The functions of a compiled library, with their argument types; `variant` names its instruction set."""

    def __init__(self, library: ctypes.CDLL, variant: str) -> None:
        self.variant = variant
        self.forward_bytes, self.forward = library.unmask_forward_bytes, library.unmask_forward
        self.linear_bytes, self.linear, self.greedy = (
            library.unmask_linear_bytes, library.unmask_linear, library.unmask_greedy,
        )  # fmt: skip
        self.route_bytes, self.route = library.unmask_route_bytes, library.unmask_route
        for sizes in (self.forward_bytes, self.linear_bytes, self.route_bytes):
            sizes.argtypes, sizes.restype = (c_void_p, c_int64, c_int), c_int64
        rows = (c_void_p, c_void_p, c_int64, c_int64)
        self.forward.argtypes, self.forward.restype = (c_void_p, c_void_p, c_void_p, c_int), None
        self.route.argtypes, self.route.restype = (*[c_void_p] * 7, c_int), None
        self.linear.argtypes, self.linear.restype = (*rows, c_void_p, c_void_p, c_int), None
        self.greedy.argtypes, self.greedy.restype = (*rows, c_int64, c_void_p, c_void_p, c_void_p, c_int), None


class Workspace(threading.local):
    """Scratch memory shared by a thread's consecutive calls; it grows to the largest one's need."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def address(self, size: int) -> int:
        """Address of at least `size` bytes, aligned to a cache line."""
        if self._buffer.nbytes < size + 64:
            self._buffer = torch.empty(size + 64, dtype=torch.uint8)
        return -(-self._buffer.data_ptr() // 64) * 64
