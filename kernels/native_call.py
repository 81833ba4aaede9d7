"""How the native kernels are called: by type of number, with pointers and structures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusionserve.kernels.native_library import native_library

NativeFunction = Callable[..., object]

_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def native_function(name: str, like: Tensor) -> NativeFunction | None:
    """The kernel `name` for tensors of the type and device of `like`, or None: torch's operations must do."""
    library, suffix = native_library(), _SUFFIXES.get(like.dtype)
    if library is None or suffix is None or like.device.type != "cpu":
        return None
    function: NativeFunction = getattr(library, f"{name}_{suffix}")
    return function
