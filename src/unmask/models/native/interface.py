"""ctypes interface of the kernels, and their workspace memory.

Owns the mirror of the structures in the C++ files. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import Structure, c_float, c_int, c_int64, c_void_p

import torch


class Linear(Structure):
    """A quantised matrix; `Linear` of gemm.h."""

    _fields_ = (
        ("weight", c_void_p),
        ("group_scale", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("depth", c_int64),
        ("outputs", c_int64),
        ("bits", c_int64),
    )


class GatedLinear(Structure):
    """`GatedLinear` of kernels.cpp: a matrix and its gated LoRA, if it has one."""

    _fields_ = (("base", Linear), ("input", Linear), ("output", Linear))


class Layer(Structure):
    """`Layer` of kernels.cpp."""

    _fields_ = (
        ("qkv", GatedLinear),
        ("out", GatedLinear),
        ("gate_up", GatedLinear),
        ("down", GatedLinear),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
    )


class Model(Structure):
    """`Model` of kernels.cpp."""

    _fields_ = (
        ("layers", c_void_p),
        ("final_norm", c_void_p),
        ("num_layers", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary_dim", c_int64),
        ("ffn", c_int64),
        ("mixed", c_int64),
        ("rank", c_int64),
        ("eps", c_float),
    )


class ForwardBatch(Structure):
    """`ForwardBatch` of kernels.cpp, its KV cache included."""

    _fields_ = (
        ("rows", c_int64),
        ("num_segments", c_int64),
        ("segments", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("hidden", c_void_p),
        ("kv_cache", c_void_p),
        ("num_slots", c_int64),
    )


class Kernels:
    """The functions of the compiled library, with their argument types."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.forward_bytes, self.forward = library.unmask_forward_bytes, library.unmask_forward
        self.linear_bytes, self.linear, self.greedy = (
            library.unmask_linear_bytes, library.unmask_linear, library.unmask_greedy,
        )  # fmt: skip
        for sizes in (self.forward_bytes, self.linear_bytes):
            sizes.argtypes, sizes.restype = (c_void_p, c_int64, c_int), c_int64
        rows = (c_void_p, c_void_p, c_int64, c_int64)
        self.forward.argtypes, self.forward.restype = (c_void_p, c_void_p, c_void_p, c_int), None
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
