"""Runs before any test imports torch or Triton."""

import os
from collections.abc import Generator, Iterator

import pytest

# Tiny models are fastest on one thread, and CI shares its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU Triton's interpreter runs the kernels of `kernels/device`. It must be told before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Ends a process whose GPU a test has spoiled: all that follow would fail. pytest-xdist goes on in another."""
    done = yield
    if torch.cuda.is_initialized() and _is_gpu_lost():
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("the GPU does nothing more in this process", returncode=1)
    return done


def _is_gpu_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


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
