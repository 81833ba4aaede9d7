"""Runs before any test imports torch or Triton."""

import os
from collections.abc import Iterator

import pytest

# Tiny models are fastest on one thread, and CI shares its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU Triton's interpreter runs the kernels of `kernels/device`. It must be told before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def helpers() -> Iterator[None]:
    """Has two threads help with the native kernels' work."""
    from fusionserve.kernels.native_library import native_library

    library = native_library()
    if library is not None:
        library.set_num_threads(3)
    yield
    if library is not None:
        library.set_num_threads(torch.get_num_threads())
