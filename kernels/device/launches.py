"""The launches of Triton kernels, imported only where they are used: a server on a CPU needs no Triton."""

from __future__ import annotations

import functools
from types import ModuleType


@functools.cache
def pointwise_launches() -> ModuleType:
    """Those of norms, activations and rotations."""
    from fusionserve.kernels.device import pointwise_launch

    return pointwise_launch


@functools.cache
def few_bits_launches() -> ModuleType:
    """Those of products with weights of few bits."""
    from fusionserve.kernels.device import few_bits_launch

    return few_bits_launch
