"""Memory in huge pages: zeros of its own for every tensor, asked for as such, and given back."""

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch

from fusionserve.kernels import huge_pages
from fusionserve.kernels.huge_pages import HugePages, populate, touch_zeros

MEBIBYTE = 1 << 20
LIKE = torch.empty(0, dtype=torch.bfloat16)


def flags_at(address: int) -> list[str]:
    """The system's flags of the mapping that has this address (proc(5), smaps)."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_tensors_are_zeros_of_their_own() -> None:
    pages = HugePages()
    tensors = [pages.zeros(LIKE, 3, 5, num) for num in (1, 7, 64)] + [pages.zeros(torch.empty(0), 9)]
    for number, tensor in enumerate(tensors):
        assert not tensor.any()
        tensor.fill_(number + 1)
    assert [tensor.shape for tensor in tensors] == [(3, 5, 1), (3, 5, 7), (3, 5, 64), (9,)]
    assert [tensor.dtype for tensor in tensors] == 3 * [torch.bfloat16] + [torch.float32]
    for number, tensor in enumerate(tensors):
        assert (tensor == number + 1).all() and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0


def test_huge_pages_are_asked_for() -> None:
    tensor = HugePages().zeros(LIKE, 100)
    assert tensor.data_ptr() % (2 * MEBIBYTE) == 0
    assert "hg" in flags_at(tensor.data_ptr())


def test_more_than_a_mapping() -> None:
    pages = HugePages()
    small, large = pages.zeros(LIKE, 8), pages.zeros(LIKE, 40 * MEBIBYTE)
    large[-1] = 1
    small.fill_(2)
    assert large.numel() == 40 * MEBIBYTE and large[0] == 0 and large[-1] == 1


def test_memory_goes_back_with_the_last_tensor() -> None:
    pages = HugePages()
    tensors = [pages.zeros(LIKE, 32 * MEBIBYTE) for _ in range(2)]
    before = resident_bytes()
    for tensor in tensors:
        tensor.fill_(1)
    assert resident_bytes() - before > 120 * MEBIBYTE
    del pages, tensors, tensor
    assert resident_bytes() - before < 8 * MEBIBYTE


def test_touched_zeros_are_there() -> None:
    tensor = HugePages().zeros(LIKE, 8, 4 * MEBIBYTE)
    before = resident_bytes()
    touch_zeros(tensor)
    assert resident_bytes() - before > 60 * MEBIBYTE
    assert not tensor.any()


def test_populated_memory_keeps_what_was_written() -> None:
    tensor = HugePages().zeros(LIKE, 8, 4 * MEBIBYTE)
    tensor[3, 5:9] = 7
    before = resident_bytes()
    assert populate(tensor[2:7])
    assert 34 * MEBIBYTE < resident_bytes() - before < 44 * MEBIBYTE  # one of the pages was there
    assert (tensor[3, 5:9] == 7).all() and int(tensor.count_nonzero()) == 4


def test_memory_that_is_not_there_cannot_be_populated() -> None:
    nobodys = torch.frombuffer((ctypes.c_char * 4096).from_address(1 << 12), dtype=torch.uint8)
    assert not populate(nobodys)


def test_copy() -> None:
    turned = torch.arange(6).view(2, 3).T
    copy = HugePages().copy(turned)
    assert copy.is_contiguous() and copy.equal(turned) and copy.data_ptr() != turned.data_ptr()


def test_no_memory_left() -> None:
    with pytest.raises(MemoryError):
        HugePages().zeros(LIKE, 1 << 50)


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(huge_pages.mmap, "MADV_HUGEPAGE")
    tensor = HugePages().zeros(LIKE, 2, 3)
    assert tensor.shape == (2, 3) and tensor.dtype == torch.bfloat16 and not tensor.any()


def test_other_devices_and_nothing() -> None:
    assert HugePages().zeros(torch.empty(0, device="meta"), 2, 3).is_meta
    assert HugePages().zeros(LIKE, 0, 3).shape == (0, 3)
