"""What an exception of torch or Triton says of the device."""

from __future__ import annotations

import pytest
import torch

from fusionserve.kernels.torch_errors import is_device_lost, is_out_of_memory


def accelerator_error(code: int, text: str = "CUDA error: whatever") -> torch.AcceleratorError:
    """As torch raises it."""
    error = torch.AcceleratorError(text)
    error.error_code = code
    return error


@pytest.mark.parametrize("code", [46, 214, 700, 702, 710, 716, 719, 999])
def test_device_is_lost_after_an_error_that_every_later_call_gives_again(code: int) -> None:
    assert is_device_lost(accelerator_error(code))
    assert not is_out_of_memory(accelerator_error(code))


@pytest.mark.parametrize("code", [1, 2, 9, 98, 209, 701, 900, 901, 905, 908])
def test_device_outlives_a_call_that_it_refuses(code: int) -> None:
    assert not is_device_lost(accelerator_error(code))


def test_error_without_a_number_is_taken_for_the_worst() -> None:
    assert is_device_lost(torch.AcceleratorError("the device is gone"))


@pytest.mark.parametrize(
    "error",
    [
        accelerator_error(
            2, "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in the manual."
        ),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_out_of_memory_is_no_lost_device(error: Exception) -> None:
    assert is_out_of_memory(error) and not is_device_lost(error)


def test_triton_tells_of_a_lost_device_in_words() -> None:
    assert is_device_lost(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    assert not is_device_lost(RuntimeError("Triton Error [CUDA]: invalid argument"))
    assert not is_device_lost(RuntimeError("an illegal memory access was encountered"))
