"""How the native kernels are called: by type of number, with pointers and structures.

A kernel trusts what it is given, so its caller asserts types, shapes and strides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from fusionserve.kernels.native_library import native_library

NativeFunction = Callable[..., object]


class Tokens(ctypes.Structure):
    """The input of a kernel, as `native/tokens.h` has it."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("d_in", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> Tokens:
        """x [num_tokens, d_in], whose rows must be contiguous; it must outlive the call."""
        assert x.dim() == 2 and x.stride(1) == 1, "the numbers of a token must lie side by side"
        return cls(x.data_ptr(), x.shape[0], x.shape[1], x.stride(0))


SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def native_function(name: str, like: Tensor) -> NativeFunction | None:
    """The kernel `name` for tensors of the type and device of `like`, or None: torch's operations must do."""
    library, suffix = native_library(), SUFFIXES.get(like.dtype)
    if library is None or suffix is None or like.device.type != "cpu":
        return None
    function: NativeFunction = getattr(library, f"{name}_{suffix}")
    return function
